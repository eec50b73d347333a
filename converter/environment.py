"""What neoconvert runs with here: versions, and of the machine what decides what it can do.

For provenance, `--version` and bug reports; nothing says where anything is.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

LIBRARIES = ("numpy", "safetensors", "torch", "transformers", "transformer-lens", "onnxruntime")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "MKL_NUM_THREADS",
    "OMP_NUM_THREADS", "TRANSFORMERS_OFFLINE",
)  # fmt: skip
"""Of the environment, those that change what runs."""
_PLAIN = re.compile(r"[\d,]*")
_PATH = re.compile(r"(?:[A-Za-z]:)?[/\\](?:[^\s:'\"]*[/\\])*")


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Installed versions of neoconvert and these, from package metadata (no imports)."""
    found = {}
    for name in ("neoconvert", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def required() -> tuple[str, ...]:
    """The libraries that neoconvert needs, by the names of their packages."""
    try:
        wanted = requires("neoconvert") or []
    except PackageNotFoundError:  # it runs from its source
        return LIBRARIES
    return tuple(re.split(r"[^\w.-]", line)[0] for line in wanted if "extra ==" not in line)


def python_version() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def describe() -> dict[str, Any]:
    """The environment, as plain JSON. What cannot be imported is said under `problems`."""
    problems: list[str] = []

    def ask(library: str, question: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return question()
        except ImportError as error:
            if error.name == library:
                return otherwise
            problems.append(f"{library} cannot be imported: {_without_folders(str(error))}")
        except Exception as error:  # a broken library raises anything
            problems.append(f"{library}: {type(error).__name__}: {_without_folders(str(error))}")
        return otherwise

    found = versions(required())
    return {
        "neoconvert": found.pop("neoconvert", "not installed"),
        "python": python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": _cores(),
        "memory": _memory(),
        "libraries": found,
        "transformer_lens": ask("transformer_lens", _transformer_lens, []),
        "devices": ["cpu", *ask("torch", _cuda, [])],
        "onnxruntime": ask("onnxruntime", _providers, []),
        "variables": {name: _shown(os.environ[name]) for name in VARIABLES if name in os.environ},
        "problems": problems,
    }


def _without_folders(text: str) -> str:
    """A message without the folders in it."""
    return _PATH.sub("", text)


def _shown(value: str) -> str:
    """Numbers and switches; of all else only that it is set."""
    return value if _PLAIN.fullmatch(value) else "set"


def _cores() -> int:
    from converter.parallel import cores

    return cores()


def _memory() -> int | None:
    """Bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _transformer_lens() -> list[str]:
    """Its classes that there are: the generation decides."""
    import transformer_lens  # noqa: F401

    from converter.verification.loading import has_bridge, has_hooked_transformer

    classes = {"HookedTransformer": has_hooked_transformer(), "TransformerBridge": has_bridge()}
    return [name for name, there in classes.items() if there]


def _cuda() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        f"cuda:{i} ({torch.cuda.get_device_name(i)}, CUDA {torch.version.cuda})"
        for i in range(torch.cuda.device_count())
    ]


def _providers() -> list[str]:
    from converter.onnx.session import providers

    return providers()
