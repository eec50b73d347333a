"""Subtracting means over the last axis: what two of the steps do, on different tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from converter.processing.portable import mean
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
    centred,
    off_centre,
)


class Centring(Step):
    """T ← T − mean(T) over the last axis, for each of `tensors`. The record holds the means."""

    tensors: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        cls.parts = tuple(Part((name,)) for name in cls.tensors)

    def apply(self, unit: Unit) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
        record = {name: mean(unit[name], -1) for name in self.tensors if name in unit}
        return dict(unit) | {n: unit[n] - means[..., None] for n, means in record.items()}, record

    def undo(self, unit: Unit, record: Record, rounding: Rounding = FLOAT32) -> dict[str, Array]:
        return dict(unit) | {n: unit[n] + means[..., None] for n, means in record.items()}

    def bounds(self, part: Part, unit: Mapping[str, Sized]) -> Bounds:
        (name,) = part.changes
        return {name: (1.0, 2 * unit[name].total(-1) / unit[name].value.shape[-1])}

    def record_shapes(self, shapes: Shapes, record: Record) -> RecordShapes:
        return {name: shapes[name][:-1] for name in self.tensors if name in shapes}

    def shows(self, part: Part, unit: Unit, rounding: Rounding) -> State:
        (name,) = part.changes
        if not unit[name].any():
            return State.NOTHING_TO_DO
        return State.APPLIED if centred(unit[name], -1, rounding) else State.NOT_APPLIED

    def distance(self, part: Part, unit: Unit, rounding: Rounding) -> float:
        return off_centre(unit[part.changes[0]], -1)
