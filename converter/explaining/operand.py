"""A weight on its way through steps, with the size that rounding errors have there.

Whatever arithmetic computed a tensor, its rounding error is a small multiple of u·magnitude,
where the magnitude is what remains of the formula when every sum is taken of absolute values
(running error analysis; see `Step.bounds`). For W' = g·W − mean(g·W) that is |W'| + 2·mean|g·W|.
So the tolerance of each element follows the arithmetic that made it, and gains over many decades
cost nothing. The magnitude is kept as |value| plus `floors`, which broadcast: no second array of
the weight's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from converter.dtypes import CODES
from converter.processing.step import Array, Part, Rounding, Step

_CHUNK = 2**20
"""Elements compared at a time."""


@dataclass(frozen=True, eq=False)
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
        return cls(value, (floor,), rounding, largest, finest, code)

    def magnitude(self, part: slice = slice(None)) -> Array:
        result: Array = np.abs(self.value[part])
        for floor in self.floors:
            result += floor[part] if floor.shape[0] == self.value.shape[0] else floor
        return result

    def total(self, axis: int | tuple[int, ...], weights: Array | None = None) -> Array:
        """The sum of magnitude · weights over axes, which stay; a slice of the first at a time."""
        w = np.ones(1) if weights is None else weights
        w = w.reshape((1,) * (self.value.ndim - w.ndim) + w.shape)
        pieces = [
            (self.magnitude(p) * (w[p] if len(w) == len(self.value) else w)).sum(
                axis, keepdims=True
            )
            for p in parts(self.value)
        ]
        over = axis if isinstance(axis, tuple) else (axis % self.value.ndim,)
        result: Array = np.sum(pieces, axis=0) if 0 in over else np.concatenate(pieces)
        return result


Operands = Mapping[str, Operand]
"""Of one unit, by `hooked` name without `blocks.{i}.`."""


def values(unit: Operands) -> dict[str, Array]:
    return {name: x.value for name, x in unit.items()}


def parts(array: Array) -> Iterator[slice]:
    """Slices along the first axis of about `_CHUNK` elements."""
    step = max(1, _CHUNK * array.shape[0] // max(1, array.size))
    for start in range(0, array.shape[0], step):
        yield slice(start, start + step)


def taken(unit: Operands, step: Step, part: Part) -> dict[str, Operand]:
    """The unit after a step on one of its parts."""
    own = {name: unit[name] for name in part.names if name in unit}
    done, _ = step.apply(values(own))
    bounds, result = step.bounds(part, own), dict(unit)
    for name in part.changes:
        if name in own:
            factor, added = bounds.get(name, (1.0, np.zeros((1,) * own[name].value.ndim)))
            floors = (*(factor * floor for floor in own[name].floors), np.asarray(added))
            result[name] = replace(own[name], value=done[name], floors=floors, moved=True)
    return result
