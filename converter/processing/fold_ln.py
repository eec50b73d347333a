"""`fold_ln`: the LayerNorm's gain and bias move into the weights that read it.

With x̂ the normalised residual, LN(x) = x̂·g + β. For every W [.., d, ..] that reads it:

    b ← b + βᵀW        (the unfolded W)
    W ← g·W            (rows over d)
    W ← W − mean_d W   (harmless: x̂ has mean zero)
    g ← 1, β ← 0

The way back is W = (W' + m)/g and b = b' − βᵀW, with m the subtracted means. Recomputing βᵀW,
rather than recording it, keeps the function of weights that were edited after processing.

Rows of a channel whose gain is zero, or so small that m buries g·W under the rounding of W',
cannot be had back from W'; the record keeps them whole. Nothing overflows for float32, float16
and bfloat16 sources, whose products float64 holds; a result that its storage dtype cannot hold
becomes infinite in the one cast at the end, and is the caller's to refuse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.processing.step import (
    FLOAT32,
    Array,
    Record,
    Rounding,
    State,
    Step,
    Unit,
    agreed,
    centred,
)

NORMS: dict[str, tuple[tuple[str, str], ...]] = {
    "ln1": (("attn.W_Q", "attn.b_Q"), ("attn.W_K", "attn.b_K"), ("attn.W_V", "attn.b_V")),
    "ln2": (("mlp.W_in", "mlp.b_in"),),
    "ln_final": (("unembed.W_U", "unembed.b_U"),),
}
"""Each LayerNorm with the weights that read it; in all of them d is the axis before the last."""

_WORST = 8.0
"""Undoing may magnify the rounding of W' by this much, relative to the row, before it is kept."""


def identity(unit: Unit, norm: str) -> bool:
    """Whether the LayerNorm has gain one and bias zero."""
    return bool((unit[f"{norm}.w"] == 1).all() and not unit[f"{norm}.b"].any())


def fold(unit: Unit, norm: str) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
    """Fold one LayerNorm. See the module's docstring."""
    gain, bias = unit[f"{norm}.w"], unit[f"{norm}.b"]
    result = dict(unit)
    record: dict[str, NDArray[Any]] = {f"{norm}.w": gain, f"{norm}.b": bias}
    for w, b in NORMS[norm]:
        if w not in unit:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            result[b] = unit.get(b, 0.0) + bias @ unit[w]
            folded = unit[w] * gain[:, None]
            mean = folded.mean(-2)
            folded -= mean[..., None, :]
        record[f"{w}.mean"] = mean
        lost = _lost(unit[w], folded, gain)
        if lost.size:
            record[f"{w}.rows"], record[f"{w}.kept"] = lost, unit[w][..., lost, :].copy()
        result[w] = folded
    result[f"{norm}.w"], result[f"{norm}.b"] = np.ones_like(gain), np.zeros_like(bias)
    return result, record


def _lost(w: Array, folded: Array, gain: Array) -> NDArray[np.int32]:
    """Channels whose rows cannot be undone: rounding of W' over |g| is large beside the row."""
    row = _row_max(w)
    with np.errstate(all="ignore"):
        scale = np.maximum(row, row.mean() / _WORST)  # a zero row may come back as rounding
        good = _row_max(folded) <= _WORST * np.abs(gain) * scale
    return np.flatnonzero(~good | (gain == 0)).astype(np.int32)


def _row_max(w: Array) -> Array:
    """max |w| for each channel d, without a copy of w."""
    others = (0, 2) if w.ndim == 3 else (1,)
    result: Array = np.maximum(w.max(others), -w.min(others))
    return result


class FoldLn(Step):
    name = "fold_ln"

    def apply(self, unit: Unit) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
        result: dict[str, Array] = dict(unit)
        record: dict[str, NDArray[Any]] = {}
        for norm in NORMS:
            if f"{norm}.w" in unit:
                result, kept = fold(result, norm)
                record |= kept
        return result, record

    def undo(self, unit: Unit, record: Record, rounding: Rounding = FLOAT32) -> dict[str, Array]:
        result = dict(unit)
        for norm, readers in NORMS.items():
            if f"{norm}.w" not in record:
                continue
            gain, bias = record[f"{norm}.w"], record[f"{norm}.b"]
            for w, b in readers:
                if w in unit:
                    result[w] = _unfolded(
                        unit[w] * unit[f"{norm}.w"][:, None], gain, record, w, rounding
                    )
                    with np.errstate(over="ignore", invalid="ignore"):
                        # The gain and bias that a user gave the folded LayerNorm, if any, count.
                        result[b] = unit[b] + unit[f"{norm}.b"] @ unit[w] - bias @ result[w]
            result[f"{norm}.w"], result[f"{norm}.b"] = gain, bias
        return result

    def reads(self, name: str, record: Record) -> frozenset[str]:
        for norm, readers in NORMS.items():
            if f"{norm}.w" not in record:
                continue
            for w, b in readers:
                if name == w:
                    return frozenset({w, f"{norm}.w"})
                if name == b:
                    return frozenset({w, b, f"{norm}.w", f"{norm}.b"})
            if name in (f"{norm}.w", f"{norm}.b"):
                return frozenset()
        return frozenset({name})

    def state(self, unit: Unit, rounding: Rounding) -> State | None:
        states = []
        for norm, readers in NORMS.items():
            if f"{norm}.w" not in unit:
                continue
            done = identity(unit, norm) and all(
                centred(unit[w], -2, rounding) for w, _ in readers if w in unit
            )
            states.append(State.APPLIED if done else State.NOT_APPLIED)
        return agreed(states)


def _unfolded(own: Array, gain: Array, record: Record, w: str, rounding: Rounding) -> Array:
    """(W' + m)/g with the kept rows put back; `own` is W', and is overwritten."""
    mean = record[f"{w}.mean"][..., None, :]
    rows = record.get(f"{w}.rows")
    with np.errstate(all="ignore"):
        if rows is None:
            own += mean
            own /= gain[:, None]
            return own
        kept, small = record[f"{w}.kept"], gain[rows][:, None]
        stored = own[..., rows, :]
        # An element of a small gain that its kept original does not explain was edited.
        noise = 2 * (rounding.relative * (np.abs(stored) + np.abs(mean)) + rounding.absolute)
        edited = (small != 0) & (np.abs(kept * small - mean - stored) > noise)
        own += mean
        own /= gain[:, None]
        own[..., rows, :] = np.where(edited, own[..., rows, :], kept)
    return own
