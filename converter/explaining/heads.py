"""Attention, where four of the steps meet."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as pairs_of
from typing import NamedTuple

import numpy as np

from converter.explaining.compare import NOISE, Comparer, Match
from converter.explaining.found import (
    Found,
    Mark,
    Matches,
    centring_order,
    has_no_means,
    mark,
    search,
)
from converter.explaining.groups import (
    centred_by,
    fold_mark,
    fold_ways,
    folded_by,
    judge,
    norm_matches,
    odd,
)
from converter.explaining.operand import NAMED, Operand, Operands, Way, move_values
from converter.explaining.products import Factor, compare_products, split_bias
from converter.explaining.singular import in_singular_basis
from converter.explaining.unit import Pair
from converter.processing.step import FLOAT32

W_Q, W_K, W_V, W_O = "attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O"
B_Q, B_K, B_V, B_O = "attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O"
CENTRE, VALUES, REFACTOR = (
    "center_writing_weights",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


class Output(NamedTuple):
    """How W_O, b_O and b_V came about."""

    rotated: bool
    """W_V and W_O agree as a product only."""
    w_o: Way
    values: Way
    any_values: bool
    """Rounding is so coarse here that other ways would agree, too."""
    b_o: Way


def attention(pair: Pair, compare: Comparer) -> dict[str, Found]:
    """LayerNorm 1, queries, keys, values and the output, of one block."""

    def scores(way: Way) -> Matches:
        left, right = folded_by(way, pair, "ln1")
        norm = norm_matches(left, right, "ln1", compare)
        return norm | _queries_and_keys(left, right, pair, compare)

    fold_way, matches, says = search(fold_ways(pair, "ln1"), scores)
    left, right = folded_by(fold_way, pair, "ln1")
    output, more, output_says = _output(left, right, pair, fold_way, compare)
    found = {name: Found(match) for name, match in (matches | more).items()}
    rotated = matches[W_Q].product is not None or output.rotated
    for name in ("ln1.w", "ln1.b", W_Q, B_Q, W_K, B_K, W_V, B_V):
        found[name].marks["fold_ln"] = fold_mark(pair, "ln1", fold_way, says)
    singular = tuple(
        in_singular_basis(unit, bool(carried))
        for unit, carried in ((pair.a, pair.a_carried), (pair.b, pair.b_carried))
    )
    refactor = _refactor_mark(singular, rotated)
    for name in (W_Q, B_Q, W_K, B_K, W_V, W_O):
        found[name].marks[REFACTOR] = refactor
    for name, way in ((W_O, output.w_o), (B_O, output.b_o)):
        source = left[name]
        found[name].marks[CENTRE] = mark(
            way, nothing_to_do=has_no_means(source, -1), says=output_says
        )
    values = mark(output.values, nothing_to_do=_none(left[B_V]), says=output_says)
    if output.any_values:
        values = Mark.SILENT
    if (values is Mark.APPLIED and singular[1]) or (values is Mark.UNDONE and singular[0]):
        values = Mark.SILENT  # refactoring folds the value biases itself
    for name in (B_V, B_O):
        found[name].marks[VALUES] = values
    if not all(each.match.agrees for each in found.values()):
        _judge(found, pair, compare.proof())
    odd(pair, found, compare)
    return found


def _queries_and_keys(left: Operands, right: Operands, pair: Pair, compare: Comparer) -> Matches:
    """W_Q, b_Q, W_K and b_K, else their product."""
    direct = {n: compare(left[n], right[n], pair.d_axis[n]) for n in (W_Q, B_Q, W_K, B_K)}
    if all(m.agrees for m in direct.values()):
        return direct
    q, k = _scores_product(left, right, compare)
    if (q.agrees and k.agrees) or _better((q, k), (direct[W_Q], direct[W_K])):
        heads = left[W_Q].value.shape[0]
        parts = (*split_bias(q, heads), *split_bias(k, heads))
        return dict(zip((W_Q, B_Q, W_K, B_K), parts, strict=True))
    return direct


def _better(product: tuple[Match, Match], direct: tuple[Match, Match]) -> bool:
    """Whether the difference is a change of basis first of all: one that reaches both factors."""
    return min(m.share for m in direct) > 0.25 and (
        min(m.relative for m in product) < 0.5 * max(m.relative for m in direct)
    )


def _values_and_output(
    left: Operands, right: Operands, pair: Pair, compare: Comparer
) -> tuple[Way, Matches, bool]:
    """W_V and W_O, else their product."""
    order = centring_order([(left[W_O], right[W_O])], -1)

    def direct(way: Way) -> Matches:
        return {W_O: compare(*centred_by(way, left[W_O], right[W_O]), pair.d_axis[W_O])}

    way, matches, says = search(order, direct)
    matches |= {W_V: compare(left[W_V], right[W_V], pair.d_axis[W_V])}
    if all(m.agrees for m in matches.values()):
        return way, matches, says
    other_way, products, other_says = search(
        order, lambda way: _output_product(way, left, right, compare)
    )
    if all(m.agrees for m in products.values()) or _better(
        (products[W_V], products[W_O]), (matches[W_V], matches[W_O])
    ):
        return other_way, products, other_says
    return way, matches, says


def _output(
    left: Operands, right: Operands, pair: Pair, fold_way: Way, compare: Comparer
) -> tuple[Output, Matches, bool]:
    w_o, matches, says = _values_and_output(left, right, pair, compare)
    rotated = matches[W_V].product is not None
    values = [Way.SAME, Way.APPLIED, Way.UNDONE]
    if _none(left[B_V]) and _none(right[B_V]):
        values = [Way.SAME]
    elif _none(right[B_V]):
        values = [Way.APPLIED, Way.SAME, Way.UNDONE]
    elif _none(left[B_V]):
        values = [Way.UNDONE, Way.SAME, Way.APPLIED]
    early = _folded_early(left, right, w_o, pair, fold_way, compare)

    def evaluate(ways: tuple[Way, Way]) -> Matches:
        return _biases(*ways, w_o, left, right, compare, rotated)

    order = pairs_of(values + ([Way.BOTH] if early else []), (w_o, *NAMED))
    (way, b_o), biases, _ = search(dict.fromkeys(order), evaluate)
    alike = evaluate((way, w_o))
    if all(m.agrees for m in alike.values()):
        b_o, biases = w_o, alike  # what W_O went through, unless b_O denies it
    agree = {
        other
        for other in values
        if other is way or all(m.agrees for m in evaluate((other, b_o)).values())
    }
    chosen = early if early and way is Way.BOTH else way
    return Output(rotated, w_o, chosen, len(agree) > 1, b_o), matches | biases, says


def _folded_early(
    left: Operands, right: Operands, w_o: Way, pair: Pair, fold_way: Way, compare: Comparer
) -> Way | None:
    """`fold_value_biases` before `fold_ln`, out of TransformerLens's order: a model's own value
    biases are then in b_O, and what LayerNorm added to b_V is not."""
    if fold_way not in (Way.APPLIED, Way.UNDONE):
        return None
    outputs = centred_by(w_o, left[W_O], right[W_O])
    sides = [(left[B_V], outputs[0]), (right[B_V], outputs[1])]
    (folded, weight), other = sides if fold_way.left else sides[::-1]
    own = (pair.a if fold_way.left else pair.b)[B_V]

    def alike(bias: Operand) -> bool:
        return compare(_added(bias, weight), _added(*other), 0).agrees

    if not _none(own):
        added = replace(folded, value=folded.value - own.value)
        return fold_way if alike(added) else None
    if alike(folded):
        return None
    return Way.UNDONE if fold_way is Way.APPLIED else Way.APPLIED


def _added(b_v: Operand, w_o: Operand) -> Operand:
    """What value biases add to the output: the same in every basis of the heads."""
    zero = Operand(np.zeros(w_o.value.shape[2]), (np.zeros(1),), w_o.rounding)
    _, moved = move_values(b_v, w_o, zero)
    return replace(moved, unpacked=b_v.unpacked, moved=b_v.moved or w_o.moved)


def _biases(
    values: Way,
    b_o: Way,
    w_o: Way,
    left: Operands,
    right: Operands,
    compare: Comparer,
    rotated: bool = False,
) -> Matches:
    """b_V and b_O: value biases folded where `values` says, the output's centred where `b_o`."""
    weights = centred_by(w_o, left[W_O], right[W_O])
    v, o = left[B_V], left[B_O]
    v2, o2 = right[B_V], right[B_O]
    moved_v, moved_o = move_values(v, weights[0], o)
    moved_v2, moved_o2 = move_values(v2, weights[1], o2)
    if rotated and values is Way.SAME and v.value.any():
        # In another basis b_V is another vector.
        match = compare(_added(v, weights[0]), _added(v2, weights[1]), 0)
        match = replace(match, product="b_V·W_O", others=np.zeros(0), channels=np.zeros(0))
    else:
        match = compare(moved_v if values.left else v, moved_v2 if values.right else v2, None)
    outputs = moved_o if values.left else o, moved_o2 if values.right else o2
    return {B_V: match, B_O: compare(*centred_by(b_o, *outputs), 0)}


def _refactor_mark(singular: tuple[bool, ...], rotated: bool) -> Mark:
    a, b = singular
    if not rotated:
        return Mark.SILENT if a and b else Mark.ABSENT
    if a and b:
        return Mark.SILENT  # another choice of signs
    return Mark.APPLIED if b else Mark.UNDONE if a else Mark.ABSENT


def _none(bias: Operand) -> bool:
    """Zero, but for what is left of it after having been carried."""
    if not bias.unpacked:
        return not bias.value.any()
    noise = bias.rounding.relative + NOISE * FLOAT32.relative
    return bool((np.abs(bias.value) <= noise * bias.magnitude()).all())


def _judge(found: dict[str, Found], pair: Pair, compare: Comparer) -> None:
    """Whether the function is the same: with every step on both sides, and products for heads."""
    left, right = folded_by(Way.BOTH, pair, "ln1")
    proof = {n: compare(left[n], right[n], pair.d_axis[n]) for n in (W_Q, B_Q, W_K, W_V)}
    outputs = centred_by(Way.BOTH, left[W_O], right[W_O])
    proof[W_O] = compare(*outputs, pair.d_axis[W_O])
    # A change of basis shows on both factors. An edit of one of them has no claim to the
    # product's tolerance, which is wider than an element's.
    if not proof[W_Q].agrees and not proof[W_K].agrees:
        q, k = _scores_product(left, right, compare, function=True)
        proof |= {W_Q: q, B_Q: q, W_K: k}
    if not proof[W_V].agrees and not proof[W_O].agrees:
        proof |= _output_product(Way.BOTH, left, right, compare)
    # b_K adds the same to a query's score with every key, which softmax does not see.
    scores = {n: proof[n] for n in (W_Q, B_Q, W_K)}
    agree = all(m.agrees for m in scores.values())
    output = _biases(Way.BOTH, Way.BOTH, Way.BOTH, left, right, compare)[B_O]
    judge({n: each for n, each in found.items() if n != B_K}, proof | {B_O: output, B_V: output})
    for name in (W_Q, B_Q, B_K, W_K):
        found[name].keeps = agree and (name == B_K or found[name].keeps)


def _scores_product(
    left: Operands, right: Operands, compare: Comparer, *, function: bool = False
) -> tuple[Match, Match]:
    """W_Q·W_Kᵀ with the biases as a further row; the `function` does not depend on b_K."""

    def factors(unit: Operands) -> tuple[Factor, Factor]:
        b_k = None if function else unit[B_K]
        return Factor.of(unit[W_Q], unit[B_Q]), Factor.of(unit[W_K], b_k)

    sides = left[W_Q], right[W_Q]
    return compare_products(factors(left), factors(right), sides, compare, "W_Q·W_Kᵀ")


def _output_product(way: Way, left: Operands, right: Operands, compare: Comparer) -> Matches:
    """W_V·W_O, with W_O centred as `way` says."""
    outputs = centred_by(way, left[W_O], right[W_O])
    factors, sides = [], []
    for unit, w_o in zip((left, right), outputs, strict=True):
        factors.append((Factor.of(unit[W_V]), Factor.of(w_o).flipped()))
        sides.append(replace(unit[W_V], moved=unit[W_V].moved or w_o.moved))
    v, o = compare_products(factors[0], factors[1], (sides[0], sides[1]), compare, "W_V·W_O")
    return {W_V: v, W_O: o}
