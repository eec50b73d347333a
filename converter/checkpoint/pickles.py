"""Reading what torch.save wrote: a state dict, or a bundle in which it is one entry among several."""

from __future__ import annotations

import argparse
import pathlib
import re
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from converter import strict_json
from converter.checkpoint import legacy_pickles
from converter.checkpoint.reader import Entry, TorchReader, odd_kind, plain_cfg
from converter.errors import CannotDoHere, CorruptFile, PickleRefused

_ALONE = "Where it was made, save the weights alone: torch.save(model.state_dict(), FILE)"
_DEPTH = 12
_MAX_JSON = 2**20
_MOST_VALUES, _LONGEST_PICKLE = 300_000, 8 * 2**20
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class Held:
    """Stands in for a pickled config object: its fields, and none of its code."""

    said: ClassVar[dict[str, str]] = {}


class HeldHF(Held):
    said: ClassVar[dict[str, str]] = {"model_type": "gpt_neo"}


_CONFIGS: dict[str, type[Held]] = {
    "transformers.models.gpt_neo.configuration_gpt_neo.GPTNeoConfig": HeldHF,
    "transformer_lens.HookedTransformerConfig.HookedTransformerConfig": Held,
    "transformer_lens.config.HookedTransformerConfig.HookedTransformerConfig": Held,
    "transformer_lens.config.hooked_transformer_config.HookedTransformerConfig": Held,
    "transformer_lens.config.TransformerBridgeConfig.TransformerBridgeConfig": Held,
    "transformer_lens.config.transformer_bridge_config.TransformerBridgeConfig": Held,
}


class PickleReader(TorchReader):
    """A file of torch.save, always loaded with `weights_only=True`.

    Tensors of nested dicts and lists are named by their path: `state_dict.model.wte.weight`.

    Raises:
        PickleRefused: the file holds more than tensors and plain values.
        CorruptFile: not a torch file, or a hostile archive.
        CannotDoHere: this torch has known holes in weights_only loading.
    """

    def __init__(self, path: Path) -> None:
        content = load(path)
        self.entries, self.configs = {}, []
        tensors: dict[str, Any] = {}
        for entry, value in _walk(content, (), _steps(path)):
            name = ".".join(entry)
            if isinstance(value, Mapping):
                self.configs.append((entry, plain_cfg(dict(value))))
            elif name in tensors:
                raise CorruptFile(
                    f"Two tensors in the file come to the same name, {name}.",
                    where=str(path),
                    do="Save the state dict alone: torch.save(model.state_dict(), FILE)",
                )
            elif odd_kind(value) is None and value.nbytes > value.untyped_storage().nbytes():
                raise CorruptFile(
                    f"Tensor {name} has {value.nbytes:,} bytes, of which the file holds"
                    f" {value.untyped_storage().nbytes():,}.",
                    where=str(path),
                    do="Where it was made, save it whole: torch.save({n: t.contiguous() for n, t in state.items()}, FILE)",
                )
            else:
                tensors[name], self.entries[name] = value, entry[:-1]
        self.beside = tuple(str(key) for key, _ in _items(content))
        super().__init__(tensors, path)


def load(path: str | Path) -> Any:
    """What torch.save wrote, with `weights_only=True`: tensors, plain values, and stand-ins for
    configs. Raises: see `PickleReader`."""
    import torch

    path = Path(path)
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        # CVE-2025-32434 (fixed in 2.6) and CVE-2026-24747 (fixed in 2.10) run code all the same.
        raise CannotDoHere(
            f"torch {torch.__version__} cannot read pickle files safely (CVE-2026-24747).",
            where=str(path),
            do="Install torch 2.10 or later, or save the checkpoint as safetensors.",
        )
    _refuse_archives(path)
    with open(path, "rb") as file:
        if file.read(1) not in (b"\x80", b"P"):  # a tar archive, say, which torch would unpack
            raise _refusal(path, "")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_inert()):
            warnings.simplefilter("ignore")  # torch's words on the file; ours follow
            if zipfile.is_zipfile(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return legacy_pickles.load(path)
    except CorruptFile:
        raise
    except Exception as error:  # torch raises many kinds; each is this file's fault
        raise _refusal(path, str(error)) from error


_HELD: dict[str, tuple[str, str]] = {
    r"(?i)ShardedTensor|DTensor|device_mesh": (
        "The pickle holds {what}: one process's part of the weights.",
        "Where it was made, gather them first: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)).",
    ),
    r"^deepspeed\.": (
        "The file is DeepSpeed's ({what}): optimizer states, with a part of the weights.",
        "Put the weights together from FOLDER, which holds latest and global_step…, then convert OUT with --allow-pickle --cfg config.json: python -m deepspeed.utils.zero_to_fp32 FOLDER OUT",
    ),
    r"^numpy\.": (
        "The pickle holds NumPy arrays ({what}), and only tensors and plain values are read.",
        "Where it was made, save tensors: torch.save({{n: torch.from_numpy(a) for n, a in arrays.items()}}, FILE)",
    ),
    r"modeling_|HookedTransformer$|TransformerBridge$|DataParallel$|\.nn\.modules\.": (
        "The file is a whole pickled model ({what}), which runs code when it is opened (weights_only refuses it).",
        _ALONE,
    ),
    r"Config$": (
        "The pickle holds {what}, and only tensors and plain values are read (weights_only).",
        "Where it was made, save {name}.to_dict() in its place: plain values are read.",
    ),
    "": ("The pickle holds {what}, and only tensors and plain values are read (weights_only).", _ALONE),
}  # fmt: skip
"""What a pickle holds that is not read, by its name: what to say of it, and what to do."""


def _refusal(path: Path, said: str) -> PickleRefused | CorruptFile:
    """Our own words for why torch does not load a file: torch's advice is to drop weights_only."""
    if found := _GLOBAL.search(said):
        what = found[1]
        holds, do = next(words for pattern, words in _HELD.items() if re.search(pattern, what))
        name = what.rpartition(".")[2]
        return PickleRefused(holds.format(what=what), where=str(path), do=do.format(name=name))
    if "weights_only" in said.lower():
        return PickleRefused(
            "The pickle holds more than tensors and plain values (weights_only refuses it).",
            where=str(path),
            do=_ALONE,
        )
    return CorruptFile(
        "The file is not one that torch.save wrote, or is damaged.",
        where=str(path),
        do="Download or save it again.",
    )


def _inert() -> list[Any]:
    """What torch refuses by default but runs no code: holders of plain values, as training loops and
    `cfg.to_dict()` leave them."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    old_and_new = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    holders = [argparse.Namespace, types.SimpleNamespace, dict, list, int, float]
    defaults = (_emptied, "collections.defaultdict")  # torch fills plain dicts alone
    paths = [
        (pathlib.PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    ]
    configs = [(held, name) for name, held in _CONFIGS.items()]
    return [*old_and_new, np.dtype, *kinds, *holders, defaults, *paths, *configs]


def _emptied(*_default: Any) -> dict[Any, Any]:
    return {}


def _refuse_archives(path: Path) -> None:
    """torch stores entries uncompressed; anything else expands to who knows what."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # damaged, or read by torch otherwise than by Python
        raise _refusal(path, "") from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CorruptFile(
            "The file is a TorchScript program, not a state dict.", where=str(path), do=_ALONE
        )
    if any(e.filename.endswith("/data.pkl") and e.file_size > _LONGEST_PICKLE for e in entries):
        raise CorruptFile(
            "The archive's pickle is larger than the names and settings of any model.",
            where=str(path),
            do=_ALONE,
        )
    total = sum(entry.file_size for entry in entries)
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or total > path.stat().st_size:
        raise CorruptFile(
            "The archive's entries are compressed or overlap, which torch.save never does.",
            where=str(path),
            do="Do not open this file; get the checkpoint from a source you trust.",
        )


def _steps(path: Path) -> Iterator[int]:
    """As many as a walk may take: a few lists that hold one another many times have billions.

    Raises:
        CorruptFile: after the last.
    """
    yield from range(_MOST_VALUES)
    raise CorruptFile(
        f"The file holds more than {_MOST_VALUES:,} values, of which a model has none.",
        where=str(path),
        do=_ALONE,
    )


def _walk(
    value: Any, entry: Entry, steps: Iterator[int], above: tuple[int, ...] = ()
) -> Iterator[tuple[Entry, Any]]:
    """Every tensor, and every dict that looks like a model's config, with the keys that lead there."""
    import torch

    next(steps)
    if isinstance(value, torch.Tensor):
        yield entry, value
        return
    if isinstance(value, str) and value.lstrip().startswith("{") and len(value) < _MAX_JSON:
        value = _parsed(value)
    if id(value) in above or len(entry) > _DEPTH:
        return
    items = _items(value)
    if _is_config(dict(items)):
        yield entry, dict(items)
    for key, child in items:
        yield from _walk(child, (*entry, str(key)), steps, (*above, id(value)))


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return list(vars(value).items())
    if isinstance(value, Held):
        public = {name: field for name, field in vars(value).items() if not name.startswith("_")}
        return list((value.said | public).items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def _parsed(text: str) -> Any:
    try:
        return strict_json.loads(text)
    except ValueError:
        return None


def _is_config(value: dict[Any, Any]) -> bool:
    """HF's, or TransformerLens's."""
    return (
        isinstance(value.get("model_type"), str)
        or {"hidden_size", "num_layers", "num_heads"} <= set(value)
        or {"n_layers", "d_model", "n_ctx", "d_head"} <= set(value)
    )
