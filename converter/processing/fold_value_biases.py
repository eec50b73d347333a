"""`fold_value_biases`: attention rows sum to one, so value biases reach the output unchanged.

    b_O ← b_O + Σ_{n,h} b_V W_O,    b_V ← 0

TransformerLens >= 3.5 centres b_O again afterwards where writing weights are centred. In exact
arithmetic that does nothing, since b_O and the rows of W_O are centred already; in its float32
it removes rounding. In float64 it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.processing.portable import total
from converter.processing.step import (
    FLOAT32,
    Array,
    Bounds,
    Part,
    Record,
    RecordShapes,
    Rounding,
    Shapes,
    Sized,
    State,
    Step,
    Unit,
)

B_V, W_O, B_O = "attn.b_V", "attn.W_O", "attn.b_O"


class FoldValueBiases(Step):
    """The record holds b_V; it is empty where b_V is zero."""

    name = "fold_value_biases"
    sentence = "value biases moved into the output bias"
    silence = "the value biases are zero, so folding them changes nothing"
    parts = (Part((B_V, B_O), empties=(B_V,), reads=(W_O,)),)

    def apply(self, unit: Unit) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
        if B_V not in unit or not unit[B_V].any():
            return dict(unit), {}
        moved = _moved(unit[B_V], unit[W_O])
        result = dict(unit) | {B_O: unit[B_O] + moved, B_V: np.zeros_like(unit[B_V])}
        return result, {B_V: unit[B_V]}

    def undo(self, unit: Unit, record: Record, rounding: Rounding = FLOAT32) -> dict[str, Array]:
        if B_V not in record:
            return dict(unit)
        moved = _moved(record[B_V], unit[W_O])
        return dict(unit) | {B_O: unit[B_O] - moved, B_V: unit[B_V] + record[B_V]}

    def bounds(self, part: Part, unit: Mapping[str, Sized]) -> Bounds:
        moved = unit[W_O].total((0, 1), unit[B_V].magnitude()[..., None])
        return {B_O: (1.0, moved[0, 0])}

    def reads(self, name: str, record: Record) -> frozenset[str]:
        return frozenset({B_O, W_O} if name == B_O and B_V in record else {name})

    def record_shapes(self, shapes: Shapes, record: Record) -> RecordShapes:
        return {B_V: shapes[B_V]} if B_V in shapes else {}

    def shows(self, part: Part, unit: Unit, rounding: Rounding) -> State:
        """Zero value biases are the rule in GPT-Neo, so they prove nothing."""
        return State.NOT_APPLIED if unit[B_V].any() else State.NOTHING_TO_DO

    def distance(self, part: Part, unit: Unit, rounding: Rounding) -> float:
        return float(np.count_nonzero(unit[B_V]) / unit[B_V].size)


STEP = FoldValueBiases()


def _moved(b_v: Array, w_o: Array) -> Array:
    """Σ b_V·W_O [d_model] of [n, h] and [n, h, d_model]."""
    return total(np.asarray(w_o).reshape(-1, w_o.shape[2]), 0, b_v.reshape(-1))
