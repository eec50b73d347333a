"""Models in the software their users run: transformers, HookedTransformer, TransformerBridge.

Always from local files. Weights are read by the libraries themselves (transformers,
safetensors.torch), not by our reader, so that the two check one another.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import CannotDoHere, ConfigError
from converter.layout import Layout

if TYPE_CHECKING:
    import torch

OWN = "neoconvert's own forward"
"""What runs where no library does."""
NEEDS = {
    "hooked": "TransformerLens 3 or earlier",
    "bridge": "TransformerLens 3 or later",
}
"""What has the software of a layout that not every environment runs."""


def load_hooked(directory: str | Path, device: str | None = None) -> Any:
    """A saved `hooked` directory as a HookedTransformer, with the directory's tokenizer.

    Raises:
        CannotDoHere: TransformerLens 4, which has no HookedTransformer; or no such device.
        BadInput: the directory is no sound `hooked` checkpoint.
    """
    checkpoint = _opened(directory, "hooked")
    require_hooked(
        directory,
        "Use converter.to_bridge(directory); or run `neoconvert tl-to-hf` and open the result with"
        " TransformerBridge.boot_transformers(dir).",
    )
    from converter.verification.libraries import hooked_model

    state = _owned(checkpoint)
    return hooked_model(checkpoint, resolve_device(device), tokenizer=True, state=state)


def load_bridge(directory: str | Path, device: str | None = None) -> Any:
    """A saved `bridge` directory as a TransformerBridge, with the directory's tokenizer.

    Raises:
        CannotDoHere: TransformerLens 2, which has no TransformerBridge; or no such device.
        BadInput: the directory is no sound `bridge` checkpoint.
    """
    checkpoint = _opened(directory, "bridge")
    require_bridge(directory, "Use converter.to_hooked(directory), or upgrade transformer-lens.")
    from converter.verification.libraries import bridge_model

    return bridge_model(checkpoint, resolve_device(device), state=_owned(checkpoint))


def require_hooked(what: object, do: str) -> None:
    """
    Raises:
        CannotDoHere: this TransformerLens has no HookedTransformer.
    """
    if not has_hooked_transformer():
        raise CannotDoHere(
            "HookedTransformer was removed in TransformerLens 4; its successor cannot run GPT-Neo weights in this layout.",
            where=f"{what}, with transformer-lens {installed('transformer-lens')}",
            do=do,
        )


def require_bridge(what: object, do: str) -> None:
    """
    Raises:
        CannotDoHere: this TransformerLens has no TransformerBridge.
    """
    if not has_bridge():
        raise CannotDoHere(
            "TransformerBridge needs TransformerLens 3 or later.",
            where=f"{what}, with transformer-lens {installed('transformer-lens')}",
            do=do,
        )


def require_docstrings() -> None:
    """
    Raises:
        CannotDoHere: Python has left docstrings out, of which transformers makes code.
    """
    if not require_docstrings.__doc__:
        raise CannotDoHere(
            "transformers cannot run models where Python leaves docstrings out.",
            where="python -OO, or PYTHONOPTIMIZE=2",
            do="Run it without -OO, and with PYTHONOPTIMIZE unset; or run no model: --no-verify where"
            " files are written, --check weights where they are verified.",
        )


def opens_by(layout: Layout) -> tuple[str, ...]:
    """What to say of files whose layout is not that of the TransformerLens installed here."""
    found = installed("transformer-lens")
    if found and layout == "hooked" and not has_hooked_transformer():
        missing, other = "HookedTransformer", "bridge"
    elif found and layout == "bridge" and not has_bridge():
        missing, other = "TransformerBridge", "hooked"
    else:
        return ()
    return (
        f"TransformerLens {found} has no {missing}: open this with converter.to_{other},"
        f" or write --layout {other}",
    )


def _opened(directory: str | Path, layout: Layout) -> Checkpoint:
    checkpoint = open_checkpoint(directory)
    if checkpoint.layout != layout:
        raise ConfigError(
            f"This is a checkpoint in the {checkpoint.layout} layout, not {layout}.",
            where=str(directory),
            do=f"Use converter.to_{layout}(directory), which opens every layout.",
        )
    return checkpoint


def _owned(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What is loaded, in memory: a user's model is no part of a file that may be written again."""
    from converter.verification.libraries import state_dict

    return {name: tensor.clone() for name, tensor in state_dict(checkpoint).items()}


def installed(package: str) -> str:
    """Its version, or "" where it is not installed. Imports nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def has_software(layout: Layout) -> bool:
    """Whether there is software here that runs it."""
    if layout == "hf":
        return True
    return has_hooked_transformer() if layout == "hooked" else has_bridge()


def has_hooked_transformer() -> bool:
    return 0 < _major("transformer-lens") < 4


def has_bridge() -> bool:
    return _major("transformer-lens") >= 3


def _major(package: str) -> int:
    return int((installed(package) or "0").split(".")[0])


def resolve_device(name: str | None) -> torch.device:
    """ "auto" (or None), "cpu", "cuda" or "cuda:N".

    Raises:
        CannotDoHere: CUDA was asked for by name and is not there.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, "auto"):
        return torch.device("cuda" if there else "cpu")
    try:
        device = torch.device(str(name))
        known = device.type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known or (device.type == "cuda" and (device.index or 0) >= there):
        raise CannotDoHere(
            f"There is no device {name!r} here.",
            where=f"torch {torch.__version__} sees {there} CUDA device(s)",
            do="Use --device auto or cpu, or install a torch that supports this machine's GPU.",
        )
    return device
