"""Checkpoints made from others by the steps alone: no pipeline, no metadata to lean on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.checkpoint.config import NeoConfig
from converter.dtypes import NAMES, cast
from converter.layout import Layout, expand
from converter.processing import STEPS, Carry, Step, apply_all
from converter.processing.step import Array
from tests.models import save_as

NAMES_OF = [step.name for step in STEPS]

Weights = dict[str, Array]
"""By `hooked` name, in `hooked` axes."""


def read(checkpoint: Checkpoint) -> Weights:
    return {key: checkpoint.tensor(key).astype(np.float64) for key in checkpoint.slots}


def units(weights: Weights) -> list[tuple[str, Weights]]:
    """The units, each with the prefix that the names of its tensors lack."""
    split: dict[tuple[str, str], Weights] = {}
    for key, value in weights.items():
        first, second, *_ = key.split(".")
        prefix = f"{first}.{second}." if first == "blocks" else ""
        kind = prefix or ("final" if first in ("ln_final", "unembed") else "embed")
        split.setdefault((kind, prefix), {})[key.removeprefix(prefix)] = value
    return [(prefix, unit) for (_, prefix), unit in split.items()]


def process(weights: Weights, steps: Sequence[Step]) -> Weights:
    return {
        prefix + name: value
        for prefix, unit in units(weights)
        for name, value in apply_all(unit, steps)[0].items()
    }


def write(
    directory: Path,
    weights: Weights,
    like: Checkpoint,
    layout: Layout,
    code: str | None = None,
    **config: Any,
) -> Checkpoint:
    """Store weights, each rounded once; nothing else in the directory says what they are."""
    code = code or like.dtype
    neo = like.config
    folded = all((weights[k] == 1).all() for k in weights if k.endswith(("ln1.w", "ln2.w")))
    if layout == "hooked":
        neo = NeoConfig(**{**neo.__dict__, "folded": folded})
    tensors = {}
    for key, slot in expand(layout, neo.sizes, neo.n_layers).items():
        biases = layout == "bridge" and key in weights and weights[key].any()
        if slot.name is not None and (slot.in_file(folded=neo.folded) or biases):
            value = slot.to_hub.inverse.apply(cast(weights[key], code), neo.sizes)
            tensors[slot.name] = np.ascontiguousarray(value)
        else:
            neutral = 1 if key.endswith(".w") else 0
            assert (weights[key] == neutral).all(), f"{layout} has no {key}"
    dtype = NAMES[code]
    save_as(directory, layout, tensors, neo, like, dtype=dtype, tied=False, more=config)
    return open_checkpoint(directory)


def artifact(
    directory: Path,
    original: Checkpoint,
    steps: Sequence[Step],
    layout: Layout = "hooked",
    code: str | None = None,
    edit: Callable[[Weights], object] | None = None,
) -> Checkpoint:
    """The original after `steps`; HF carries the biases that it has no place for."""
    weights = process(read(original), (*steps, Carry()) if layout == "hf" else steps)
    if edit is not None:
        edit(weights)
    return write(directory, weights, original, layout, code)
