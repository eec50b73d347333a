"""Opening a checkpoint: its layout from the names, its config, and a check of everything it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from converter.checkpoint.beside import refuse_other_weights
from converter.checkpoint.checkpoint import BUFFER, Checkpoint
from converter.checkpoint.fitting import read_config
from converter.checkpoint.matching import (
    match,
    require_neutral_norms,
    require_present,
    share_tied,
    take_biases,
)
from converter.checkpoint.recognise import recognise
from converter.checkpoint.source import Source, find
from converter.checkpoint.vocabulary import misfit, own_code
from converter.choices import flags, of_kind, place
from converter.errors import UnknownTensor
from converter.layout import GPT_NEO, LAYOUTS, expand


def open_checkpoint(
    given: str | Path,
    *,
    revision: str | None = None,
    cfg: str | Path | None = None,
    allow_pickle: bool = False,
    cache: str | Path | None = None,
) -> Checkpoint:
    """Open a directory, a weight file or a hub id, and check names, shapes and dtypes.

    Args:
        cache: where what comes from the hub is kept; None: in huggingface_hub's own.

    Raises:
        BadInput: see `converter.errors`; the message names the file, the tensor, what was
            expected and what was found.
    """
    place(given, "SOURCE", "Give a directory, a weight file or a hub id.")
    flags({"--allow-pickle": allow_pickle})
    if revision is not None:
        of_kind(revision, str, "--revision", "Give a branch, tag or commit.")
    return read_checkpoint(
        find(
            str(given),
            revision=revision,
            cfg=None if cfg is None else place(cfg, "--cfg", "Name a JSON file."),
            allow_pickle=allow_pickle,
            cache=None if cache is None else place(cache, "cache", "Name a directory."),
        )
    )


def read_checkpoint(source: Source) -> Checkpoint:
    """What a source's headers and config say. Raises: see `open_checkpoint`."""
    seen = recognise(source)
    notes = [*source.notes, *seen.notes]
    source, config = read_config(source, seen, notes)
    layout = seen.layout
    if LAYOUTS[layout].library == "transformers":
        refuse_other_weights(source)
    slots = expand(layout, config.sizes, config.n_layers)
    known = GPT_NEO.buffers(layout, config.n_layers)
    dropped = dict.fromkeys(sorted(known & {*seen.found, *seen.other}), BUFFER)
    if unknown := sorted(set(seen.other) - known):
        raise UnknownTensor(
            f"{len(unknown)} tensor(s) are no plain floats: {', '.join(unknown[:4])}.",
            where=f"{source.path}: {unknown[0]} is {seen.other[unknown[0]]}",
            do="Save the weights as dense float64, float32, float16 or bfloat16 tensors.",
        )
    found = {name: stored for name, stored in seen.found.items() if name not in known}
    dropped |= take_biases(layout, slots, found, config, source)
    stored = match(slots, found, source)
    share_tied(layout, stored, source, notes)
    # Folded norms, where the layout leaves them out.
    leaves_out = not slots["ln_final.w"].in_file(folded=True)
    if leaves_out and not any(".ln1." in key for key in stored):
        config = replace(config, folded=True)
    dropped |= seen.dropped
    if unfit := misfit(source.tokenizer_files(), config.d_vocab):
        notes.append(unfit)
    notes += own_code(source.tokenizer_files(), source.hf_config)
    opened = Checkpoint(source, layout, config, slots, stored, dropped, tuple(notes))
    require_present(opened)
    if leaves_out and config.folded:
        require_neutral_norms(opened)
    return opened
