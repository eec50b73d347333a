"""A step that TransformerLens has not: positions lose their mean, which every token takes up.

    W_E ← W_E + mean_pos W_pos,    W_pos ← W_pos − mean_pos W_pos

What enters the residual stream, a token and a position, stays the same. This file is all that
`test_sixth_step` adds to the package.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from converter.processing.portable import mean
from converter.processing.step import (
    FLOAT32,
    Array,
    Part,
    Record,
    RecordShapes,
    Rounding,
    Shapes,
    State,
    Step,
    Unit,
    centred,
    off_centre,
)

W_E, W_POS = "embed.W_E", "pos_embed.W_pos"


class CenterPositions(Step):
    name = "center_positions"
    sentence = "the mean of all positions moved into the tokens"
    silence = "the positions have no mean"
    parts = (Part((W_POS, W_E)),)

    def apply(self, unit: Unit) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
        if W_POS not in unit:
            return dict(unit), {}
        moved = mean(unit[W_POS], 0)
        result = dict(unit) | {W_E: unit[W_E] + moved, W_POS: unit[W_POS] - moved}
        return result, {"moved": moved}

    def undo(self, unit: Unit, record: Record, rounding: Rounding = FLOAT32) -> dict[str, Array]:
        if "moved" not in record:
            return dict(unit)
        moved = record["moved"]
        return dict(unit) | {W_E: unit[W_E] - moved, W_POS: unit[W_POS] + moved}

    def record_shapes(self, shapes: Shapes, record: Record) -> RecordShapes:
        return {"moved": shapes[W_POS][1:]} if W_POS in shapes else {}

    def shows(self, part: Part, unit: Unit, rounding: Rounding) -> State:
        return State.APPLIED if centred(unit[W_POS], 0, rounding) else State.NOT_APPLIED

    def distance(self, part: Part, unit: Unit, rounding: Rounding) -> float:
        return off_centre(unit[W_POS], 0)


STEP = CenterPositions()
