"""Naming what a file or directory is that holds no weights which neoconvert reads, and what to do.

Each kind is one that people have been seen to pass to such a converter. The advice is a command
where there is one.
"""

from __future__ import annotations

import json
import re
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from converter.errors import BadInput, CorruptFile, SourceNotFound

_LFS = b"version https://git-lfs.github.com/spec/"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_ODD = (".safetensors", *PICKLES)
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*|adapter_model|random_states.*)\.\w+"
    r"|ledger\.safetensors"
)
_ZERO = r".*(optim_states|zero_pp_rank_\d+.*_model_states)\.pt"
_OLD = "With transformers 4 (5 cannot):"
_SAVE = "save_pretrained('OUT'); then convert OUT."


def refuse_foreign(path: Path) -> None:
    """
    Raises:
        CorruptFile: a file whose first bytes show that it is not what its suffix says.
        SourceNotFound: not a file: a pipe or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise SourceNotFound(
            "This is a pipe or a device, not a file.", where=str(path), do="Give a weight file."
        )
    with open(path, "rb") as file:
        head = file.read(256)
    if error := pointer(path, head.decode("utf-8", "replace")):
        raise error
    for begins, (what, do) in _MAGIC.items():
        if head.lstrip().lower().startswith(begins):
            raise CorruptFile(f"The file is {what}.", where=str(path), do=do)
    safetensors = head[8:9] == b"{" and path.suffix != ".safetensors"
    pickled = path.suffix == ".safetensors" and head[:4] == b"PK\3\4"
    if safetensors or pickled:
        kind, suffix = ("safetensors", ".safetensors") if safetensors else ("torch.save", ".bin")
        raise CorruptFile(
            f"The file is one of {kind}, whatever its name says.",
            where=str(path),
            do=f"Rename it to {path.stem}{suffix}.",
        )


_MAGIC: dict[bytes, tuple[str, str]] = {
    b"<!doctype html": ("a web page, not weights", "Download it again; the hub may ask you to log in first (hf auth login)."),
    b"<html": ("a web page, not weights", "Download it again; the hub may ask you to log in first (hf auth login)."),
    b"gguf": ("GGUF, which llama.cpp runs and neoconvert does not read", "Give the checkpoint that it was made from."),
    b"\x89hdf": ("HDF5: TensorFlow's weights", f"{_OLD} AutoModelForCausalLM.from_pretrained(DIRECTORY, from_tf=True).{_SAVE}"),
}  # fmt: skip


def pointer(path: Path, text: str) -> CorruptFile | None:
    """The error for a Git LFS pointer: three lines of text where the file itself should be."""
    if not text.startswith(_LFS.decode()):
        return None
    return CorruptFile(
        "The file is a Git LFS pointer: the repository was cloned without its large files.",
        where=str(path),
        do=f"Run `git lfs pull` in {path.parent}, or download the model with `hf download`.",
    )


def not_weights(path: Path) -> BadInput:
    """The error for a file whose suffix is none that is read."""
    for kind in (_adapter, _zero, _distributed, _other_framework):
        if found := kind(Listing(path.parent, (path.name,))):
            return CorruptFile(found[0], where=str(path), do=found[1])
    graph = path.suffix == ".onnx"
    return CorruptFile(
        f"{path.suffix or 'No suffix'!r}: this is not a weight file that neoconvert reads.",
        where=str(path),
        do="Give the checkpoint that the graph was exported from; `verify` and `inspect` read graphs."
        if graph
        else f"Give a .safetensors file, or {', '.join(PICKLES)} with --allow-pickle.",
    )


@dataclass(frozen=True)
class Listing:
    """A directory's entries, folders with a slash."""

    directory: Path
    names: tuple[str, ...]

    def matching(self, pattern: str) -> list[str]:
        """The names that are, from end to end, of a pattern."""
        return [name for name in self.names if re.fullmatch(pattern, name)]

    def below(self, pattern: str) -> list[Path]:
        return sorted(self.directory.glob(pattern))

    def command(self, name: str = "") -> str:
        """The directory, or what is in it, as a shell takes it."""
        return shlex.quote(str(self.directory / name))


def nothing_here(directory: Path) -> BadInput:
    """The error for a directory that holds none of the weight files that transformers looks for."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in directory.iterdir())
    listing = Listing(directory, tuple(names))
    for kind in _KINDS:
        if found := kind(listing):
            what, do = found
            return SourceNotFound(what, where=str(directory), do=do)
    some = f"it holds {', '.join(names[:4])}{' …' * (len(names) > 4)}" if names else "it is empty"
    return SourceNotFound(
        "The directory holds no model.safetensors (or its index) and no pytorch_model.bin.",
        where=f"{directory}: {some}",
        do="Name the directory that holds the weights, or the weight file itself.",
    )


Found = tuple[str, str] | None
"""What it is, and what to do."""


def _adapter(here: Listing) -> Found:
    if not here.matching(r"adapter_(config\.json|model\.(safetensors|bin))"):
        return None
    base = "BASE"
    try:
        text = (here.directory / "adapter_config.json").read_text(encoding="utf-8")
        config = json.loads(text)
        base = str(config.get("base_model_name_or_path") or base)
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    return (
        "The directory holds an adapter (PEFT) and not the model that it adapts.",
        f"Give the model, and the adapter with it: neoconvert hf-to-tl {base} OUT --adapter {here.command()}",
    )


def _zero(here: Listing) -> Found:
    own, shards = "zero_to_fp32.py" in here.names, here.matching(_ZERO)
    if not (own or shards or here.below("*/*optim_states.pt")):
        return None
    script = here.command("zero_to_fp32.py") if own else "-m deepspeed.utils.zero_to_fp32"
    folder = Listing(here.directory.parent, ()) if shards and not own else here
    return (
        "The directory holds DeepSpeed ZeRO shards: each has a part of every weight.",
        f"Put them together, then convert OUT: python {script} {folder.command()} OUT",
    )


def _distributed(here: Listing) -> Found:
    shards = [*here.below("*.distcp"), *here.below("*/*.distcp")]
    if not shards:
        return None
    return (
        "The directory holds a distributed checkpoint (DCP, .distcp): each file has a part of it.",
        "Put it together, then convert model.pt with --allow-pickle and --cfg config.json:"
        f" python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(shards[0].parent))} model.pt",
    )


def _hub_cache(here: Listing) -> Found:
    models = here.matching(r"models--.*/")
    if models:
        name = models[0].rstrip("/").removeprefix("models--").replace("--", "/")
        return ("The directory is the hub's cache, with models in it.", f"Give the hub id: {name}")
    snapshots = [path for path in here.below("snapshots/*") if path.is_dir()]
    if not snapshots:
        return None
    main = here.directory / "refs/main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    best = next((path for path in snapshots if path.name == commit), snapshots[0])
    return (
        "The directory is a model's place in the hub's cache; its files are below snapshots/.",
        f"Name the snapshot: {best}",
    )


def _other_framework(here: Listing) -> Found:
    load = f"AutoModelForCausalLM.from_pretrained({str(here.directory)!r}"
    if here.matching(r"flax_model.*|.*\.msgpack"):
        return (
            "The weights are Flax's (flax_model.msgpack).",
            f"{_OLD} {load}, from_flax=True).{_SAVE}",
        )
    if here.matching(r"tf_model.*|.*\.h5"):
        return (
            "The weights are TensorFlow's (tf_model.h5).",
            f"{_OLD} {load}, from_tf=True).{_SAVE}",
        )
    if found := here.matching(r".*ckpt.*\.(index|meta|data-\d+-of-\d+)"):
        stem = here.command(re.sub(r"\.(index|meta|data-[\d-]+of-\d+)$", "", found[0]))
        return (
            "The weights are a TensorFlow checkpoint (Mesh TensorFlow, as GPT-Neo was trained in).",
            f"{_OLD} python -m transformers.models.gpt_neo.convert_gpt_neo_mesh_tf_to_pytorch"
            f" --tf_checkpoint_path {stem} --config_file config.json --pytorch_dump_path OUT",
        )
    if found := here.matching(r".*\.(gguf|npz|ot|mlmodel|tflite|nemo)"):
        return (
            f"The weights are in {found[0]}, a format that neoconvert does not read.",
            "Give the checkpoint that it was made from, as transformers saves it.",
        )
    return None


def _graph(here: Listing) -> Found:
    if not here.matching(r".*\.onnx") and not here.below("onnx/*.onnx"):
        return None
    return (
        "The directory holds an ONNX graph and no weight files.",
        "Give the checkpoint that the graph was exported from; `verify` and `inspect` read graphs.",
    )


def _variant(here: Listing) -> Found:
    """model.fp16.safetensors: transformers opens it with variant="fp16"."""
    if found := here.matching(r"(model|pytorch_model)\.[\w-]+\.(safetensors|bin)"):
        return (
            f"The directory holds a variant of the weights alone: {', '.join(found[:3])}.",
            f"Give the file itself: {here.command(found[0])}{_flag(found[0])}",
        )
    if found := here.matching(r"(model|pytorch_model)\.(safetensors|bin)\.index\.[\w-]+\.json"):
        variant = found[0].split(".")[-2]
        return (
            f"The directory holds a variant of the weights alone, in shards: {found[0]}.",
            f"Save it without: AutoModelForCausalLM.from_pretrained({str(here.directory)!r},"
            f" variant={variant!r}).{_SAVE}",
        )
    return None


def _odd_name(here: Listing) -> Found:
    odd = [name for name in here.names if Path(name).suffix in _ODD]
    found = [name for name in odd if not _NOT_WEIGHTS.fullmatch(name)]
    if not found:
        return None
    return (
        f"The directory's weights have a name of their own: {', '.join(found[:3])}"
        f"{' …' * (len(found) > 3)}.",
        f"Give the file itself: {here.command(found[0])}{_flag(found[0])}",
    )


def _flag(name: str) -> str:
    return "" if name.endswith(".safetensors") else " --allow-pickle"


def _below(here: Listing) -> Found:
    """A training run's folder, or any other whose weights are one step down."""
    files = ("model.safetensors", "pytorch_model.bin")
    folders = {path.parent for name in files for path in here.below(f"*/{name}*")}
    if not folders:
        return None
    steps = [path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    if steps:
        steps.sort(key=lambda path: int(path.name.split("-")[1]))
        some = ", ".join(path.name for path in steps[-3:])
        return (
            f"The directory is a training run's; its checkpoints are below: {some}.",
            f"Name one, such as the last: {steps[-1]}",
        )
    below = sorted(folders)
    some = ", ".join(path.name for path in below[:3])
    return (f"The weights are one folder down: {some}.", f"Name the folder: {below[0]}")


def _broken(here: Listing) -> Found:
    """The hub's cache has links to files elsewhere; downloads have other names until they are whole."""
    names = here.matching(r".*\.(safetensors|bin)")
    broken = [name for name in names if not (here.directory / name).exists()]
    partial = here.matching(r".*\.(incomplete|part|crdownload|aria2)")
    if not (broken or partial):
        return None
    what = (
        f"{broken[0]} is a link to a file that is not there."
        if broken
        else f"The download is not complete: {partial[0]}."
    )
    return what, "Download the model again: hf download OWNER/NAME."


def _no_weights(here: Listing) -> Found:
    found = here.matching(_NOT_WEIGHTS.pattern)
    if not found:
        return None
    return (
        f"The directory holds what was saved beside a model, and not the model: {found[0]}.",
        "Name the directory that holds its model.safetensors or pytorch_model.bin.",
    )


_KINDS: tuple[Callable[[Listing], Found], ...] = (
    _broken, _adapter, _zero, _distributed, _hub_cache, _variant, _below, _odd_name, _other_framework,
    _graph, _no_weights,
)  # fmt: skip
"""In the order of how surely each says what the directory is."""
