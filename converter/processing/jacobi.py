"""Singular values by Jacobi's rotations, with the same bits on every machine; see `portable`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from converter.processing.portable import Array, halved, matmul, power_of_two, qr

_RIGHT_ANGLE = 2.0**-49
"""Columns are at right angles whose product is no more than this part of their norms'."""
_SWEEPS = 60
"""Six or seven are usual."""


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """matrix [n, h, h] -> U [n, h, h], S [n, h] descending, Vᵀ [n, h, h], as NumPy's.

    U and V are orthonormal whatever the rank. By one-sided Jacobi rotations: columns are turned in
    pairs until all are at right angles, which makes them U·S; then V·S is matrixᵀ·U.
    """
    signs = np.zeros_like(matrix)
    own = np.arange(matrix.shape[1])
    basis, r = qr(_at_right_angles(matrix))
    signs[:, own, own] = np.copysign(1.0, r[:, own, own])
    u = basis.times(signs)
    basis, r = qr(matmul(matrix.swapaxes(1, 2), u))
    s = r[:, own, own]
    signs[:, own, own] = np.copysign(1.0, s)
    return u, np.abs(s), basis.times(signs).swapaxes(1, 2)


def _at_right_angles(matrix: Array) -> Array:
    """matrix·V [n, h, h] for the rotation V that makes its columns orthogonal, the longest first."""
    size = power_of_two(matrix, (1, 2))
    result, heads = np.empty_like(matrix), np.arange(len(matrix))
    work = (matrix / size).transpose(1, 2, 0)  # [row, column, head]
    for _ in range(_SWEEPS):
        norms = halved(work * work)
        order = np.argsort(-norms, axis=0, kind="stable")
        work = np.take_along_axis(work, order[None], 1)
        result[heads] = work.transpose(2, 0, 1)
        work, turned = _sweep(work, np.take_along_axis(norms, order, 0))
        work, heads = work[:, :, turned], heads[turned]
        if not heads.size:
            break
    return result * size


def _sweep(work: Array, norms: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Every pair of columns turned once, as neighbours that then change places (F. Luk and H. Park,
    1989); and of which heads any pair was turned. `norms` are squared [column, head]."""
    rows, h, n = work.shape
    # Even and odd columns, each with its squared norm and the factor it is still to be scaled by:
    # a rotation is then two products and two sums (W. Gentleman, 1973).
    columns = [np.ascontiguousarray(work[:, i::2]) for i in (0, 1)]
    norm, scale = [norms[0::2], norms[1::2]], [np.ones((len(norms[i::2]), n)) for i in (0, 1)]
    spare = [np.empty_like(side) for side in columns]
    products = np.empty((rows, h // 2, n))
    turned = np.zeros(n, np.bool_)
    for step in range(h):
        i, j = step % 2, 1 - step % 2
        pairs = (h - i) // 2
        here, there = slice(0, pairs), slice(i, i + pairs)
        x, y = columns[i][:, here], columns[j][:, there]
        a, b, p, q = norm[i][here], norm[j][there], scale[i][here], scale[j][there]
        product = halved(np.multiply(x, y, out=products[:, :pairs])) * (p * q)
        with np.errstate(all="ignore"):
            turn = np.abs(product) > _RIGHT_ANGLE * np.sqrt(np.maximum(a * b, 0))
            zeta = (b - a) / (2 * product)
            tangent = np.copysign(1.0, zeta) / (np.abs(zeta) + np.sqrt(1 + zeta * zeta))
            tangent = np.where(turn, tangent, 0)
        turned |= turn.any(0)
        cosine, moved = 1 / np.sqrt(1 + tangent * tangent), tangent * product
        new_x, new_y = spare[j][:, there], spare[i][:, here]
        np.multiply(y, tangent * (q / p), out=new_x)
        np.subtract(x, new_x, out=new_x)
        np.multiply(x, tangent * (p / q), out=new_y)
        np.add(y, new_y, out=new_y)
        spare[i][:, pairs:], spare[j][:, :i] = columns[i][:, pairs:], columns[j][:, :i]
        spare[j][:, i + pairs :] = columns[j][:, i + pairs :]
        norm[i][here], norm[j][there] = b + moved, a - moved
        scale[i][here], scale[j][there] = q * cosine, p * cosine
        columns, spare = spare, columns
    result = np.empty_like(work)
    for i in (0, 1):
        np.multiply(columns[i], scale[i], out=result[:, i::2])
    return result, turned
