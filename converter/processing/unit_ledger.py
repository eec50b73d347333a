"""What is kept of one unit so that its processing can be undone: arrays, and what they are.

The JSON beside the arrays is input like any other: it is parsed once, here, into types, and the
arrays are checked against them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from converter.dtypes import CODES
from converter.errors import CorruptFile
from converter.processing.carry import Carry
from converter.processing.step import IndexArray, Rounding, Shapes, Step
from converter.processing.steps import BY_NAME
from converter.strict_json import Json

How = Literal["same", "zero", "original", "residue", "basis"]
_STEPS: dict[str, Step] = {**BY_NAME, Carry.name: Carry()}


@dataclass(frozen=True)
class Kept:
    """How an original tensor is kept."""

    how: How
    """same: the processed one is it. zero: all zeros. original: outright. residue: the difference
    from what undoing gives. basis: what undoing gives."""
    code: str
    """safetensors dtype code."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Applied:
    """A step that was applied, and which arrays of its record are originals kept outright."""

    step: Step
    from_original: tuple[str, ...]


@dataclass(frozen=True)
class UnitLedger:
    """A unit's ledger. `prefix` begins the name of every array, and is the unit's in the layout."""

    prefix: str
    tensors: Mapping[str, Kept]
    steps: tuple[Applied, ...]
    rounding: Rounding
    """Of the processed tensors' storage."""
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)

    def to_json(self) -> Json:
        return {
            "tensors": {
                name: {"kept": kept.how, "dtype": kept.code, "shape": list(kept.shape)}
                for name, kept in self.tensors.items()
            },
            "steps": [
                {"name": applied.step.name, "from_original": list(applied.from_original)}
                for applied in self.steps
            ],
            "rounding": {
                "relative": self.rounding.relative,
                "absolute": self.rounding.absolute,
            },
        }

    @staticmethod
    def of_json(document: Any, prefix: str, arrays: Mapping[str, NDArray[Any]]) -> UnitLedger:
        """
        Raises:
            CorruptFile: the JSON is not a unit's ledger, or the arrays are not as it says.
        """
        given = expect(document, dict, f"unit {prefix!r}")
        return UnitLedger(
            prefix=prefix,
            tensors={
                name: _kept(tensor, f"{prefix}{name}")
                for name, tensor in expect(given.get("tensors"), dict, f"{prefix} tensors").items()
            },
            steps=tuple(
                _applied(step, prefix)
                for step in expect(given.get("steps"), list, f"{prefix} steps")
            ),
            rounding=_rounding(given.get("rounding"), prefix),
            arrays=arrays,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the original tensors that the ledger knows."""
        return {name: kept.shape for name, kept in self.tensors.items()}

    def original(self, name: str) -> NDArray[Any]:
        """An original tensor that is here as it was, or is all zeros.

        Raises:
            CorruptFile: it is missing, or not as recorded.
        """
        kept = self.tensors.get(name)
        if kept is None:
            raise corrupt_ledger(f"{self.prefix}{name}", "it is named and not described")
        if kept.how == "zero":
            return np.zeros(kept.shape, CODES[kept.code])
        key = f"{self.prefix}original.{name}"
        if key not in self.arrays:
            raise corrupt_ledger(key, "it is missing")
        array = self.arrays[key]
        if array.shape != kept.shape or array.dtype != CODES[kept.code]:
            raise corrupt_ledger(key, f"it is {array.dtype} {list(array.shape)}, not as recorded")
        return array

    def records(self, shapes: Shapes) -> list[dict[str, NDArray[Any]]]:
        """The steps' records, in the order of the steps: float64, and integer indices.

        Args:
            shapes: of all tensors of the unit, by name.

        Raises:
            CorruptFile: an array is missing, or of another shape than the step's record has.
        """
        return [self._record(applied, shapes) for applied in self.steps]

    def _record(self, applied: Applied, shapes: Shapes) -> dict[str, NDArray[Any]]:
        start = f"{self.prefix}{applied.step.name}."
        record = {k.removeprefix(start): a for k, a in self.arrays.items() if k.startswith(start)}
        record |= {key: self.original(tensor_of(key)) for key in applied.from_original}
        expected = applied.step.record_shapes(shapes, record)
        return {
            key: _as_expected(array, expected.get(key), f"{start}{key}")
            for key, array in record.items()
        }


def tensor_of(key: str) -> str:
    """The tensor whose original a record's array may be."""
    return key.removeprefix("fold.")


WITHOUT = (
    "Put back the ledger that was written with these weights. Or do without: with no"
    " ledger.safetensors there, the function comes back in the processed basis."
)
"""What to do about a ledger that is no use, whichever command reads it."""


def corrupt_ledger(where: str, why: str) -> CorruptFile:
    return CorruptFile(
        f"The ledger does not fit itself: {why}.",
        where=where,
        do=WITHOUT,
    )


def expect(value: Any, kind: type, where: str) -> Any:
    """The value, if it is of this JSON type.

    Raises:
        CorruptFile: it is not.
    """
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise corrupt_ledger(where, f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _kept(document: Any, where: str) -> Kept:
    given = expect(document, dict, where)
    how, code, shape = given.get("kept"), given.get("dtype"), given.get("shape")
    if how not in get_args(How) or code not in list(CODES):
        raise corrupt_ledger(where, f"it is kept as {how!r}, in dtype {code!r}")
    sizes = tuple(expect(size, int, where) for size in expect(shape, list, where))
    if min(sizes, default=1) < 1:
        raise corrupt_ledger(where, f"its shape is {list(sizes)[:8]}")
    return Kept(how, code, sizes)


def _applied(document: Any, prefix: str) -> Applied:
    given = expect(document, dict, f"{prefix} step")
    name = expect(given.get("name"), str, f"{prefix} step")
    if name not in _STEPS:
        raise corrupt_ledger(f"{prefix}{name[:80]}", "it names a step that does not exist")
    keys = expect(given.get("from_original"), list, f"{prefix}{name}")
    return Applied(_STEPS[name], tuple(expect(key, str, f"{prefix}{name}") for key in keys))


def _rounding(document: Any, prefix: str) -> Rounding:
    given = expect(document, dict, f"{prefix} rounding")
    numbers = [given.get("relative"), given.get("absolute")]
    if not all(isinstance(x, float) and math.isfinite(x) and x >= 0 for x in numbers):
        raise corrupt_ledger(f"{prefix} rounding", f"it is {str(numbers)[:80]}")
    return Rounding(*numbers)


def _as_expected(
    array: NDArray[Any], expected: tuple[int, ...] | IndexArray | None, where: str
) -> NDArray[Any]:
    if expected is None:
        raise corrupt_ledger(where, "a record has no such array")
    if isinstance(expected, IndexArray):
        fits = array.ndim == 1 and array.size == expected.count and array.dtype.kind == "i"
        if not fits or not ((array >= 0) & (array < expected.below)).all():
            raise corrupt_ledger(
                where, f"it is no list of {expected.count} indices below {expected.below}"
            )
        return array
    # The first ledgers had a vector's mean with one axis more than none.
    if expected == () and array.shape == (1,):
        array = array.reshape(())
    if array.shape != expected or array.dtype not in CODES.values():
        found = f"{array.dtype} {list(array.shape)}"
        raise corrupt_ledger(where, f"it is {found}, where a record has {list(expected)}")
    return array.astype(np.float64)
