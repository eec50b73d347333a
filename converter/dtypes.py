"""Storage dtypes: safetensors codes, numpy dtypes and names, and the one cast between them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import partial

import ml_dtypes
import numpy as np

from converter.parallel import ahead

CODES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""safetensors dtype codes that a weight may have."""
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CHUNK_BYTES = 2 * 2**20
_COLUMNS = 512
"""Copied at a time where memory does not run along a row, so that lines of it stay in cache."""


def code_of(array: np.ndarray) -> str:
    return next(code for code, dtype in CODES.items() if dtype == array.dtype)


def code_named(name: str) -> str:
    """`"float16"` -> `"F16"`. KeyError for other names."""
    return {v: k for k, v in NAMES.items()}[name]


def code_stated(name: object) -> str | None:
    """`"half"` -> `"F16"`: a dtype by any of torch's names; None for what is none of ours."""
    plain = {"half": "float16", "float": "float32", "double": "float64"}.get(str(name), name)
    return {v: k for k, v in NAMES.items()}.get(str(plain))


def holding(codes: Iterable[str]) -> str:
    """The narrowest dtype that holds whatever these hold."""
    found = set(codes)
    return found.pop() if len(found) == 1 else "F64" if "F64" in found else "F32"


def nbytes(shape: tuple[int, ...], code: str) -> int:
    """Bytes that a tensor takes in storage."""
    return math.prod(shape) * CODES[code].itemsize


def cast(array: np.ndarray, code: str) -> np.ndarray:
    """The array in another dtype, each element rounded once, to nearest, ties to even."""
    target = CODES[code]
    if array.dtype == target:
        return array
    with np.errstate(over="ignore", invalid="ignore"):  # signalling NaNs are quieted
        if code == "BF16" and array.dtype == np.float64:
            array = _float32_rounded_to_odd(array)
        return array.astype(target)


def _float32_rounded_to_odd(array: np.ndarray) -> np.ndarray:
    """float64 -> float32, inexact results given an odd last bit.

    ml_dtypes rounds float64 to bfloat16 by way of float32: twice. Rounding to odd first
    makes the second rounding see on which side of a tie the value was
    (Boldo & Melquiond, "When double rounding is odd", 2005).
    """
    nearest = array.astype(np.float32)
    inexact = (nearest.astype(np.float64) != array) & np.isfinite(nearest)
    even = (nearest.view(np.uint32) & 1) == 0
    toward = np.where(array > nearest, np.float32(np.inf), np.float32(-np.inf))
    return np.where(inexact & even, np.nextafter(nearest, toward), nearest)


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bit patterns as unsigned integers: NaN payloads and signed zeros compare."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Bitwise equality of two arrays, whatever their strides; a chunk at a time."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    rows = max(_rows(a), _rows(b))
    both = zip(chunks(a, rows), chunks(b, rows), strict=True)
    return all(np.array_equal(bits(x), bits(y)) for x, y in both)


def sha256(array: np.ndarray) -> str:
    """Digest of the array's bytes in C order."""
    digest = hashlib.sha256()
    for chunk in chunks(array):
        digest.update(chunk.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def chunks(array: np.ndarray, rows: int | None = None) -> Iterator[np.ndarray]:
    """Slices along the first axis, contiguous, in order, of `rows`, or some 2 MiB."""
    if array.ndim == 0:
        yield np.ascontiguousarray(array)
        return
    rows = rows or _rows(array)
    parts = (slice(start, start + rows) for start in range(0, array.shape[0], rows))
    if isinstance(array, np.ndarray) and array.flags.c_contiguous:
        yield from (array[part] for part in parts)
    else:
        yield from ahead(partial(lambda part: contiguous(array[part]), part) for part in parts)


def _rows(array: np.ndarray) -> int:
    """How many make a chunk: one at least."""
    if array.ndim == 0:
        return 1
    grain: int = getattr(array, "grain", 1)  # of a Piecewise
    row = max(1, array.nbytes // max(1, array.shape[0]))
    step: int = -(-max(1, _CHUNK_BYTES // row) // grain) * grain
    return step


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order: itself, or a copy."""
    if array.flags.c_contiguous or array.ndim < 2:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[-1], _COLUMNS):
        part = (..., slice(start, start + _COLUMNS))
        result[part] = array[part]
    return result
