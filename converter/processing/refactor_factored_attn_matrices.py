"""`refactor_factored_attn_matrices`: each head's factors in the basis of their singular vectors.

With Q = [W_Q; b_Q] and K = [W_K; b_K] (bias as a further row) and QKᵀ = U S Vᵀ,
W_V W_O = U S Vᵀ:

    Q ← U√S,  K ← V√S;     W_V ← U S,  W_O ← Vᵀ,  with b_V folded into b_O first

Only the products are defined: signs, and rotations among equal singular values, are free.

The way back is an h×h matrix for each factor, the head's gauge. By QR, Q = A·T and K = B·Y with
A, B orthonormal, and TYᵀ = X S Zᵀ; so U = AX and

    Q = (U√S)·P,  P = S^(−1/2) Xᵀ T,    K = (V√S)·R,  R = S^(−1/2) Zᵀ Y,    PRᵀ = 1

and likewise for W_V and W_O. Where S has zeros (heads of rank below h), the part of Q that the
product never sees, Q − (U√S)P with P = 0 on those directions, is kept in the record. It is
orthogonal to R and to K's own such part, so adding it back changes no product. Where such a lost
direction was given a product of its own by an edit, its head comes back in another basis instead:
P and R are completed to h rows with PRᵀ = 1, and nothing is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from converter.errors import BadInput
from converter.piecewise import whole
from converter.processing.fold_value_biases import B_O, B_V, W_O
from converter.processing.fold_value_biases import STEP as _FOLD
from converter.processing.heads import (
    DEAD,
    factor,
    norms,
    ordered_matmul,
    right_angles,
)
from converter.processing.jacobi import svd
from converter.processing.portable import matmul, qr
from converter.processing.step import (
    FLOAT32,
    Array,
    IndexArray,
    Part,
    Product,
    Record,
    RecordShapes,
    Rounding,
    Shapes,
    State,
    Step,
    Unit,
)

W_Q, W_K, W_V, B_Q, B_K = "attn.W_Q", "attn.W_K", "attn.W_V", "attn.b_Q", "attn.b_K"
_FLOAT32_SVD = 1e-5
"""TransformerLens's is, and leaves its vectors so far from right angles."""
_NEGLIGIBLE = 1e-4
"""A singular vector with so small a part of the largest singular value is rounding's to choose."""
_FACTORS = (W_Q, W_K, W_V, W_O)
_NONE = np.zeros(0, np.int32)


_QK = Product("W_Q·W_Kᵀ", (W_Q, B_Q), (W_K, B_K), idle=(B_K,))
_OV = Product("W_V·W_O", (W_V, B_V), (W_O,), turned=True)


class _Pair(NamedTuple):
    """Two factors, and where heads of low rank are kept."""

    left: str
    right: str
    product: Product
    heads: str
    names: tuple[str, ...]
    """The tensors that a head's gauge concerns."""

    def right_of(self, gauge: Mapping[str, Array]) -> Array:
        """R for each head [n, h, h]. The record has W_O's transposed, as it is multiplied."""
        return gauge[self.right].swapaxes(1, 2) if self.right == W_O else gauge[self.right]


_PAIRS = (
    _Pair(W_Q, W_K, _QK, "qk.heads", (W_Q, B_Q, W_K, B_K)),
    _Pair(W_V, W_O, _OV, "ov.heads", (W_V, W_O)),
)


class RefactorFactoredAttnMatrices(Step):
    """The record holds the gauge of each factor [n, h, h], and b_V where it was folded."""

    name = "refactor_factored_attn_matrices"
    sentence = "each head's factors changed basis; W_Q·W_Kᵀ and W_V·W_O did not"
    silence = "the heads are in the basis of their singular vectors already"
    parts = (
        Part(
            (W_Q, B_Q, W_K, B_K, W_V, W_O, B_V, B_O),
            empties=(B_V,),
            products=(_QK, _OV),
        ),
    )
    includes = (_FOLD,)
    decomposes = True

    def apply(self, unit: Unit) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
        if W_Q not in unit:
            return dict(unit), {}
        unit = whole(unit, _FACTORS)
        for name in (W_Q, W_K, W_V, W_O, B_Q, B_K):
            if not np.isfinite(unit[name]).all():
                raise BadInput(
                    "NaN or infinity has no singular value decomposition.",
                    where=name,
                    do=f"Leave {self.name} out: --process default does.",
                )
        result, folded = _FOLD.apply(unit)
        record: dict[str, NDArray[Any]] = dict(folded)

        q, k = _QK.factors(unit)
        u, s, v, p, r = factor(q, k)
        live, root = _live(s), np.sqrt(s)[:, None]
        inverse = np.divide(1, root[:, 0], out=np.zeros_like(s), where=live)[..., None]
        new_q, new_k, p, r = u * root, v * root, inverse * p, inverse * r
        result |= {W_Q: new_q[:, :-1], B_Q: new_q[:, -1], W_K: new_k[:, :-1], B_K: new_k[:, -1]}
        record |= {W_Q: p, W_K: r}
        poor = np.flatnonzero(~live.all(1)).astype(np.int32)
        if poor.size:
            rest_q, rest_k = _rest(q, new_q, p, poor), _rest(k, new_k, r, poor)
            record["qk.heads"] = poor
            record |= {f"{W_Q}.kept": rest_q[:, :-1], f"{B_Q}.kept": rest_q[:, -1]}
            record |= {f"{W_K}.kept": rest_k[:, :-1], f"{B_K}.kept": rest_k[:, -1]}

        u, s, v, p, r = factor(unit[W_V], unit[W_O].swapaxes(1, 2))
        live = _live(s)
        new_v, new_o = u * s[:, None], np.ascontiguousarray(v.swapaxes(1, 2))
        p = np.divide(1, s, out=np.zeros_like(s), where=live)[..., None] * p
        back = (r * live[..., None]).swapaxes(1, 2)
        result |= {W_V: new_v, W_O: new_o}
        record |= {W_V: p, W_O: np.ascontiguousarray(back)}
        poor = np.flatnonzero(~live.all(1)).astype(np.int32)
        if poor.size:
            record["ov.heads"] = poor
            record[f"{W_V}.kept"] = _rest(unit[W_V], new_v, p, poor)
            record[f"{W_O}.kept"] = _rest(unit[W_O], back, new_o, poor)
        return result, record

    def undo(self, unit: Unit, record: Record, rounding: Rounding = FLOAT32) -> dict[str, Array]:
        if W_Q not in record:
            return dict(unit)
        unit = whole(unit, _FACTORS)
        result, gauge = dict(unit), {name: record[name] for name in _FACTORS}
        kept = {}
        for pair in _PAIRS:
            heads = record.get(pair.heads, _NONE)
            revived = _revived(unit, record, pair)
            kept[pair] = ~np.isin(heads, revived)
            for head in revived:
                completed = _completed(gauge[pair.left][head], pair.right_of(gauge)[head])
                gauge = _replaced(gauge, pair, head, *completed)
        for name in (W_Q, W_K, W_V):
            result[name] = ordered_matmul(unit[name], gauge[name])
        for name, of in ((B_Q, W_Q), (B_K, W_K)):
            result[name] = ordered_matmul(unit[name][:, None], gauge[of])[:, 0]
        # A value bias that was given after processing is a row of W_V, too.
        result[B_V] = ordered_matmul(unit[B_V][:, None], gauge[W_V])[:, 0]
        result[W_O] = ordered_matmul(gauge[W_O], unit[W_O])
        for pair, still in kept.items():
            for name in pair.names if still.any() else ():
                result[name][record[pair.heads][still]] += record[f"{name}.kept"][still]
        return _FOLD.undo(result, record, rounding)

    def displaced(self, unit: Unit, record: Record, rounding: Rounding) -> frozenset[str]:
        names: set[str] = set()
        unit = whole(unit, _FACTORS)
        for pair in _PAIRS if W_Q in record else ():
            if _revived(unit, record, pair).size:
                names |= {*pair.names, *((B_V, B_O) if W_V in pair.names else ())}
        return frozenset(names)

    def record_shapes(self, shapes: Shapes, record: Record) -> RecordShapes:
        if W_Q not in shapes:
            return {}
        n, _, h = shapes[W_Q]
        expected = _FOLD.record_shapes(shapes, record)
        expected |= dict.fromkeys(_FACTORS, (n, h, h))
        for pair in _PAIRS:
            count = np.size(record.get(pair.heads, ()))
            expected[pair.heads] = IndexArray(count, n)
            expected |= {f"{name}.kept": (count, *shapes[name][1:]) for name in pair.names}
        return expected

    def reads(self, name: str, record: Record) -> frozenset[str]:
        return _FOLD.reads(name, record)

    def shows(self, part: Part, unit: Unit, rounding: Rounding) -> State:
        unit = whole(unit, _FACTORS)
        if not any(unit[name].any() for name in _FACTORS):
            return State.NOTHING_TO_DO
        slack = 4 * rounding.relative + _FLOAT32_SVD
        (q, k), (_, o) = _QK.factors(unit), _OV.factors(unit)
        q_norm, k_norm, o_norm = norms(q), norms(k), norms(o)
        done = (
            not unit[B_V].any()
            and bool((np.abs(q_norm - k_norm) <= slack * (q_norm + rounding.absolute)).all())
            and bool((np.abs(o_norm - 1) <= slack).all())
            and all(
                right_angles(
                    m, slack, DEAD**0.5, rounding.absolute * m.shape[1] ** 0.5 / slack
                ).all()
                for m in (q, k, unit[W_V], o)
            )
        )
        return State.APPLIED if done else State.NOT_APPLIED

    def distance(self, part: Part, unit: Unit, rounding: Rounding) -> float:
        """0 where two of three signs are there in most heads, so that one edited weight hides
        nothing: of queries and keys, of values, of the output. 1 where the output alone shows it,
        as in heads whose LayerNorm was folded afterwards."""
        slack = 4 * rounding.relative + _FLOAT32_SVD
        (q, k), (_, o) = _QK.factors(unit), _OV.factors(unit)
        lengths = norms(q)
        even = (np.abs(lengths - norms(k)).max(1) <= slack * lengths.max(1)) & lengths.any(1)
        units = np.abs(norms(o) - 1).max(1) <= slack
        square = [right_angles(m, slack, _NEGLIGIBLE) for m in (q, k, unit[W_V], o)]
        signs = even & square[0] & square[1], square[2] & unit[W_V].any((1, 2)), units & square[3]
        seen = [bool(sign.mean() > 0.5) for sign in signs]
        return 0.0 if sum(seen) >= 2 else 1.0 if seen[2] else math.inf


STEP = RefactorFactoredAttnMatrices()


def _revived(unit: Unit, record: Record, pair: _Pair) -> NDArray[np.int32]:
    """Heads of low rank to whose lost directions an edit has given a product."""
    heads = record.get(pair.heads, _NONE)
    if not heads.size:
        return _NONE
    live = record[pair.left][heads].any(2)
    with np.errstate(over="ignore", invalid="ignore"):
        left, right = pair.product.factors(unit)
        product = norms(left[heads]) * norms(right[heads])
        lost = np.where(live, 0, product).max(1)
        # What was lost had at most DEAD of the largest product; storage rounds that a little.
        edited: NDArray[np.int32] = heads[lost > 2 * DEAD * np.where(live, product, 0).max(1)]
        return edited


def _completed(p: Array, r: Array) -> tuple[Array, Array]:
    """P and R [h, h] of one head, whose rows of lost directions are zero, with PRᵀ = 1."""
    lost = np.logical_not(p.any(1))
    # Rows at right angles to all of R's, and to all of P's; then made dual to one another.
    a, b = _others(r, lost), _others(p, lost)
    x, s, zt = svd(matmul(b, a.swapaxes(1, 2)))
    dual = matmul(matmul(zt.swapaxes(1, 2) / s[:, None], x.swapaxes(1, 2)), b)
    p, r = p.copy(), r.copy()
    p[lost], r[lost] = a[0], dual[0]
    return p, r


def _others(rows: Array, lost: NDArray[np.bool_]) -> Array:
    """An orthonormal basis [1, lost, h] of what is at right angles to the rows that are not lost."""
    count = int(lost.sum())
    columns = np.concatenate([rows[~lost], np.zeros((count, rows.shape[1]))]).T
    basis, _ = qr(columns[None])
    found: Array = basis.times(np.eye(len(columns))[None, :, len(columns) - count :])
    return found.swapaxes(1, 2)


def _rest(whole: Array, left: Array, right: Array, heads: NDArray[np.int32]) -> Array:
    """What left · right leaves of these heads."""
    result: Array = whole[heads] - matmul(left[heads], right[heads])
    return result


def _replaced(
    gauge: dict[str, Array], pair: _Pair, head: int, p: Array, r: Array
) -> dict[str, Array]:
    left, right = gauge[pair.left].copy(), gauge[pair.right].copy()
    left[head], right[head] = p, r.T if pair.right == W_O else r
    return gauge | {pair.left: left, pair.right: right}


def _live(s: Array) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = (s > DEAD * s[:, :1]) & (s > 0)
    return result
