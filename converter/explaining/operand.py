"""A weight on its way through steps, with the size that rounding errors have there.

Whatever arithmetic computed a tensor, its rounding error is a small multiple of u·magnitude,
where the magnitude is what remains of the formula when every sum is taken of absolute values
(running error analysis: Higham, "Accuracy and Stability of Numerical Algorithms", 3.3). For
W' = g·W − mean(g·W) that is |W'| + 2·mean|g·W|. So the tolerance of each element follows the
arithmetic that made it, and gains over many decades cost nothing. The magnitude is kept as
|value| plus `floors`, which broadcast: no second array of the weight's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

import ml_dtypes
import numpy as np

from converter.dtypes import CODES
from converter.processing.fold_ln import NORMS
from converter.processing.fold_ln import fold as fold_norm
from converter.processing.step import Array, Rounding

_CHUNK = 2**20
"""Elements compared at a time."""


class Way(Enum):
    """Between the two checkpoints, what became of a step on one tensor."""

    SAME = (False, False)
    APPLIED = (True, False)
    """The step takes the original's tensor to the converted one's."""
    UNDONE = (False, True)
    """The step takes the converted one's tensor to the original's."""
    BOTH = (True, True)
    """Only where both go through it do they agree: not the step, but the same function."""

    @property
    def left(self) -> bool:
        return self.value[0]

    @property
    def right(self) -> bool:
        return self.value[1]


NAMED = (Way.SAME, Way.APPLIED, Way.UNDONE)


@dataclass(frozen=True)
class Operand:
    """A float64 array in `hooked` axes, and where its rounding comes from."""

    value: Array
    floors: tuple[Array, ...]
    rounding: Rounding
    """Of the storage it was read from."""
    largest: float = math.inf
    """What that storage holds; beyond is infinite."""
    finest: float = 0.0
    """What that storage rounds by, below its smallest normal number."""
    code: str = "F32"
    """The dtype that the values have (safetensors code)."""
    hidden: bool = False
    """The values are those of a narrower dtype than the one they are stored in."""
    moved: bool = False
    """A step was carried out on it here."""
    unpacked: bool = False
    """Biases were taken out of the LayerNorm's null direction."""

    @classmethod
    def stored(cls, value: Array, code: str, declared: str) -> Operand:
        """`code`: the dtype that the values have, `declared` the one that the file says."""
        rounding = Rounding.of(code)
        # Below the smallest normal number rounding is absolute, not relative.
        floor = np.full((1,) * value.ndim, rounding.absolute / rounding.relative)
        largest = float(ml_dtypes.finfo(CODES[code]).max)
        finest = Rounding.of(declared).absolute
        return cls(value, (floor,), rounding, largest, finest, code, hidden=code != declared)

    def magnitude(self, part: slice = slice(None)) -> Array:
        result: Array = np.abs(self.value[part])
        for floor in self.floors:
            result += floor[part] if floor.shape[0] == self.value.shape[0] else floor
        return result


Operands = Mapping[str, Operand]
"""Of one unit, by `hooked` name without `blocks.{i}.`."""


def parts(array: Array) -> Iterator[slice]:
    """Slices along the first axis of about `_CHUNK` elements."""
    step = max(1, _CHUNK * array.shape[0] // max(1, array.size))
    for start in range(0, array.shape[0], step):
        yield slice(start, start + step)


def total(operand: Operand, axis: int, each: Callable[[Array, slice], Array]) -> Array:
    """Sum over an axis, kept, of `each(magnitude, slice)`; a slice of the first axis at a time."""
    pieces = [each(operand.magnitude(p), p).sum(axis, keepdims=True) for p in parts(operand.value)]
    first = axis % operand.value.ndim == 0
    result: Array = np.sum(pieces, axis=0) if first else np.concatenate(pieces)
    return result


def centre(x: Operand) -> Operand:
    """Minus the mean over the last axis."""
    mean = x.value.mean(-1, keepdims=True)
    size = total(x, -1, lambda m, _: m) / x.value.shape[-1]
    return replace(x, value=x.value - mean, floors=(*x.floors, 2 * size), moved=True)


def fold(unit: Operands, norm: str) -> dict[str, Operand]:
    """`fold_ln` on one LayerNorm and the weights of the unit that read it."""
    done, _ = fold_norm({name: x.value for name, x in unit.items()}, norm)
    gain, bias = (np.abs(unit[f"{norm}.{part}"].value)[:, None] for part in "wb")
    result = dict(unit)
    for name in (f"{norm}.w", f"{norm}.b"):
        result[name] = replace(unit[name], value=done[name], moved=True)
    for w, b in NORMS[norm]:
        if w not in unit:
            continue
        x, flat = unit[w], unit[w].value.ndim == 2  # flat: slices of the first axis cut d
        size = total(x, -2, lambda m, p: (gain[p] if flat else gain) * m)  # noqa: B023
        moved = total(x, -2, lambda m, p: (bias[p] if flat else bias) * m)[..., 0, :]  # noqa: B023
        floors = (*(gain * floor for floor in x.floors), 2 * size / len(gain))
        result[w] = replace(x, value=done[w], floors=floors, moved=True)
        floors = (*unit[b].floors, moved + np.abs(unit[b].value))
        result[b] = replace(unit[b], value=done[b], floors=floors, moved=True)
    return result


def move_values(b_v: Operand, w_o: Operand, b_o: Operand) -> tuple[Operand, Operand]:
    """`fold_value_biases`: b_O + Σ b_V·W_O, and zeros for b_V."""
    moved = np.tensordot(b_v.value, w_o.value, 2)
    size = np.tensordot(b_v.magnitude(), w_o.magnitude(), 2)
    zero = replace(b_v, value=np.zeros_like(b_v.value), moved=True)
    return zero, replace(b_o, value=b_o.value + moved, floors=(*b_o.floors, size), moved=True)
