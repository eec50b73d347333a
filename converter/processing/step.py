"""What a processing step is: weights in, weights and a record out, and the way back.

A *unit* holds the few tensors that are in memory at one time, in `hooked` axes and float64,
by their `hooked` name without `blocks.{i}.`: the embeddings, one block, or the unembedding.
Every step of TransformerLens stays within a unit. Nothing is cast here: the caller casts once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from converter.dtypes import CODES, cast
from converter.piecewise import along, wide

Array = NDArray[np.float64]
"""Or a matrix that is computed piece by piece, and stands for one (`converter.piecewise`)."""
Unit = Mapping[str, Array]
Record = Mapping[str, NDArray[Any]]
"""What a step took away: float64 arrays, and integer arrays that index them."""
Shapes = Mapping[str, tuple[int, ...]]
"""Of a unit's tensors, by name."""


@dataclass(frozen=True)
class IndexArray:
    """An array of integers that index another."""

    count: int
    below: int


RecordShapes = dict[str, tuple[int, ...] | IndexArray]


Bounds = Mapping[str, tuple[Array | float, Array | float]]


class Sized(Protocol):
    """A tensor, and a bound of the rounding errors of its elements: the magnitude, in roundings."""

    @property
    def value(self) -> Array: ...

    def magnitude(self) -> Array: ...

    def total(self, axis: int | tuple[int, ...], weights: Array | None = None) -> Array:
        """The sum of magnitude · weights over axes, which stay."""
        ...


class State(Enum):
    """What a unit's weights tell about one step."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    NOTHING_TO_DO = "nothing to do"
    """Applying the step would change nothing, so nothing shows whether it was applied."""


class Product(NamedTuple):
    """Two factors for each head, of which a step leaves left · rightᵀ as it is and nothing else."""

    name: str
    left: tuple[str, ...]
    """A weight [n, a, h], and its bias as a further row."""
    right: tuple[str, ...]
    """The same [n, b, h]; a weight that is stored [n, h, b] stands alone, and `turned` is set."""
    turned: bool = False
    idle: tuple[str, ...] = ()
    """Biases among them that no function depends on: of keys, as it adds the same to every score."""

    def factors(self, unit: Unit, without: Collection[str] = ()) -> tuple[Array, Array]:
        """left and right, the rows of biases below those of weights."""
        left, right = (
            [unit[name] for name in side if name not in without] for side in (self.left, self.right)
        )
        if self.turned:
            right = [right[0].swapaxes(1, 2)]
        return _stacked(left), _stacked(right)


def _stacked(weights: list[Array]) -> Array:
    rows = [w if w.ndim == 3 else w[:, None] for w in weights]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)


@dataclass(frozen=True)
class Part:
    """The tensors of a unit on which a step acts at once, whatever becomes of the others."""

    changes: tuple[str, ...]
    """Their names. A unit has the part if it has the first of them; it may lack others."""
    empties: tuple[str, ...] = ()
    """Those of them that become ones or zeros: what they did is done by the others."""
    reads: tuple[str, ...] = ()
    """Tensors that the step takes account of, and leaves as they are."""
    products: tuple[Product, ...] = ()
    """The part's *gauge*: of the weights here the step leaves these as they are. Without any, the
    step is a projection: units have one function, as far as it goes, if it makes them equal."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.changes + self.reads


@dataclass(frozen=True)
class Rounding:
    """How far storage may have moved a weight: |stored − true| <= relative·|true| + absolute."""

    relative: float
    absolute: float

    @classmethod
    def of(cls, code: str) -> Rounding:
        """Of a storage dtype, given by its safetensors code: rounding to nearest."""
        info = ml_dtypes.finfo(CODES[code])
        return cls(float(info.eps) / 2, float(info.smallest_subnormal) / 2)


FLOAT32 = Rounding.of("F32")
# TransformerLens sums in float32 whatever the storage dtype; a mean it took is off by this much.
_SUMS = 8 * FLOAT32.relative


class Step(ABC):
    """One step. `undo(*apply(unit))` is the unit, to float64 rounding; inputs are not changed.

    A step whose tensors a unit lacks leaves it as it is, and its record is empty.

    `undo` also takes weights that were *edited* after processing: it gives weights of the same
    function as the edited ones, in the original basis.

    Both are *portable* (`converter.processing.portable`): the same bits on every machine, so that
    digests mean something. An exact ledger stores the difference from what `undo` gives for a
    matrix: no later version may give other bits for the records of an earlier one.

    A step is a module of this package, with the name that `converter.choices.STEPS` lists; its
    instance is `STEP`.
    """

    name: str
    sentence: str
    """What it does, for people: "biases moved"."""
    silence: str
    """Why it changed nothing, where that is so: "the biases are zero already"."""
    parts: tuple[Part, ...]
    includes: tuple[Step, ...] = ()
    """Steps that it carries out as well."""
    decomposes = False
    """It takes singular vectors: in TransformerLens's float32, with errors of the whole's size."""

    @abstractmethod
    def apply(self, unit: Unit) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]: ...

    @abstractmethod
    def undo(
        self, unit: Unit, record: Record, rounding: Rounding = FLOAT32
    ) -> dict[str, Array]: ...

    def reads(self, name: str, record: Record) -> frozenset[str]:
        """The processed tensors from which `undo` makes the original tensor `name`."""
        return frozenset({name})

    def displaced(self, unit: Unit, record: Record, rounding: Rounding) -> frozenset[str]:
        """The tensors that `undo` gives other than the original ones because of an edit that their
        own values cannot express, though no edited tensor is among those that they are made from."""
        return frozenset()

    @abstractmethod
    def record_shapes(self, shapes: Shapes, record: Record) -> RecordShapes:
        """The shape of every array that a record may hold, for a unit of these shapes. Index arrays
        are as long as the record's own."""

    @abstractmethod
    def shows(self, part: Part, unit: Unit, rounding: Rounding) -> State:
        """Whether a part's weights are as the step leaves them: all of them, any doubt means no."""

    @abstractmethod
    def distance(self, part: Part, unit: Unit, rounding: Rounding) -> float:
        """How far most of a part is from what the step leaves, however few weights are far from it:
        0 where it was applied, infinite where it was not, whatever else happened. A ratio, to be
        compared with that of another unit. `unit` holds plain arrays."""

    def bounds(self, part: Part, unit: Mapping[str, Sized]) -> Bounds:
        """How rounding errors go through `apply`, by tensor: a factor for what there was, and what
        the step's own sums add. They are the formulas with every term's absolute value (N. Higham,
        "Accuracy and Stability of Numerical Algorithms", 3.3). Tensors left out keep theirs.

        Unless a step says better, what a tensor was is added to what it is."""
        return {n: (1.0, np.abs(unit[n].value)) for n in part.changes if n in unit}

    def parts_of(self, unit: Collection[str]) -> list[Part]:
        """The parts that a unit of these tensors has."""
        return [part for part in self.parts if part.changes[0] in unit]

    def touches(self, names: Collection[str]) -> bool:
        """Whether the step changes any of these tensors."""
        return any(name in names for part in self.parts for name in part.changes)

    def state(self, unit: Unit, rounding: Rounding) -> State | None:
        """What the weights tell; None where the step has no business with this unit."""
        return agreed([self.shows(part, unit, rounding) for part in self.parts_of(unit)])


def is_vector(name: str) -> bool:
    """Whether a tensor is small, a bias or of a LayerNorm; the others are matrices."""
    return name.rsplit(".", 1)[-1].startswith(("b", "w"))


def in_float64(unit: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
    """A unit for the steps: vectors at once, matrices piece by piece."""
    return {n: np.asarray(cast(a, "F64")) if is_vector(n) else wide(a) for n, a in unit.items()}


def centred(array: Array, axis: int, rounding: Rounding) -> bool:
    """Whether all means over `axis` are zero, but for what rounding to storage makes of zero."""

    def work(part: Array) -> bool:
        bound = (rounding.relative + _SUMS) * np.abs(part).mean(axis) + rounding.absolute
        return bool((np.abs(part.mean(axis)) <= bound).all())

    return all(done for _, done in along(array, axis, work))


def off_centre(array: Array, axis: int) -> float:
    """How large means over an axis are beside what they are means of: a typical one."""
    size = np.abs(array).mean(axis)
    ratio = np.divide(np.abs(array.mean(axis)), size, out=np.zeros_like(size), where=size > 0)
    return float(np.median(ratio))


def agreed(states: list[State]) -> State | None:
    """The state of a unit from those of its tensors: any doubt means `not applied`."""
    if not states:
        return None
    shown = [state for state in states if state is not State.NOTHING_TO_DO]
    if not shown:
        return State.NOTHING_TO_DO
    return State.APPLIED if set(shown) == {State.APPLIED} else State.NOT_APPLIED
