"""The tensors outside attention: what the embeddings, the MLP and the unembedding went through."""

from __future__ import annotations

from converter.explaining.compare import Comparer
from converter.explaining.found import (
    Found,
    Mark,
    Matches,
    centring_order,
    has_no_means,
    mark,
    search,
)
from converter.explaining.operand import NAMED, Operand, Operands, Way, centre, fold
from converter.explaining.unit import Pair
from converter.processing.fold_ln import NORMS

W_U, B_U = "unembed.W_U", "unembed.b_U"


def centred_by(way: Way, a: Operand, b: Operand) -> tuple[Operand, Operand]:
    return centre(a) if way.left else a, centre(b) if way.right else b


def centring(
    step: str, a: Operand, b: Operand, d_axis: int | None, compare: Comparer
) -> tuple[Found, Way]:
    """One tensor of `center_writing_weights` or `center_unembed`."""

    def evaluate(way: Way) -> Matches:
        return {step: compare(*centred_by(way, a, b), d_axis)}

    way, matches, says = search(centring_order([(a, b)], -1), evaluate)
    told = mark(way, nothing_to_do=has_no_means(a, -1), says=says)
    # Where the means drown in rounding, as they may in a few loosely known numbers, none is told.
    loose = compare.coarse or b.unpacked or a.unpacked or a.value.ndim == 1
    if matches[step].agrees and loose and told is not Mark.SILENT:
        others = set(NAMED) - {way}
        told = Mark.SILENT if any(evaluate(w)[step].agrees for w in others) else told
    found = Found(matches[step], {step: told})
    if not found.match.agrees:
        both = compare.proof()(*centred_by(Way.BOTH, a, b), d_axis)
        found.keeps = both.vanished(found.match)
    return found, way


def writer(name: str, pair: Pair, compare: Comparer) -> Found:
    """A weight that only `center_writing_weights` touches."""
    a, b, d_axis = pair.a[name], pair.b[name], pair.d_axis[name]
    return centring("center_writing_weights", a, b, d_axis, compare)[0]


def fold_ways(pair: Pair, norm: str) -> tuple[Way, ...]:
    """How a LayerNorm may have been folded, by the gains and biases of most channels."""
    a, b = _folded(pair.a, norm), _folded(pair.b, norm)
    if a and b:
        readers = [(pair.a[w], pair.b[w]) for w, _ in NORMS[norm] if w in pair.a]
        return centring_order(readers, -2)
    if b:
        return (Way.APPLIED, Way.SAME)
    if a:
        return (Way.UNDONE, Way.SAME)
    return (Way.SAME,)


def _folded(unit: Operands, norm: str) -> bool:
    ones = (unit[f"{norm}.w"].value == 1) & (unit[f"{norm}.b"].value == 0)
    return bool(ones.mean() > 0.5)


def folded_by(way: Way, pair: Pair, norm: str) -> tuple[Operands, Operands]:
    return (
        fold(pair.a, norm) if way.left else pair.a,
        fold(pair.b, norm) if way.right else pair.b,
    )


def norm_matches(left: Operands, right: Operands, norm: str, compare: Comparer) -> Matches:
    return {n: compare(left[n], right[n], 0) for n in (f"{norm}.w", f"{norm}.b")}


def fold_mark(pair: Pair, norm: str, way: Way, says: bool) -> Mark:
    """What a LayerNorm and its readers tell about `fold_ln`."""
    carried = pair.b_carried if way is Way.APPLIED else pair.a_carried
    source = pair.a if way is Way.APPLIED else pair.b
    own_biases = any(source[b].value.any() for _, b in NORMS[norm])
    if way is not Way.SAME and norm in carried and own_biases:
        return Mark.SILENT  # carrying a model's own biases folds their LayerNorm, too
    silent = _folded(pair.a, norm) and all(
        has_no_means(pair.a[w], -2) for w, _ in NORMS[norm] if w in pair.a
    )
    return mark(way, nothing_to_do=silent, says=says)


def odd(pair: Pair, found: dict[str, Found], compare: Comparer) -> None:
    """Gains and biases that should carry biases, but were changed."""
    for name, (expected, seen) in pair.odd.items():
        match = compare(expected, seen, 0)
        if not match.agrees:
            found[name].match, found[name].keeps = match, False


def mlp(pair: Pair, compare: Comparer) -> dict[str, Found]:
    """LayerNorm 2 with what reads it, and the output weights."""

    def readers(way: Way, judge: Comparer) -> tuple[Operands, Operands, Matches]:
        left, right = folded_by(way, pair, "ln2")
        names = ("mlp.W_in", "mlp.b_in")
        return left, right, {n: judge(left[n], right[n], pair.d_axis[n]) for n in names}

    def evaluate(way: Way) -> Matches:
        left, right, matches = readers(way, compare)
        return norm_matches(left, right, "ln2", compare) | matches

    way, matches, says = search(fold_ways(pair, "ln2"), evaluate)
    told = {"fold_ln": fold_mark(pair, "ln2", way, says)}
    found = {name: Found(match, dict(told)) for name, match in matches.items()}
    if not all(m.agrees for m in matches.values()):
        judge(found, readers(Way.BOTH, compare.proof())[2])
    return found | {name: writer(name, pair, compare) for name in ("mlp.W_out", "mlp.b_out")}


def final(pair: Pair, compare: Comparer) -> dict[str, Found]:
    """The last LayerNorm and the unembedding."""
    step = "center_unembed"
    ways: dict[Way, tuple[dict[str, Found], Matches]] = {}

    def evaluate(way: Way) -> Matches:
        left, right = folded_by(way, pair, "ln_final")
        found = {
            n: centring(step, left[n], right[n], pair.d_axis[n], compare)[0] for n in (W_U, B_U)
        }
        norm = norm_matches(left, right, "ln_final", compare)
        ways[way] = (found, norm)
        return norm | {name: each.match for name, each in found.items()}

    way, matches, says = search(fold_ways(pair, "ln_final"), evaluate)
    found, norm = ways[way]
    found |= {name: Found(match) for name, match in norm.items()}
    for each in found.values():
        each.marks["fold_ln"] = fold_mark(pair, "ln_final", way, says)
    if not all(m.agrees for m in matches.values()):
        left, right = folded_by(Way.BOTH, pair, "ln_final")
        proof = {
            n: compare.proof()(*centred_by(Way.BOTH, left[n], right[n]), pair.d_axis[n])
            for n in (W_U, B_U)
        }
        judge(found, proof)
    odd(pair, found, compare)
    return found


def judge(found: dict[str, Found], with_all: Matches) -> None:
    """Whether the function is the same, from the readers with every step on both sides.

    A LayerNorm matters through its readers: all of them must have lost their difference.
    """
    for name, each in found.items():
        readers = [with_all[name]] if name in with_all else list(with_all.values())
        each.keeps = all(match.vanished(each.match) for match in readers)
