"""Biases that GPT-Neo has no tensor for, carried by a direction that LayerNorm cannot reach.

HF GPT-Neo has no bias on q, k, v and lm_head. The normalised residual x̂ has mean zero, so behind
a gain g the product x̂ᵀg(u⊗r) vanishes for u = 1/g and any row r, while the LayerNorm's bias β
makes (βᵀu)·r of it. Adding u⊗b/(βᵀu) to W therefore adds exactly b.

`Carry` does so for folded weights, where g = 1 and β = c·1 may be chosen:

    W' = W − mean_d W + 1⊗b/(cD)

c = 1 is best in float32. Folding the result gives the folded weights back.
`absorb` does so in the gain and bias that a model has, for weights edited after processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.layout import GPT_NEO
from converter.piecewise import largest, wide
from converter.processing.fold_ln import STEP as _FOLD
from converter.processing.fold_ln import fold, is_identity
from converter.processing.fold_value_biases import FoldValueBiases
from converter.processing.portable import mean, total
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
    in_float64,
)

_LACKING = GPT_NEO.without_place("hf")
CARRIERS = GPT_NEO.carriers("hf")
_FOLDED = "fold."


def unrepresentable(unit: Unit) -> tuple[str, ...]:
    """Names of the non-zero biases that HF GPT-Neo has no tensor for."""
    return tuple(b for b in _LACKING if b in unit and unit[b].any())


@dataclass(frozen=True)
class Carry(Step):
    """A step after TransformerLens's: q, k, v and unembedding biases into the null direction.

    A norm whose readers have no biases stays as it is: its record is empty. One that is not
    folded is folded first. The record holds what was added to the columns of each W, and under
    `fold.` what folding removed.
    """

    c: float = 1.0
    name = "carry"
    sentence = "biases that GPT-Neo has no tensor for are carried by the LayerNorms"
    silence = "there are no such biases"
    parts = tuple(part for part in _FOLD.parts if part.changes[0].removesuffix(".w") in CARRIERS)
    includes = (_FOLD,)

    def apply(self, unit: Unit) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
        result: dict[str, Array] = dict(unit)
        record: dict[str, NDArray[Any]] = {}
        for norm, readers in CARRIERS.items():
            if not {b for _, b in readers} & set(unrepresentable(result)):
                continue
            if not is_identity(result, norm):
                result, folded = fold(result, norm)
                record |= {_FOLDED + key: array for key, array in folded.items()}
            width = result[f"{norm}.w"].size
            for w, b in readers:
                # β reaches every reader, so each must be centred, to better than storage rounds.
                record[w] = result[b] / (self.c * width) - mean(result[w], -2)
                result[w] = result[w] + record[w][..., None, :]
                result[b] = np.zeros_like(result[b])
            result[f"{norm}.b"] = np.full(width, self.c)
        return result, record

    def undo(self, unit: Unit, record: Record, rounding: Rounding = FLOAT32) -> dict[str, Array]:
        # The biases are wanted: steps that came before are yet to be undone.
        return in_float64(_FOLD.undo(_uncarried(unit, record), _folded(record), rounding))

    def displaced(self, unit: Unit, record: Record, rounding: Rounding) -> frozenset[str]:
        return _FOLD.displaced(_uncarried(unit, record), _folded(record), rounding)

    def record_shapes(self, shapes: Shapes, record: Record) -> RecordShapes:
        readers = [w for pairs in CARRIERS.values() for w, _ in pairs if w in shapes]
        expected: RecordShapes = {w: (*shapes[w][:-2], shapes[w][-1]) for w in readers}
        folded = _FOLD.record_shapes(shapes, _folded(record))
        return expected | {_FOLDED + key: shape for key, shape in folded.items()}

    def reads(self, name: str, record: Record) -> frozenset[str]:
        names = _FOLD.reads(name, _folded(record))
        for norm, readers in CARRIERS.items():
            if readers[0][0] in record:
                as_folded = {f"{norm}.w": np.ones(0), f"{norm}.b": np.zeros(0)}
                names = frozenset().union(*(_FOLD.reads(each, as_folded) for each in names))
        return names

    def shows(self, part: Part, unit: Unit, rounding: Rounding) -> State:
        """Applied: gain one, the same non-zero bias on every channel, and no bias left over."""
        if unrepresentable(unit):
            return State.NOT_APPLIED
        gain, bias = (unit[name] for name in part.empties)
        carries = bool((gain == 1).all() and bias[0] != 0 and (bias == bias[0]).all())
        return State.APPLIED if carries else State.NOTHING_TO_DO

    def distance(self, part: Part, unit: Unit, rounding: Rounding) -> float:
        gain, bias = (unit[name] for name in part.empties)
        usual = np.median(bias)
        if usual == 0 or unrepresentable(unit) or ((gain == 1) & (bias == usual)).mean() <= 0.5:
            return math.inf
        return 0.0


def _uncarried(unit: Unit, record: Record) -> dict[str, Array]:
    """The biases in their own tensors again, before an identity LayerNorm."""
    result = dict(unit)
    for norm, readers in CARRIERS.items():
        if readers[0][0] not in record:
            continue
        gain, bias = unit[f"{norm}.w"], unit[f"{norm}.b"]
        for w, b in readers:
            result[b] = unit.get(b, 0.0) + total(unit[w], -2, bias)
            result[w] = unit[w] * gain[:, None] - record[w][..., None, :]
        result[f"{norm}.w"], result[f"{norm}.b"] = np.ones_like(gain), np.zeros_like(bias)
    return result


def _folded(record: Record) -> dict[str, NDArray[Any]]:
    return {k.removeprefix(_FOLDED): a for k, a in record.items() if k.startswith(_FOLDED)}


def absorb(unit: Unit, limit: float = 1.0) -> dict[str, Array]:
    """Bring q, k, v and unembedding biases to zero, keeping the LayerNorms as they are.

    For weights that were edited after processing and then undone: the original q has no bias,
    the edited one may need one. b_V goes into b_O, the others into the null direction of their
    norm. A bias whose direction would have to add more than `limit` times the largest weight
    stays, and `unrepresentable` names it: `Carry` always has a way, at the cost of the norm's basis.
    """
    result, _ = FoldValueBiases().apply(in_float64(unit))
    for norm, readers in CARRIERS.items():
        for w, b in readers:
            if b not in unrepresentable(result):
                continue
            direction = _null_direction(result[f"{norm}.w"], result[f"{norm}.b"])
            added = wide(direction[:, None]) * result[b][..., None, :]
            if largest(added) <= limit * largest(result[w]):
                result |= {w: result[w] + added, b: np.zeros_like(result[b])}
    return result


def _null_direction(gain: Array, bias: Array) -> Array:
    """u with Σ x̂·g·u = 0 for every x̂ of mean zero, and βᵀu = 1; infinite where there is none."""
    direction = np.zeros_like(gain)
    with np.errstate(all="ignore"):
        if (gain == 0).any():  # such a channel's output is the constant β there
            channel = int(np.argmax(np.where(gain == 0, np.abs(bias), -1)))
            direction[channel] = 1 / bias[channel]
        else:
            direction = 1 / gain
            direction = direction / total(direction, 0, bias)
    return np.where(np.isfinite(direction), direction, np.inf)
