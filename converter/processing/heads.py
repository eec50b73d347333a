"""Heads: two factors of each, decomposed, and what their columns are like."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from converter.processing.jacobi import svd
from converter.processing.portable import matmul, qr
from converter.processing.step import Array

DEAD = 1e-9
"""Singular values below this part of the largest are rank lost: what is made of them is rounding over zero."""
_AT_A_TIME = 2**20
"""Elements of a factor: heads that are decomposed together, so that they stay in cache."""


def ordered_matmul(left: Array, right: Array) -> Array:
    """left [n, a, k] · right [n, k, b], summed over k in order.

    BLAS sums in an order of its own on every machine; this gives the same bits on all of them.
    """
    result = np.empty((*left.shape[:2], right.shape[2]))
    for out, a, b in zip(result, left, right, strict=True):
        out[:] = 0
        term = np.empty_like(out)
        for k in range(a.shape[1]):
            np.multiply(a[:, k, None], b[k], out=term)
            out += term
    return result


def factor(left: Array, right: Array) -> tuple[Array, ...]:
    """left [n,a,h] · rightᵀ [n,h,b] = U S Vᵀ -> U, S, V, and the gauges XᵀT, ZᵀY."""
    count = min(len(left), -(-left.size // _AT_A_TIME))
    heads = zip(np.array_split(left, count), np.array_split(right, count), strict=True)
    # On matrices this small, BLAS threads wait for one another: 20 s for 0.04 s on a busy machine.
    with threadpool_limits(1, user_api="blas"):
        parts = [_factor_some(*some) for some in heads]
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


def _factor_some(left: Array, right: Array) -> tuple[Array, Array, Array, Array, Array]:
    a, t = qr(left)
    b, y = qr(right)
    x, s, zt = svd(matmul(t, y.swapaxes(1, 2)))
    z, xt = zt.swapaxes(1, 2), x.swapaxes(1, 2)
    return a.times(x), s, b.times(z), matmul(xt, t), matmul(zt, y)


def norms(columns: Array) -> Array:
    """Of the columns of each head [n, h]."""
    result: Array = np.linalg.norm(columns, axis=1)
    return result


def right_angles(
    columns: Array, slack: float, least: float, floor: float = 0.0
) -> NDArray[np.bool_]:
    """For each head [n, a, h] whether its columns are at right angles, those aside that are no
    longer than `floor`, or than `least` of the longest."""
    lengths = norms(columns)
    live = lengths > np.maximum(least * lengths.max(1, keepdims=True), floor)
    unit = np.divide(columns, lengths[:, None], out=np.zeros_like(columns), where=live[:, None])
    with threadpool_limits(1, user_api="blas"):
        cosines = np.abs(unit.swapaxes(1, 2) @ unit)
    own = np.arange(cosines.shape[1])
    cosines[:, own, own] = 0
    result: NDArray[np.bool_] = (cosines <= slack).all((1, 2))
    return result
