"""`fold_ln`: the LayerNorm's gain and bias move into the weights that read it.

With x̂ the normalised residual, LN(x) = x̂·g + β. For every W [.., d, ..] that reads it:

    b ← b + βᵀW        (the unfolded W)
    W ← g·W            (rows over d)
    W ← W − mean_d W   (harmless: x̂ has mean zero)
    g ← 1, β ← 0

The way back is W = (W' + m)/g and b = b' − βᵀW, with m the subtracted means. Recomputing βᵀW,
rather than recording it, keeps the function of weights that were edited after processing.

Rows of a channel whose gain is zero, or so small that m buries g·W under the rounding of W',
cannot be had back from W'; the record keeps them whole. An edit of such a row needs a gain to
act through: the channel's gain becomes 1, and the function is that of the edited weights, though
no longer in the original norm. Nothing overflows for float32, float16
and bfloat16 sources, whose products float64 holds; a result that its storage dtype cannot hold
becomes infinite in the one cast at the end, and is the caller's to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.layout import GPT_NEO
from converter.piecewise import along, deferred, extent, largest, wide, with_rows
from converter.processing.portable import halved, mean, total
from converter.processing.step import (
    FLOAT32,
    Array,
    Bounds,
    IndexArray,
    Part,
    Record,
    RecordShapes,
    Rounding,
    Shapes,
    Sized,
    State,
    Step,
    Unit,
    centred,
    off_centre,
)

_WORST = 8.0
"""Undoing may magnify the rounding of W' by this much, relative to the row, before it is kept."""
_AT_A_TIME = 64
"""Channels."""
_REACH = 16.0
"""An edited row may come back this many times as large as the other weights, by its small gain."""


def is_identity(unit: Unit, norm: str) -> bool:
    """Whether the LayerNorm has gain one and bias zero."""
    return bool((unit[f"{norm}.w"] == 1).all() and not unit[f"{norm}.b"].any())


def fold(unit: Unit, norm: str) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
    """Fold one LayerNorm. See the module's docstring."""
    gain, bias = unit[f"{norm}.w"], unit[f"{norm}.b"]
    result = dict(unit)
    record: dict[str, NDArray[Any]] = {f"{norm}.w": gain, f"{norm}.b": bias}
    for w, b in GPT_NEO.norms[norm]:
        if w not in unit:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            moved, means, rows = _sums(unit[w], bias, gain)
            means /= gain.size
            result[b] = unit.get(b, 0.0) + moved
            folded = unit[w] * gain[:, None] - means[..., None, :]
        record[f"{w}.mean"] = means
        lost = _lost(folded, rows, means, gain)
        if lost.size:
            record[f"{w}.rows"], record[f"{w}.kept"] = lost, unit[w][..., lost, :].copy()
        result[w] = folded
    result[f"{norm}.w"], result[f"{norm}.b"] = np.ones_like(gain), np.zeros_like(bias)
    return result, record


def _sums(w: Array, bias: Array, gain: Array) -> tuple[Array, Array, Array]:
    """βᵀW, gᵀW, and max |W| for each channel d, reading W once."""
    down = (-1, *[1] * (w.ndim - 1))

    def work(part: Array) -> tuple[Array, Array, Array]:
        front = np.moveaxis(part, -2, 0)
        with np.errstate(all="ignore"):
            by_bias, by_gain = (halved(front * v.reshape(down)) for v in (bias, gain))
        return by_bias, by_gain, extent(part, -2)

    moved, means = (np.empty((*w.shape[:-2], w.shape[-1])) for _ in range(2))
    rows = np.zeros(gain.size)
    for place, (some_moved, some_means, here) in along(wide(w), -2, work):
        across = (*place[:-2], place[-1])
        moved[across], means[across] = some_moved, some_means
        rows = np.maximum(rows, here)
    return moved, means, rows


def _lost(folded: Array, rows: Array, means: Array, gain: Array) -> NDArray[np.int32]:
    """Channels whose rows cannot be undone: rounding of W' over |g| is large beside the row.
    `rows` is max |W| for each."""
    with np.errstate(all="ignore"):
        scale = np.maximum(rows, mean(rows, 0) / _WORST)  # a zero row may come back as rounding
        limit = _WORST * np.abs(gain) * scale
        # Mostly it takes no look at W': none of its elements can be so large.
        doubtful = np.flatnonzero(~(rows * np.abs(gain) + np.abs(means).max() < 0.999 * limit))
        good = np.ones(gain.shape, np.bool_)
        for start in range(0, doubtful.size, _AT_A_TIME):
            some = doubtful[start : start + _AT_A_TIME]
            good[some] = largest(folded[..., some, :], -2) <= limit[some]
    return np.flatnonzero(~good | (gain == 0)).astype(np.int32)


class FoldLn(Step):
    name = "fold_ln"
    sentence = "the LayerNorms' gains and biases moved into the weights that read them"
    silence = "every LayerNorm has gain one and bias zero already"
    parts = tuple(
        Part((f"{norm}.w", f"{norm}.b", *sum(readers, ())), empties=(f"{norm}.w", f"{norm}.b"))
        for norm, readers in GPT_NEO.norms.items()
    )

    def apply(self, unit: Unit) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
        result: dict[str, Array] = dict(unit)
        record: dict[str, NDArray[Any]] = {}
        for norm in GPT_NEO.norms:
            if f"{norm}.w" in unit:
                result, kept = fold(result, norm)
                record |= kept
        return result, record

    def undo(self, unit: Unit, record: Record, rounding: Rounding = FLOAT32) -> dict[str, Array]:
        result = dict(unit)
        for norm, readers in GPT_NEO.norms.items():
            if f"{norm}.w" not in record:
                continue
            gain, bias = _gain(unit, record, norm, rounding), record[f"{norm}.b"]
            for w, b in readers:
                if w in unit:
                    own = _unfolded(unit, record, norm, w, gain, rounding)
                    moved = partial(_unmoved, unit[b], unit[w], unit[f"{norm}.b"], own, bias)
                    result[w], result[b] = own, deferred(unit[b].shape, moved)
            result[f"{norm}.w"], result[f"{norm}.b"] = gain, bias
        return result

    def bounds(self, part: Part, unit: Mapping[str, Sized]) -> Bounds:
        gain, bias = (np.abs(unit[name].value)[:, None] for name in part.empties)
        result: dict[str, tuple[Array | float, Array | float]] = {}
        for w, b in GPT_NEO.norms[part.changes[0].removesuffix(".w")]:
            if w in unit:
                result[w] = gain, 2 * unit[w].total(-2, gain) / len(gain)
                result[b] = 1.0, unit[w].total(-2, bias)[..., 0, :] + np.abs(unit[b].value)
        return result

    def displaced(self, unit: Unit, record: Record, rounding: Rounding) -> frozenset[str]:
        names: set[str] = set()
        for norm, readers in GPT_NEO.norms.items():
            if f"{norm}.w" in record:
                gain = _gain(unit, record, norm, rounding)
                if not np.array_equal(gain, record[f"{norm}.w"], equal_nan=True):
                    names |= {f"{norm}.w", *(name for pair in readers for name in pair)}
        return frozenset(names)

    def reads(self, name: str, record: Record) -> frozenset[str]:
        for norm, readers in GPT_NEO.norms.items():
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

    def record_shapes(self, shapes: Shapes, record: Record) -> RecordShapes:
        expected: RecordShapes = {}
        for norm, readers in GPT_NEO.norms.items():
            if f"{norm}.w" not in shapes:
                continue
            expected |= {f"{norm}.{part}": shapes[f"{norm}.{part}"] for part in "wb"}
            for w, _ in readers:
                if w not in shapes:
                    continue
                *heads, rows, columns = shapes[w]
                expected[f"{w}.mean"] = (*heads, columns)
                count = np.size(record.get(f"{w}.rows", ()))
                expected[f"{w}.rows"] = IndexArray(count, rows)
                expected[f"{w}.kept"] = (*heads, count, columns)
        return expected

    def shows(self, part: Part, unit: Unit, rounding: Rounding) -> State:
        norm = part.changes[0].removesuffix(".w")
        done = is_identity(unit, norm) and all(
            centred(unit[w], -2, rounding) for w, _ in GPT_NEO.norms[norm] if w in unit
        )
        return State.APPLIED if done else State.NOT_APPLIED

    def distance(self, part: Part, unit: Unit, rounding: Rounding) -> float:
        gain, bias = part.empties
        if ((unit[gain] == 1) & (unit[bias] == 0)).mean() <= 0.5:
            return math.inf
        readers = GPT_NEO.norms[gain.removesuffix(".w")]
        return max(off_centre(unit[w], -2) for w, _ in readers if w in unit)


STEP = FoldLn()


def _unmoved(b: Array, folded: Array, given: Array, own: Array, bias: Array) -> Array:
    """b' + β'ᵀW' − βᵀW: the gain and bias that a user gave the folded LayerNorm, if any, count."""
    with np.errstate(over="ignore", invalid="ignore"):
        result: Array = b + (total(folded, -2, given) if given.any() else 0.0)
        return result - total(own, -2, bias)


def _gain(unit: Unit, record: Record, norm: str, rounding: Rounding) -> Array:
    """The original gain, or where a kept row was edited beyond its reach, 1."""
    gain: Array = record[f"{norm}.w"]
    for w, _ in GPT_NEO.norms[norm]:
        rows = record.get(f"{w}.rows")
        if w not in unit or rows is None:
            continue
        product, edited = _kept_rows(unit, record, norm, w, rounding)
        if not edited.any():
            continue
        with np.errstate(all="ignore"):
            usual = max(largest(record[f"{w}.kept"]), _ordinary(unit[w], rows))
            new = largest(np.where(edited, product, 0), -2)
            beyond = new > _REACH * usual * np.abs(gain[rows])
        if beyond.any():
            gain = gain.copy()
            gain[rows[beyond]] = 1.0
    return gain


def _ordinary(folded: Array, rows: NDArray[np.int32]) -> float:
    """The largest element of the rows that were not kept; 0 where all were."""
    others = np.delete(largest(folded, -2), rows)
    return float(others.max(initial=0.0))


def _kept_rows(
    unit: Unit, record: Record, norm: str, w: str, rounding: Rounding
) -> tuple[Array, NDArray[np.bool_]]:
    """g·W in the rows that the record keeps, as the stored W' has them, and which elements
    storage's rounding does not explain, so that they were edited."""
    rows, mean = record[f"{w}.rows"], record[f"{w}.mean"][..., None, :]
    kept, small = record[f"{w}.kept"], record[f"{norm}.w"][rows][:, None]
    with np.errstate(all="ignore"):
        stored = unit[w][..., rows, :] * unit[f"{norm}.w"][rows][:, None]
        noise = 2 * (rounding.relative * (np.abs(stored) + np.abs(mean)) + rounding.absolute)
        edited = np.abs(kept * small - mean - stored) > noise
        return np.where(edited, stored + mean, kept * small), edited


def _unfolded(
    unit: Unit, record: Record, norm: str, w: str, gain: Array, rounding: Rounding
) -> Array:
    """(W' + m)/g with the kept rows put back."""
    with np.errstate(all="ignore"):
        given = unit[f"{norm}.w"]
        own: Array = unit[w] if (given == 1).all() else unit[w] * given[:, None]
        own = (own + record[f"{w}.mean"][..., None, :]) / gain[:, None]
        rows = record.get(f"{w}.rows")
        if rows is not None:
            product, edited = _kept_rows(unit, record, norm, w, rounding)
            old = gain[rows] == record[f"{norm}.w"][rows]
            kept = record[f"{w}.kept"]
            back = np.where(edited | ~old[:, None], product / gain[rows][:, None], kept)
            own = with_rows(own, rows, back)
    return own
