"""Naming what a directory is that holds no weights which neoconvert reads, and what to do.

A directory is asked for what it holds itself, and then for what its folders hold: a run's
checkpoints are some steps down.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from converter import strict_json
from converter.checkpoint.foreign_formats import Advice, by_name
from converter.checkpoint.listing import Listing, few, listed, natural, walked
from converter.checkpoint.recipes import interpreter, keeping, options_for, quoted
from converter.checkpoint.standard import INDEX, PICKLES, WEIGHTS, holds_weights
from converter.errors import BadInput, SourceNotFound

ANY_INDEX = r".*\.(safetensors|bin)\.index(\.[\w-]+)?\.json"
"""An index of shards, whatever they are called."""
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state.*|adapter_model|random_states.*)"
    r"(_\d+)?\.\w+|ledger\.safetensors"
)
_MOST = 2**20
"""Bytes of an adapter's config."""
_ZERO = r".*(optim_states|zero_pp_rank_\d+.*_model_states)\.pt"


def nothing_here(directory: Path) -> BadInput:
    """The error for a directory that holds none of the weight files that transformers looks for."""
    listing = listed(directory)
    named = _named(listing) or _below(directory)
    if named:
        (what, do), where = named
        return SourceNotFound(what, where=str(where), do=do)
    names = listing.names
    some = f"it holds {few(names, 4)}" if names else "it is empty"
    return SourceNotFound(
        "The directory holds no model.safetensors (or its index) and no pytorch_model.bin.",
        where=f"{directory}: {some}",
        do="Name the directory that holds the weights, or the weight file itself.",
    )


def _named(here: Listing) -> tuple[Advice, Path] | None:
    for kind in _KINDS:
        if found := kind(here):
            return found, here.directory
    return None


def _broken(here: Listing) -> Advice | None:
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
    return what, f"Download the model again: {_download(here.directory)}"


def _download(directory: Path) -> str:
    cached = re.search(r"models--([\w.-]+)--([\w.-]+)", str(directory))
    return f"hf download {cached[1]}/{cached[2]}" if cached else "hf download OWNER/NAME"


def _adapter(here: Listing) -> Advice | None:
    if not here.matching(r"adapter_(config\.json|model\.(safetensors|bin))"):
        return None
    base = "BASE"
    try:
        path = here.directory / "adapter_config.json"
        if path.is_file():  # and no pipe or device
            with open(path, "rb") as file:
                config = strict_json.loads(file.read(_MOST).decode("utf-8"))
            base = str(config.get("base_model_name_or_path") or base)
    except (OSError, ValueError, AttributeError):
        pass
    return (
        "The directory holds an adapter (PEFT) and not the model that it adapts.",
        f"Give the model, and the adapter with it: neoconvert hf-to-tl {shlex.quote(base)} OUT --adapter {here.command()}",
    )


def _zero(here: Listing) -> Advice | None:
    own, shards = "zero_to_fp32.py" in here.names, here.matching(_ZERO)
    inner = any(re.fullmatch(_ZERO, path.name) for path in here.below("*/*.pt"))
    if not (own or shards or inner or "latest_universal" in here.names):
        return None
    if "latest_universal" in here.names:
        return (
            "The directory holds DeepSpeed's universal checkpoint: a folder for each weight.",
            "Put the checkpoint that it was made from together: python -m deepspeed.utils.zero_to_fp32 FOLDER OUT",
        )
    script = here.command("zero_to_fp32.py") if own else "-m deepspeed.utils.zero_to_fp32"
    inside = shards and not own
    folder = Listing(here.directory.parent, ()) if inside else here
    tag = f" --tag {here.directory.name}" if inside else ""
    return (
        "The directory holds DeepSpeed ZeRO shards: each has a part of every weight.",
        "Put them together, then convert OUT with --allow-pickle --cfg config.json:"
        f" python {script} {folder.command()} OUT{tag}",
    )


def _distributed(here: Listing) -> Advice | None:
    shards = [*here.below("*.distcp"), *here.below("*/*.distcp")]
    folders = sorted({path.parent for path in shards}, key=lambda p: "optim" in p.name.lower())
    if not folders:
        return None
    return (
        "The directory holds a distributed checkpoint (DCP, .distcp): each file has a part of it.",
        put_together(folders[0]),
    )


def put_together(folder: Path) -> str:
    """What to do with the folder that holds a distributed checkpoint's files."""
    return (
        "Put it together, then convert model.pt with --allow-pickle and --cfg config.json:"
        f" {interpreter()} -m torch.distributed.checkpoint.format_utils dcp_to_torch {quoted(folder)} model.pt"
    )


def _hub_cache(here: Listing) -> Advice | None:
    models = here.below("models--*") or here.below("hub/models--*")
    if models:
        ids = [path.name.removeprefix("models--").replace("--", "/") for path in models]
        given = (
            f"Give the hub id: {shlex.quote(ids[0])}"
            if len(ids) == 1
            else "Give the hub id of the one meant"
        )
        best = _snapshot(models[0])
        return (
            f"The directory is the hub's cache, with models in it: {few(ids, 5)}.",
            f"{given}, or its snapshot's directory{f': {quoted(best)}' if best else ''}",
        )
    if best := _snapshot(here.directory):
        return (
            "The directory is a model's place in the hub's cache; its files are below snapshots/.",
            f"Name the snapshot: {quoted(best)}",
        )
    if here.directory.name.startswith("models--") or {"blobs/", "refs/"} <= set(here.names):
        return (
            "The directory is a model's place in the hub's cache, and none of its files are there.",
            f"Download the model: {_download(here.directory)}",
        )
    return None


def _snapshot(model: Path) -> Path | None:
    """The snapshot of a model in the hub's cache that its main branch has."""
    snapshots = [path for path in sorted(model.glob("snapshots/*")) if path.is_dir()]
    main = model / "refs/main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    return next((path for path in snapshots if path.name == commit), next(iter(snapshots), None))


def _indexed(here: Listing) -> Advice | None:
    """Shards whose index has another name than transformers looks for, or another variant's."""
    found = here.matching(ANY_INDEX)
    if not found:
        return None
    flag = " --allow-pickle" if ".bin.index" in found[0] else ""
    variant = found[0].startswith(("model.", "pytorch_model."))
    return (
        f"The directory holds a variant of the weights alone, in shards: {found[0]}."
        if variant
        else f"The directory's weights are in shards whose index has a name of its own: {found[0]}.",
        f"Give the index: {here.command(found[0])}{flag}",
    )


def _odd_name(here: Listing) -> Advice | None:
    odd = [name for name in here.names if Path(name).suffix in (".safetensors", *PICKLES)]
    found = [n for n in odd if not (_NOT_WEIGHTS.fullmatch(n) or n.endswith("/"))]
    found = [n for n in found if not by_name(here.directory / n)]
    if not found:
        return None
    some = few(found, 3)
    parts = [
        n for n in found if re.search(r"\d+-of-\d+|_\d{4}_\d|mp_rank_\d\d|consolidated\.\d", n)
    ]
    if len(parts) > 1:
        command, name = keeping([here.directory / part for part in parts])
        return (
            f"The directory's weights are in parts, without an index: {some}.",
            f"Put them together, then convert {name} with {options_for(name)}: {command}",
        )
    flag = "" if found[0].endswith(".safetensors") else " --allow-pickle"
    variant = re.match(r"(model|pytorch_model)\.[\w-]+\.\w+$", found[0])
    return (
        f"The directory holds a variant of the weights alone: {some}."
        if variant
        else f"The directory's weights have a name of their own: {some}.",
        f"Give the file itself: {here.command(found[0])}{flag}",
    )


def _other_format(here: Listing) -> Advice | None:
    found = (by_name(here.directory / name.rstrip("/")) for name in here.names)
    return next((each for each in found if each), None)


def _graph(here: Listing) -> Advice | None:
    if not here.matching(r".*\.onnx") and not here.below("onnx/*.onnx"):
        return None
    return (
        "The directory holds an ONNX graph and no weight files.",
        "Give the checkpoint that the graph was exported from; `verify` and `inspect` read graphs.",
    )


def _no_weights(here: Listing) -> Advice | None:
    found = here.matching(_NOT_WEIGHTS.pattern)
    if not found:
        return None
    return (
        f"The directory holds what was saved beside a model, and not the model: {found[0]}.",
        "Name the directory that holds its model.safetensors or pytorch_model.bin.",
    )


def _config_alone(here: Listing) -> Advice | None:
    if "config.json" not in here.names:
        return None
    return (
        "The directory holds a model's config, and no model.safetensors (or its index) and no"
        " pytorch_model.bin.",
        f"Download the weights too: {_download(here.directory)}",
    )


_KINDS: tuple[Callable[[Listing], Advice | None], ...] = (
    _broken, _adapter, _zero, _distributed, _hub_cache, _indexed, _odd_name, _other_format, _graph,
)  # fmt: skip
"""In the order of how surely each says what the directory is."""


def _below(directory: Path) -> tuple[Advice, Path] | None:
    """What the folders hold: weights before all else, of several the last."""
    folders = sorted(walked(directory), key=natural)
    if holding := [folder for folder in folders if holds_weights(folder)]:
        return _weights_below(directory, holding), directory
    here = listed(directory)
    # The upper ones first, as zero_to_fp32.py is above its shards; of a run's the last.
    folders.sort(key=lambda path: len(path.parts), reverse=True)
    for folder in reversed(folders):
        if found := _named(listed(folder)):
            return found
    alone = _no_weights(here) or _config_alone(here)
    return (alone, directory) if alone else None


def _weights_below(directory: Path, holding: list[Path]) -> Advice:
    names = [str(path.relative_to(directory)) for path in holding]
    some = f": {', '.join(names)}"
    if len(names) > 4:
        some = f", {len(names)} in all, the last of them {', '.join(names[-3:])}"
    last = holding[-1]
    safe = any((last / f"{WEIGHTS}{suffix}").is_file() for suffix in ("", INDEX))
    flag = "" if safe else " --allow-pickle"
    place = f"{quoted(last)}{flag}"
    if any(re.fullmatch(r"checkpoint-\d+", path.name) for path in holding):
        return (
            f"The directory is a training run's; its checkpoints are below{some}.",
            f"Name one, such as the last: {place}",
        )
    deep = all(path.parent == directory for path in holding)
    down = "one folder down" if deep else "some folders down"
    return f"The weights are {down}{some}.", f"Name the folder: {place}"
