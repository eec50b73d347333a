"""Matrices that are computed a piece at a time, so that memory holds a piece and not the whole.

    wide(w) * gain[:, None] - means

computes nothing yet. A piece is computed when it is asked for: by indexing, or by the sums and
maxima that `portable` and this module take over all of it. Each asking computes again: for
arithmetic of a few operations an element that costs less than keeping the result.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from converter.dtypes import cast
from converter.parallel import ahead

Array = NDArray[Any]
Index = tuple[Any, ...]
"""One slice or array of integers for each axis."""
PIECE = 2**18
"""Elements computed at a time: in float64, 2 MiB."""
_LINE = 16
"""Where memory runs along the axis that is cut, this many elements share a line of the cache."""
_ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.negative, np.absolute}


class Piecewise(NDArrayOperatorsMixin):
    """Stands where an array stands: sums, products and quotients with it are piecewise too.

    `np.asarray` computes the whole. Piecewise arrays are read-only. What NumPy is asked for besides
    is a TypeError.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        compute: Callable[[Index], Array],
        grain: int = 1,
    ) -> None:
        """`compute` gives a part, in memory of its own. `grain`: so many rows are computed at once."""
        self.shape, self.dtype, self.grain = shape, dtype, grain
        self._compute = compute

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Array:
        """A part, computed. The index holds slices, and at most one array of integers."""
        given = index if isinstance(index, tuple) else (index,)
        whole = [slice(None)] * (self.ndim - sum(part is not Ellipsis for part in given))
        at = next((i for i, part in enumerate(given) if part is Ellipsis), len(given))
        return self._compute((*given[:at], *whole, *given[at + 1 :]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        result = np.empty(self.shape, self.dtype)

        def put(piece: Index) -> None:
            result[piece] = self[piece]

        deque(ahead(partial(put, piece) for piece in cut(self.shape, 0, self.grain)), 0)
        return result if dtype is None else result.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **unknown: Any) -> Any:
        if method != "__call__" or unknown or ufunc not in _ARITHMETIC:
            return NotImplemented
        shape = np.broadcast_shapes(*(np.shape(each) for each in inputs))

        def compute(index: Index) -> Array:
            parts = [_part(each, index, shape) for each in inputs]
            # What was computed for this piece alone may be overwritten.
            own = (isinstance(each, Piecewise) and each.shape == shape for each in inputs)
            out = next((part for part, is_own in zip(parts, own, strict=True) if is_own), None)
            with np.errstate(all="ignore"):
                result: Array = ufunc(*parts, out=out)
            return result

        return Piecewise(shape, np.dtype(np.float64), compute)

    def any(self) -> bool:
        """Whether any element is not zero."""
        return any(self[piece].any() for piece in cut(self.shape, 0, self.grain))


def _part(operand: Any, index: Index, shape: tuple[int, ...]) -> Any:
    """What an operand has where the result of this shape has `index`."""
    own = len(shape) - np.ndim(operand)
    if own == len(shape):
        return operand
    sizes = zip(operand.shape, shape[own:], index[own:], strict=True)
    return operand[tuple(part if size == full else slice(None) for size, full, part in sizes)]


def wide(array: Any) -> Any:
    """In float64, each piece in memory of its own."""
    if isinstance(array, Piecewise) and array.dtype == np.float64:
        return array

    def compute(index: Index) -> Array:
        with np.errstate(invalid="ignore"):  # signalling NaNs are quieted
            result: Array = array[index].astype(np.float64)
        return result

    return Piecewise(array.shape, np.dtype(np.float64), compute)


def in_blocks(
    shape: tuple[int, ...], dtype: np.dtype[Any], block: Callable[[int], Array], rows: int
) -> Any:
    """What can be had in whole blocks of `rows` alone, by their number. Where it is asked for along
    another axis, all of it is computed once, and kept."""
    lock = threading.Lock()
    kept: list[Array] = []

    def along_rows(index: Index) -> Array:
        start, stop, _ = index[0].indices(shape[0])
        first = start // rows
        blocks = [block(number) for number in range(first, -(-stop // rows))]
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        part: Array = joined[start - first * rows : stop - first * rows]
        return part

    def compute(index: Index) -> Array:
        slices = all(isinstance(part, slice) for part in index)
        if slices and all(part == slice(None) for part in index[1:]):
            return along_rows(index)
        with lock:  # done here alone: threads of the pool may be waiting for the lock
            if not kept:
                all_ = np.empty(shape, dtype)
                for number, start in enumerate(range(0, shape[0], rows)):
                    all_[start : start + rows] = block(number)
                kept.append(all_)
        return np.array(kept[0][index])

    return Piecewise(shape, dtype, compute, rows)


def deferred(shape: tuple[int, ...], work: Callable[[], Array]) -> Any:
    """What `work` gives, in float64, had once it is asked for."""
    once = cache(work)
    return Piecewise(shape, np.dtype(np.float64), lambda index: np.array(once()[index]))


def stored_as(array: Any, code: str) -> Any:
    """In a storage dtype, each element rounded once: `cast`, and for matrices piece by piece."""
    if not isinstance(array, Piecewise):
        return cast(array, code)
    like = cast(np.empty(0, array.dtype), code).dtype
    return Piecewise(array.shape, like, lambda index: cast(array[index], code), array.grain)


def with_rows(array: Any, rows: NDArray[np.integer[Any]], values: Array) -> Any:
    """`array` with other rows: `array[..., rows, :] = values`, which need not be in order."""
    if not isinstance(array, Piecewise):
        array = array.copy()
        array[..., rows, :] = values
        return array
    place = np.full(array.shape[-2], -1)
    place[rows] = np.arange(len(rows))

    def compute(index: Index) -> Array:
        result = array[index]
        new = place[index[-2]]
        here = np.flatnonzero(new >= 0)
        if here.size:
            chosen = (*index[:-2], slice(None), index[-1])
            result[..., here, :] = values[chosen][..., new[here], :]
        return result

    return Piecewise(array.shape, array.dtype, compute)


def cut(shape: tuple[int, ...], axis: int, least: int = 1) -> Iterator[Index]:
    """Indices of pieces along an axis, in order, of about PIECE elements, each but the last a
    multiple of `least` long."""
    length = shape[axis]
    rest = math.prod(shape) // max(1, length)
    step = -(-max(1, PIECE // max(1, rest)) // least) * least
    for start in range(0, length, step):
        index = [slice(None)] * len(shape)
        index[axis] = slice(start, start + step)
        yield tuple(index)


def along(array: Any, axis: int, work: Callable[[Array], Any]) -> Iterator[tuple[Index, Any]]:
    """`work` on pieces of a matrix that have the whole of an axis, and where each piece is."""
    others = [i for i in range(array.ndim) if i != axis % array.ndim]
    longest = max(others, key=lambda i: array.shape[i], default=None)
    pieces = [(slice(None),)] if longest is None else list(cut(array.shape, longest, _LINE))
    done = ahead(partial(lambda piece: work(array[piece]), piece) for piece in pieces)
    return zip(pieces, done, strict=True)


def largest(array: Any, axis: int | None = None) -> Any:
    """max |x| at each place of an axis [its length], or of all."""
    if axis is None:
        rows = largest(array, 0) if array.size else np.zeros(0)
        return rows.max(initial=0.0)
    pieces = cut(array.shape, axis % array.ndim, _LINE)
    each = ahead(partial(lambda piece: extent(array[piece], axis), piece) for piece in pieces)
    return np.concatenate([np.zeros(0), *each])


def extent(part: Array, axis: int) -> Array:
    """max |x| at each place of an axis, of what is in memory, without a copy of it."""
    others = tuple(i for i in range(part.ndim) if i != axis % part.ndim)
    result: Array = np.maximum(part.max(others), -part.min(others))
    return result


def whole(unit: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The unit, with those of these names computed that it has."""
    return dict(unit) | {name: np.asarray(unit[name]) for name in names if name in unit}
