"""Which way each step went, on each of its parts: a search over the steps that are declared.

Between two checkpoints a step was carried out on neither or both, on the second, or on the first
("undone"). The tensors of a unit that share parts are searched together: every combination of ways
takes both sides through the steps' own `apply`, and is as good as the tensors then agree. What the
weights show (`Step.distance`) leaves out ways and puts the likely ones first; a way under which all
that its part changes agrees is settled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product as combinations_of
from math import inf

from converter.explaining.compare import FEW, Comparer, Match
from converter.explaining.operand import Operand, Operands, taken, values
from converter.explaining.products import compare_product
from converter.explaining.unit import Pair
from converter.explaining.ways import Act, Candidate, Found, Mark, Matches, Way, connected
from converter.processing import STEPS, Carry, State
from converter.processing.step import Product, is_vector


def search(pair: Pair, compare: Comparer) -> dict[str, Found]:
    """Of each tensor, what is left of it after the steps, and what it shows of them."""
    found: dict[str, Found] = {}
    for names in connected(list(pair.a)):
        found |= _Search(pair.of(names), compare).found()
    return found


class _Search:
    def __init__(self, pair: Pair, compare: Comparer) -> None:
        self.pair, self.compare = pair, compare
        self.acts = [Act(step, part) for step in STEPS for part in step.parts_of(pair.a)]
        self.bases = [act for act in self.acts if act.part.products]
        self.acts = [act for act in self.acts if not act.part.products]
        self.products = [product for act in self.bases for product in act.part.products]
        self._taken: dict[tuple[bool, tuple[int, ...]], Operands] = {}
        self._matches: dict[tuple[Operand, Operand], Match] = {}
        self._rotated: dict[tuple[object, ...], Matches] = {}

    def found(self) -> dict[str, Found]:
        best, matches = self._best()
        found = {name: Found(match) for name, match in matches.items()}
        bases = [(act, self._basis(act, matches)) for act in self.bases]
        for act, mark in bases:
            for name in {n for product in act.part.products for n in product.left + product.right}:
                found[name].foreign = mark is Mark.ABSENT and matches[name].product is not None
                if name not in act.part.empties:
                    found[name].marks[act.step.name] = mark
        for act, way in zip(self.acts, best.ways, strict=True):
            mark = self._mark(act, way, best, matches)
            for base, done in bases if mark in (Mark.APPLIED, Mark.UNDONE) else ():
                # A step that includes this one, and shows on the side in question, did it.
                if act.step in base.step.includes and self._shown(base)[mark is Mark.APPLIED]:
                    marks = {base.step.name: done} if done is mark else {}
                    for name in self._changed(act):
                        found[name].marks |= marks
                    mark = Mark.SILENT
            for name in self._changed(act):
                found[name].marks[act.step.name] = mark
        if not all(match.agrees for match in matches.values()):
            self._judge(found)
        for name, (expected, seen) in self.pair.odd.items():
            match = self.compare(expected, seen, 0)
            if not match.agrees:
                found[name].match, found[name].keeps = match, False
        return found

    # --- candidates ---------------------------------------------------------------------------

    def _best(self) -> tuple[Candidate, Matches]:
        """The candidate that leaves least. The first one that leaves nothing ends the search."""
        tried: list[tuple[int, float, int, float, int, Candidate, Matches]] = []
        settled: dict[int, Way] = {}
        for i, candidate in enumerate(self._candidates()):
            if any(candidate.ways[act] is not way for act, way in settled.items()):
                continue
            matches = self._compared(candidate)
            wrong = sum(_wrong(match) for match in matches.values())
            rest = [match for match in matches.values() if not match.agrees]
            if not wrong and not rest:
                return candidate, matches
            share = sum(m.failing for m in rest) / sum(m.cells for m in matches.values())
            # A step taken on both sides hides an edit in what it adds: last of those that are as good.
            both = candidate.ways.count(Way.BOTH)
            left = sum(m.relative**2 for m in rest)
            tried.append((wrong, share, both, left, i, candidate, matches))
            # Of a product that differs, the factor that is not at fault has proved nothing.
            differing = {m.product for m in rest if m.product}
            for number, act in enumerate(self.acts):
                own = [matches[name] for name in self._changed(act)]
                if all(m.agrees and m.strict is None and m.product not in differing for m in own):
                    settled.setdefault(number, candidate.ways[number])
        *_, best, left_over = min(tried, key=lambda t: t[:5])
        return best, left_over

    def _candidates(self) -> Iterator[Candidate]:
        """All combinations of ways, the most plausible first: one way for a whole step, and for
        each part what it shows, the larger the part the sooner."""
        ways = [self._ways(act) for act in self.acts]
        sizes = [max(self.pair.a[n].value.size for n in self._changed(act)) for act in self.acts]

        def doubt(chosen: tuple[Way, ...]) -> tuple[int, int]:
            steps = {(act.step.name, way) for act, way in zip(self.acts, chosen, strict=True)}
            ranks = (each.index(way) for each, way in zip(ways, chosen, strict=True))
            return len(steps), sum(r * size for r, size in zip(ranks, sizes, strict=True))

        late = any(self._with_carrying(act, side) for act in self.acts for side in (0, 1))
        for chosen in sorted(combinations_of(*ways), key=doubt):
            yield Candidate(chosen)
            if late:
                yield Candidate(chosen, late=True)

    def _ways(self, act: Act) -> tuple[Way, ...]:
        a, b = (self._distance(act, unit) for unit in (self.pair.a, self.pair.b))
        if a == b == inf:
            return (Way.SAME,)
        if inf in (a, b):
            return (Way.APPLIED if a == inf else Way.UNDONE, Way.SAME)
        shows = not all(self._nothing_to_do(act, unit) for unit in (self.pair.a, self.pair.b))
        last = (Way.BOTH,) if min(a, b) == 0 < max(a, b) else ()
        if shows and b < a / 4:
            return (Way.APPLIED, Way.SAME, Way.UNDONE, *last)
        if shows and a < b / 4:
            return (Way.UNDONE, Way.SAME, Way.APPLIED, *last)
        return (Way.SAME, Way.APPLIED, Way.UNDONE)

    def _distance(self, act: Act, unit: Operands) -> float:
        return act.step.distance(act.part, values(unit), unit[act.part.changes[0]].rounding)

    def _nothing_to_do(self, act: Act, unit: Operands) -> bool:
        """Whether the step, carried out now, would change nothing."""
        rounding = unit[act.part.changes[0]].rounding
        return act.step.shows(act.part, values(unit), rounding) is not State.NOT_APPLIED

    def _changed(self, act: Act) -> list[str]:
        return [name for name in act.part.changes if name in self.pair.a]

    # --- comparing ----------------------------------------------------------------------------

    def _sides(self, candidate: Candidate) -> tuple[Operands, Operands]:
        """Both units after the steps that the candidate has them take."""
        both = []
        for side, start in enumerate((self.pair.a, self.pair.b)):
            chosen = [i for i, way in enumerate(candidate.ways) if way.value[side]]
            if candidate.late:
                chosen.sort(key=lambda i: self._with_carrying(self.acts[i], 1 - side))
            both.append(self._after(side == 0, start, tuple(chosen)))
        return both[0], both[1]

    def _after(self, left: bool, start: Operands, chosen: tuple[int, ...]) -> Operands:
        if not chosen:
            return start
        key = left, chosen
        if key not in self._taken:
            before = self._after(left, start, chosen[:-1])
            self._taken[key] = taken(before, *self.acts[chosen[-1]])
        return self._taken[key]

    def _compared(self, candidate: Candidate) -> Matches:
        """What is left of each tensor, or of a product of two where only that is the same."""
        left, right = self._sides(candidate)
        matches = {name: self._match(left[name], right[name], name) for name in left}
        for product in self.products:
            names = product.left + product.right
            # A change of basis shows on the weights: it is no excuse for their bias alone.
            if all(matches[name].agrees for name in (product.left[0], product.right[0])):
                continue
            key = tuple(unit[name] for unit in (left, right) for name in names)
            if key not in self._rotated:
                self._rotated[key] = compare_product(product, left, right, self.compare)
            rotated = self._rotated[key]
            if all(m.agrees for m in rotated.values()) or _changes_basis(product, matches, rotated):
                empty = {n for act in self.bases for n in act.part.empties if matches[n].agrees}
                matches |= {n: m for n, m in rotated.items() if n not in empty}
        return matches

    def _match(self, left: Operand, right: Operand, name: str) -> Match:
        if (left, right) not in self._matches:
            self._matches[left, right] = self.compare(left, right, self.pair.d_axis[name])
        return self._matches[left, right]

    # --- what that shows ----------------------------------------------------------------------

    def _mark(self, act: Act, way: Way, best: Candidate, matches: Matches) -> Mark:
        names, number = self._changed(act), self.acts.index(act)
        own = [matches[name] for name in names]
        agrees = all(match.agrees for match in own)
        others: list[Matches] = []
        if not agrees or self._loose(names):
            for other in self._ways(act):
                ways = (*best.ways[:number], other, *best.ways[number + 1 :])
                if other is not way and other is not Way.BOTH:
                    others.append(self._compared(best._replace(ways=ways)))
        if agrees and any(all(each[name].agrees for name in names) for each in others):
            return Mark.SILENT
        if sum(m.failing for m in own) >= 0.5 * sum(m.cells for m in own):
            left = [sum(each[name].relative ** 2 for name in names) for each in (matches, *others)]
            if not others or left[0] >= 0.5 * min(left[1:]):
                return Mark.SPOILT
        if way is Way.SAME:
            left_side, _ = self._sides(best)
            return Mark.SILENT if self._nothing_to_do(act, left_side) else Mark.ABSENT
        applied = way is Way.APPLIED or (way is Way.BOTH and self._distance(act, self.pair.b) == 0)
        if self._with_carrying(act, int(applied)):
            return Mark.SILENT
        return Mark.APPLIED if applied else Mark.UNDONE

    def _loose(self, names: list[str]) -> bool:
        """Whether another way may agree as well: means drown in the rounding of a vector's few
        numbers, of steps in the storage dtype, and of biases that were carried."""
        units = (self.pair.a, self.pair.b)
        return (
            self.compare.coarse
            or any(unit[name].unpacked for unit in units for name in names)
            or all(is_vector(name) for name in names)
        )

    def _with_carrying(self, act: Act, side: int) -> bool:
        """Whether carrying biases did this as well, on the original (0) or the converted one (1):
        only a model's own biases make it do so."""
        carried = (self.pair.a_carried, self.pair.b_carried)[side]
        source = (self.pair.b, self.pair.a)[side]
        return (
            act.step in Carry.includes
            and act.part in carried
            and any(source[n].value.any() for n in self._changed(act) if ".b_" in n)
        )

    def _shown(self, act: Act) -> tuple[bool, bool]:
        """Whether the original, and the converted one, are in the basis that the step gives."""
        sides = ((self.pair.a, self.pair.a_carried), (self.pair.b, self.pair.b_carried))
        a, b = (self._distance(act, unit) <= (1.0 if carried else 0.0) for unit, carried in sides)
        return a, b

    def _basis(self, act: Act, matches: Matches) -> Mark:
        """What the products that a step leaves as they are show about it."""
        a, b = self._shown(act)
        if a and b:
            return Mark.SILENT  # as they were, or another choice of signs
        if not any(m.product for m in matches.values()):
            return Mark.ABSENT
        return Mark.APPLIED if b else Mark.UNDONE if a else Mark.ABSENT

    # --- the function -------------------------------------------------------------------------

    def _judge(self, found: dict[str, Found]) -> None:
        """Whether the function is the same: with every step taken on both sides, and products
        where a step leaves nothing else as it is."""
        every, compare = tuple(range(len(self.acts))), self.compare.proof()
        left, right = (
            self._after(side, unit, every)
            for side, unit in ((True, self.pair.a), (False, self.pair.b))
        )
        proof = {name: compare(left[name], right[name], self.pair.d_axis[name]) for name in found}
        idle: dict[str, tuple[str, ...]] = {}
        for product in self.products:
            # A change of basis shows on both factors. An edit of one of them has no claim to the
            # product's tolerance, which is wider than an element's.
            if not proof[product.left[0]].agrees and not proof[product.right[0]].agrees:
                proof |= compare_product(product, left, right, compare, function=True)
            rest = tuple(n for n in product.left + product.right if n not in product.idle)
            idle |= dict.fromkeys(product.idle, rest)
        empty = {name for act in self.acts for name in act.part.empties}
        full = [name for name in found if name not in empty and name not in idle]
        for name, each in found.items():
            if name in idle:
                each.keeps = all(proof[other].agrees for other in idle[name])
            else:  # what a step empties matters through all that is not
                readers = full if name in empty else [name]
                each.keeps = all(proof[other].vanished(each.match) for other in readers)


def _wrong(match: Match) -> int:
    """How badly a tensor disagrees. What a wide tolerance accepts must not win over what but an
    edited element contradicts."""
    if match.strict is not None:
        return 1
    return 0 if match.share <= FEW else 2


def _changes_basis(product: Product, direct: Mapping[str, Match], rotated: Matches) -> bool:
    """Whether the difference is a change of basis first of all: one that reaches both factors."""
    weights = product.left[0], product.right[0]
    return min(direct[n].share for n in weights) > 0.25 and (
        min(rotated[n].relative for n in weights) < 0.5 * max(direct[n].relative for n in weights)
    )
