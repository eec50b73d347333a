"""What a deliberate fault is, and the edits of weights that faults are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np

from converter.checkpoint import Checkpoint, NeoConfig
from converter.layout import EMBEDDING, HEAD
from tests.verification.graph import Graph

Artifact = Literal["hf", "hooked", "bridge", "baked", "processed", "onnx"]
"""`baked`: HF with TransformerLens's default steps; `processed`: `hooked` with them."""
RAW: tuple[Artifact, ...] = ("hf", "hooked", "bridge", "onnx")
FOLDED: tuple[Artifact, ...] = ("baked", "processed")
ALL: tuple[Artifact, ...] = RAW + FOLDED

Weights = dict[str, np.ndarray]
"""What the artifact stores, by `hooked` name, in `hooked` axes; a key may go or come."""
Edit = Callable[[Weights, Checkpoint], None]
"""Changes the weights in place; the checkpoint is the original."""
Change = Callable[[np.ndarray], np.ndarray]
Needs = Callable[[Checkpoint, Artifact], bool]


@dataclass(frozen=True)
class Fault:
    """One way in which an artifact can be wrong."""

    name: str
    on: tuple[Artifact, ...]
    unit: str | None = None
    """The first unit whose output is wrong: "embed", "block i" or "final". None: no one unit."""
    weights: Edit | None = None
    config: Callable[[NeoConfig], Mapping[str, Any]] | None = None
    """Fields of the architecture that change. A graph is built so, and claims the original's."""
    document: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json or cfg.json that change besides."""
    graph: Callable[[Graph], None] | None = None
    software: Callable[[], AbstractContextManager[None]] | None = None
    """What is wrong with the library while it runs."""
    needs: Needs | None = None
    """Which models can have this fault."""
    faint: bool = False
    """In no weight, and so small in some models that only float64 sees it: there it is reported
    as a limit of what verification can tell, and nowhere else excused."""
    harmless: bool = False
    """A control: other bits, the same function. Function alone must not flag it."""


def put(key: str, change: Change) -> Edit:
    def edit(weights: Weights, _: Checkpoint) -> None:
        weights[key] = change(weights[key])

    return edit


def each(*edits: Edit) -> Edit:
    def edit(weights: Weights, original: Checkpoint) -> None:
        for one in edits:
            one(weights, original)

    return edit


def everywhere(change: Change, suffix: str = "") -> Edit:
    def edit(weights: Weights, _: Checkpoint) -> None:
        weights.update({k: change(w) for k, w in weights.items() if k.endswith(suffix)})

    return edit


def exchange(a: str, b: str) -> Edit:
    def edit(weights: Weights, _: Checkpoint) -> None:
        weights[a], weights[b] = weights[b], weights[a]

    return edit


def copy_block(source: int, target: int) -> Edit:
    def edit(weights: Weights, _: Checkpoint) -> None:
        old, new = f"blocks.{source}.", f"blocks.{target}."
        weights.update({new + k[len(old) :]: w for k, w in weights.items() if k.startswith(old)})

    return edit


def swap_blocks(a: int, b: int) -> Edit:
    def edit(weights: Weights, original: Checkpoint) -> None:
        before = dict(weights)
        copy_block(a, b)(weights, original)
        copy_block(b, a)(before, original)
        prefix = f"blocks.{a}."
        weights.update({k: w for k, w in before.items() if k.startswith(prefix)})

    return edit


def permuted(axes: Mapping[str, int], shift: int = 1) -> Edit:
    """The same permutation along an axis of several tensors, of those that there are."""

    def edit(weights: Weights, _: Checkpoint) -> None:
        weights.update({k: np.roll(weights[k], shift, a) for k, a in axes.items() if k in weights})

    return edit


def roll(shift: int = 1, axis: int = 0) -> Change:
    return lambda w: np.roll(w, shift, axis)


def row(index: int, value: float | Change, axis: int = 0) -> Change:
    """One row: a number throughout, or what `value` makes it of the whole."""

    def change(w: np.ndarray) -> np.ndarray:
        copy = w.copy()
        np.moveaxis(copy, axis, 0)[index] = (
            value(np.moveaxis(w, axis, 0)) if callable(value) else value
        )
        return copy

    return change


def one(value: float | Callable[[float], float]) -> Change:
    """The element in the middle: a number, or what `value` makes of it."""

    def change(w: np.ndarray) -> np.ndarray:
        flat = w.flatten()
        middle = flat.size // 2
        flat[middle] = value(float(flat[middle])) if callable(value) else value
        return flat.reshape(w.shape)

    return change


def flip(bit: int) -> Change:
    """One bit of the middle element of a float32 tensor."""

    def change(w: np.ndarray) -> np.ndarray:
        flat = w.astype(np.float32).flatten()
        flat.view(np.uint32)[flat.size // 2] ^= np.uint32(1 << bit)
        return flat.reshape(w.shape)

    return change


def transposed(w: np.ndarray) -> np.ndarray:
    """A square matrix in its flat form [out, in], transposed. W_Q [n, d, h] or W_O [n, h, d]."""
    if w.ndim == 2:
        return w.T
    if w.shape[2] > w.shape[1]:  # W_O: its flat form is [d, (n h)]
        return w.reshape(-1, w.shape[2]).T.reshape(w.shape)
    n, d, h = w.shape
    return w.transpose(0, 2, 1).reshape(d, d).T.reshape(n, h, d).transpose(0, 2, 1)


def by_way_of(dtype: Any) -> Change:
    return lambda w: w.astype(dtype).astype(w.dtype)


half, brain = by_way_of(np.float16), by_way_of(ml_dtypes.bfloat16)


def doubled(w: np.ndarray) -> np.ndarray:
    return 2 * w


# Faults of processing: what a step would have taken or given, from the original.


def uncentred(key: str, axis: int = -1) -> Edit:
    """The mean over the last axis that a step forgot to take."""

    def edit(weights: Weights, original: Checkpoint) -> None:
        mean = original.tensor(key, "F64").mean(axis, keepdims=True)
        weights[key] = weights[key] + mean

    return edit


def folded_mean_left(key: str, gain: str) -> Edit:
    """fold_ln's own centring, over d, forgotten."""

    def edit(weights: Weights, original: Checkpoint) -> None:
        folded = original.tensor(key, "F64") * original.tensor(gain, "F64")[:, None]
        weights[key] = weights[key] + folded.mean(-2, keepdims=True)

    return edit


def gain_again(key: str, gain: str) -> Edit:
    """fold_ln applied to weights that are folded."""

    def edit(weights: Weights, original: Checkpoint) -> None:
        weights[key] = weights[key] * original.tensor(gain, "F64")[:, None]

    return edit


def folded_bias(bias: str, weight: str, shift: str, times: float) -> Edit:
    """The bias that folding made of LN's, added `times` more."""

    def edit(weights: Weights, original: Checkpoint) -> None:
        moved = original.tensor(shift, "F64") @ original.tensor(weight, "F64")
        weights[bias] = weights[bias] + times * moved

    return edit


def value_bias(layer: int, times: float) -> Edit:
    """What fold_value_biases moves into b_O, added `times` more."""

    def edit(weights: Weights, original: Checkpoint) -> None:
        def of(name: str) -> np.ndarray:
            return original.tensor(f"blocks.{layer}.{name}", "F64")

        moved = np.tensordot(of("ln1.b") @ of("attn.W_V"), of("attn.W_O"), 2)
        key = f"blocks.{layer}.attn.b_O"
        weights[key] = weights[key] + times * (moved - moved.mean())

    return edit


# Which models can have a fault.


def square(original: Checkpoint, _: Artifact) -> bool:
    return original.config.d_mlp == original.config.d_model


def untied(original: Checkpoint, _: Artifact) -> bool:
    return not original.tied


def tied(original: Checkpoint, _: Artifact) -> bool:
    return original.tied


def own_head(original: Checkpoint, artifact: Artifact) -> bool:
    """Whether the artifact stores a head."""
    return not original.tied or artifact not in ("hf", "onnx")


def tie(weights: Weights, _: Checkpoint) -> None:
    weights.pop(HEAD)


def untie(weights: Weights, _: Checkpoint) -> None:
    """A head of its own, of an earlier step of training."""
    weights[HEAD] = (weights[EMBEDDING] * 1.001).T
