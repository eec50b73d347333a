"""Sums, products and QR in float64 whose bits are the same on every machine.

BLAS, LAPACK and NumPy's reductions choose the order of their sums, and whether to fuse a product
into them, by the processor, the number of threads and the layout in memory. Here there are only
elementwise operations that IEEE 754 rounds correctly (+, -, ·, /, √), sums in a fixed order, and
in `matmul` sums that are exact in any order. Heads do not meet: each is computed by itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from converter.piecewise import along, wide

Array = NDArray[np.float64]
_NEAR = 2.0**-10
"""How far columns may be from orthonormal for one more Cholesky factorisation to make them so."""


def total(array: Array, axis: int, weights: Array | None = None) -> Array:
    """The sum over an axis, of `array` times `weights` [the axis's length] where given.

    The second half is added to the first until one is left, whatever the layout in memory.
    """
    axis %= array.ndim
    result = np.zeros(array.shape[:axis] + array.shape[axis + 1 :])

    def work(part: Array) -> Array:
        front = np.moveaxis(part, axis, 0)
        with np.errstate(all="ignore"):
            if weights is not None:
                front *= weights.reshape(-1, *[1] * result.ndim)
            return halved(front)

    for place, part in along(wide(array), axis, work) if array.size else ():
        result[place[:axis] + place[axis + 1 :]] = part
    return result


def mean(array: Array, axis: int) -> Array:
    """The mean over an axis."""
    result: Array = total(array, axis) / array.shape[axis]
    return result


def halved(block: Array) -> Array:
    """The sum over the first axis, in the order of `total`. `block` is overwritten."""
    size = len(block)
    while size > 1:
        half = (size + 1) // 2
        block[: size - half] += block[half:size]
        size = half
    result: Array = block[0]
    return result


def matmul(left: Array, right: Array) -> Array:
    """left [n, a, k] · right [n, k, b]: as accurate as float64 is, and no sum is rounded.

    Each row of `left` and each column of `right` is cut into slices of so few bits that sums of
    products of them are exact: BLAS may add these up as it likes (K. Ozaki et al., "Error-free
    transformations of matrix multiplication", 2012).
    """
    a_size, b_size = power_of_two(left, 2), power_of_two(right, 1)
    result = _product(_slices(left / a_size, left.shape[2]), right / b_size)
    result *= a_size
    result *= b_size
    return result


def _product(across: Array, right: Array) -> Array:
    """The matrix [n, a, k] of these slices [n, a, 3·k], times `right` [n, k, b] of elements below
    one."""
    k = right.shape[1]
    down = _slices(right.swapaxes(1, 2), k, order=(2, 1, 0)).swapaxes(1, 2)
    result: Array = across @ down  # the least first: slices i of one, and 2 - i of the other
    result += across[:, :, : 2 * k] @ down[:, k:]
    result += across[:, :, :k] @ down[:, 2 * k :]
    return result


def _gram(slices: Array, count: int) -> Array:
    """xᵀx [n, h, h] of the x [n, d, h] of these slices [n, d, 3·h]; `count` of them are used."""
    h = slices.shape[2] // 3
    products = slices[:, :, :h].swapaxes(1, 2) @ slices[:, :, : count * h]
    result = np.zeros((len(slices), h, h))
    if count == 3:
        second = slices[:, :, h : 2 * h]
        result += products[:, :, 2 * h :]
        result += result.swapaxes(1, 2).copy()
        result += second.swapaxes(1, 2) @ second
    large = products[:, :, h : 2 * h]
    result += large + large.swapaxes(1, 2)
    result += products[:, :, :h]
    return result


def _slices(x: Array, summed: int, order: tuple[int, ...] = (0, 1, 2)) -> Array:
    """x [n, a, k] of elements below two, in slices [n, a, 3·k].

    With b bits a slice, the first is a multiple of 2^-b and the next ones each of 2^-b times that.
    Sums of 3·`summed` products of two are then below 2^53 of their unit.
    """
    n, a, k = x.shape
    bits = (53 - math.ceil(math.log2(3 * summed))) // 2
    result, rest = np.empty((n, a, 3, k)), x.copy(order="K")
    for i, place in enumerate(order, 1):
        rounder = 1.5 * 2.0 ** (52 - i * bits)  # adding it leaves no bits below 2^(-i·bits)
        part = result[:, :, place]
        np.add(rest, rounder, out=part)
        part -= rounder
        if i < len(order):
            rest -= part
    return result.reshape(n, a, 3 * k)


def power_of_two(x: Array, axis: int | tuple[int, ...]) -> Array:
    """The one above the largest element along `axis`, kept."""
    largest = np.maximum(x.max(axis, keepdims=True), -x.min(axis, keepdims=True))
    result: Array = np.ldexp(1.0, np.clip(np.frexp(largest)[1], -1000, 1000))
    return result


class Basis(NamedTuple):
    """Orthonormal columns [n, d, h]: a matrix that is nearly so, in slices, times a correction."""

    slices: Array
    correction: Array

    def times(self, x: Array) -> Array:
        """These columns times x [n, h, b] of elements below one."""
        return _product(self.slices, matmul(self.correction, x))


def qr(matrix: Array) -> tuple[Basis, Array]:
    """matrix [n, d, h] with d >= h -> orthonormal columns, R [n, h, h] upper.

    They are orthonormal whatever the rank. By Cholesky factorisation of the Gram matrix, twice
    (Y. Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", 2015); heads too
    close to dependent for that, by Householder's reflections.
    """
    _, d, h = matrix.shape
    size = power_of_two(matrix, 1)
    scaled = matrix / size
    slices = _slices(scaled, d)
    rough, good = _cholesky(_gram(slices, 2))
    # Of few bits, so that it makes a cheap product; how good it is, is measured.
    inverse = _inverse(rough)
    inverse_size = power_of_two(inverse, 1)
    first = np.ascontiguousarray(_slices(inverse / inverse_size, d)[:, :, :h])
    near = slices[:, :, 2 * h :] @ first
    near += slices[:, :, h : 2 * h] @ first
    near += slices[:, :, :h] @ first
    near *= inverse_size
    slices = _slices(near, d)
    gram = _gram(slices, 3)
    with np.errstate(invalid="ignore"):
        good &= (np.abs(gram - np.eye(h)) <= _NEAR).all((1, 2))
    gram[~good] = np.eye(h)
    second, _ = _cholesky(gram)
    r, correction = matmul(second, _inverse(first * inverse_size)), _inverse(second)
    for head in np.flatnonzero(~good):
        basis, r[head] = _householder(scaled[head])
        slices[head] = _slices(basis[None], d)[0]
    return Basis(slices, correction), r * size


def _cholesky(gram: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Upper R [n, h, h] with RᵀR = gram, and which heads are positive definite enough; of the
    others R is invertible, and no more."""
    result, good = np.zeros_like(gram), np.ones(len(gram), np.bool_)
    rest = gram.copy()
    diagonal = np.diagonal(gram, axis1=1, axis2=2)
    for k in range(gram.shape[1]):
        fine = rest[:, k, k] > _NEAR**4 * diagonal[:, k]
        good &= fine
        rest[~fine, k, k:] = 0
        root = np.sqrt(np.where(fine, rest[:, k, k], 1))
        result[:, k, k:] = rest[:, k, k:] / root[:, None]
        result[:, k, k] = root
        row = result[:, k, k + 1 :]
        rest[:, k + 1 :, k + 1 :] -= row[:, :, None] * row[:, None, :]
    return result, good


def _inverse(upper: Array) -> Array:
    """The inverse of an upper triangular matrix [n, h, h]."""
    h = upper.shape[1]
    result = np.zeros_like(upper)
    result[:, np.arange(h), np.arange(h)] = 1
    for k in range(h - 1, -1, -1):
        row = result[:, k, k:]
        row /= upper[:, k, k, None]
        result[:, :k, k:] -= upper[:, :k, k, None] * row[:, None]
    return result


def _householder(matrix: Array) -> tuple[Array, Array]:
    """matrix [d, h] -> Q [d, h] with orthonormal columns, R [h, h]: slow, and never at a loss."""
    d, h = matrix.shape
    rest, q = matrix.T.copy(), np.eye(h, d)
    reflections = np.zeros((h, d))
    for k in range(h):
        x, v = rest[k, k:], reflections[k, k:]
        largest = np.abs(x).max()
        if largest == 0:
            continue  # in the span of those before
        v[:] = x / power_of_two(x, 0)
        norm = np.sqrt(total(v * v, 0))
        v[0] += np.copysign(norm, v[0])
        v /= np.sqrt(norm * np.abs(v[0]))  # |v|² = 2·norm·|v[0]|, so this makes it √2 long
        _reflect(rest[k:, k:], v)
        rest[k, k + 1 :] = 0
    for k in range(h - 1, -1, -1):
        _reflect(q[k:, k:], reflections[k, k:])
    return q.T, rest[:, :h].T


def _reflect(rows: Array, v: Array) -> None:
    """rows ← rows·(1 − vvᵀ)."""
    rows -= total(rows, 1, v)[:, None] * v
