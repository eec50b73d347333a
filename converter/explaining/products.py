"""Products in which the basis of a head cancels.

`refactor_factored_attn_matrices` puts each head in a basis of its own choice. What it keeps is
P = L·Rᵀ, with L = [W_Q; b_Q], R = [W_K; b_K] or L = W_V, R = W_Oᵀ. Two factorisations are
compared without forming P (d × d): Δ = P − P' = [L, −L']·[R, R']ᵀ, and with the QR factorisation
[R, R'] = Q·T the norms of Δ's rows are those of [L, −L']·Tᵀ; likewise its columns. An edited
row of W_Q is an edited row of Δ, one of W_K a column.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from converter.explaining.compare import COARSE, Comparer, Match, roundings
from converter.explaining.operand import Operand, Operands, values
from converter.processing.step import FLOAT32, Array, Product

_STORAGE = 2.0
"""Rounding both factors moves a row by less than one `row + spread` of its storage's roundings
(0.8 at most was measured, on models of 4 to 768 dimensions)."""
_NOISE = 8.0
"""TransformerLens's decompositions in float32 move a row by at most 2.1 of float32's roundings
of `row + |L||R|` (measured with LayerNorm gains over one to ten decades)."""
LISTED = 8
"""So many rows, neurons, heads are named one by one."""


class Factor(NamedTuple):
    """One side of a product: [n, a, h], and its magnitude."""

    value: Array
    magnitude: Array


def compare_product(
    product: Product, a: Operands, b: Operands, compare: Comparer, *, function: bool = False
) -> dict[str, Match]:
    """What is left of L·Rᵀ, by tensor: of L's rows, of R's columns. With `function`, rows that no
    function depends on are left out, and their biases from the answer."""
    without = product.idle if function else ()
    left, right, sides = *(_factors(product, x, without) for x in (a, b)), _sides(product, a, b)
    matches = _compared(left, right, sides, compare, product.name)
    found: dict[str, Match] = {}
    for match, names in zip(matches, (product.left, product.right), strict=True):
        weight, *bias = (name for name in names if name not in without)
        shares = split_bias(match, a[weight].value.shape[0]) if bias else (match,)
        found |= dict(zip((weight, *bias), shares, strict=True))
    return found


def _factors(product: Product, unit: Operands, without: tuple[str, ...]) -> tuple[Factor, Factor]:
    names = [n for n in (*product.left, *product.right) if n not in without]
    magnitudes = {name: unit[name].magnitude() for name in names}
    pairs = zip(
        product.factors(values(unit), without), product.factors(magnitudes, without), strict=True
    )
    left, right = (Factor(*pair) for pair in pairs)
    return left, right


def _sides(product: Product, a: Operands, b: Operands) -> tuple[Operand, Operand]:
    """A weight of each side, moved if either factor was."""
    left, right = product.left[0], product.right[0]
    one, two = (replace(x[left], moved=x[left].moved or x[right].moved) for x in (a, b))
    return one, two


def _compared(
    left: tuple[Factor, Factor],
    right: tuple[Factor, Factor],
    sides: tuple[Operand, Operand],
    compare: Comparer,
    name: str,
) -> tuple[Match, Match]:
    (one, r), (one2, r2) = left, right
    tall, wide = np.concatenate([one.value, -one2.value], 2), np.concatenate([r.value, r2.value], 2)
    size = float((_row_norms(one2.value, r2.value) ** 2).sum())

    def judged(weights: tuple[float, float]) -> list[Match]:
        result = []
        for norms, flip in ((_row_norms(tall, wide), 1), (_row_norms(wide, tall), -1)):
            bound = sum(
                _bound(factors[::flip], weight * side.rounding.relative)
                for factors, weight, side in zip((left, right), weights, sides, strict=True)
            )
            result.append(_match(norms, ~(norms <= bound), size, one.value.shape[2], name))
        return result

    matches = judged(roundings(*sides))
    if (compare.coarse or (not compare.frozen and min(m.share for m in matches) > 0.5)) and not all(
        m.agrees for m in matches
    ):
        looser = judged((COARSE, COARSE))
        matches = looser if all(m.agrees for m in looser) else matches
    if all(m.failing for m in matches):
        return _attributed(matches, (one.value, one2.value), (r.value, r2.value))
    return matches[0], matches[1]


def _row_norms(left: Array, right: Array) -> Array:
    """Norms of the rows of left·rightᵀ, for each head."""
    triangle: Array = np.linalg.qr(right, mode="r")  # type: ignore[assignment]
    result: Array = np.linalg.norm(left @ triangle.swapaxes(1, 2), axis=2)
    return result


def _bound(factors: tuple[Factor, ...], storage: float) -> Array:
    """How far rounding may move each row of L·Rᵀ, in norm."""
    sizes, others = (f.magnitude for f in factors)
    row = np.linalg.norm(sizes * np.linalg.norm(others, axis=1, keepdims=True), axis=2)
    spread = np.linalg.norm(row, axis=1, keepdims=True) / np.sqrt(row.shape[1])
    # A singular value decomposition in float32 leaves any row an error of the whole's size.
    norms = np.linalg.norm(sizes, axis=(1, 2)) * np.linalg.norm(others, axis=(1, 2))
    result: Array = _STORAGE * storage * (row + spread)
    result += _NOISE * FLOAT32.relative * (row + norms[:, None])
    return result


def _match(norms: Array, bad: NDArray[np.bool_], size: float, h: int, name: str) -> Match:
    energy, left = norms**2, norms**2 * bad
    return Match(
        cells=norms.size,
        failing=int(bad.sum()),
        residual=float(np.sqrt(energy.sum() / size)) if size else float(energy.any()),
        energy=float(energy.sum()),
        scale=size,
        others=np.repeat(left.sum(1), h),
        channels=left.sum(0),
        product=name,
    )


def strongest(energy: Array) -> NDArray[np.intp]:
    """The fewest indices that hold 99 % of the energy, the most first."""
    order = np.argsort(-energy, kind="stable")
    held = np.cumsum(energy[order])
    count = int(np.searchsorted(held, 0.99 * held[-1])) + 1 if held.size and held[-1] else 0
    return order[:count]


def _attributed(
    matches: list[Match], left: tuple[Array, Array], right: tuple[Array, Array]
) -> tuple[Match, Match]:
    """The factor that differs, where the difference shows which, and the other one without fault."""
    rows, columns = matches
    narrow = [strongest(m.channels).size <= min(LISTED, m.channels.size // 4) for m in matches]
    outside = [0.0, 0.0] if any(narrow) else [_outside(*left), _outside(*right)]
    if narrow == [True, False] or outside[0] > 10 * outside[1]:
        return rows, _faultless(columns)
    if narrow == [False, True] or outside[1] > 10 * outside[0]:
        return _faultless(rows), columns
    return rows, columns


def _outside(before: Array, after: Array) -> float:
    """How far the columns of a factor have left the space that they spanned."""
    basis = np.linalg.qr(before)[0]
    rest = after - basis @ (basis.swapaxes(1, 2) @ after)
    return float(np.linalg.norm(rest) / max(float(np.linalg.norm(after)), 1e-300))


def _faultless(match: Match) -> Match:
    return replace(
        match, failing=0, others=np.zeros_like(match.others), channels=np.zeros_like(match.channels)
    )


def split_bias(match: Match, n_heads: int) -> tuple[Match, Match]:
    """What concerns the weight, and what its bias, the last row."""
    bias = float(match.channels[-1])
    weight_failing = min(match.failing, match.cells - n_heads) if match.channels[:-1].any() else 0
    return (
        replace(match, cells=match.cells - n_heads, failing=weight_failing, channels=match.channels[:-1]),
        replace(match, cells=n_heads, failing=n_heads if bias else 0, channels=np.zeros(0)),
    )  # fmt: skip
