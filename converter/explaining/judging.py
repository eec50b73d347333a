"""Which steps separate two checkpoints: unit by unit, tensor by tensor, then a vote.

Nothing but weights (and the architecture, from the configs) is looked at. `search` finds by which
steps a unit's tensors agree within rounding. Every step has many tensors to show on: what most of
them say is the answer, and the others are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import ml_dtypes
from threadpoolctl import threadpool_limits

from converter.checkpoint import Checkpoint
from converter.checkpoint.config import SIZES
from converter.dtypes import CODES
from converter.explaining.compare import Comparer
from converter.explaining.explanation import Cast, Explanation, Verdict
from converter.explaining.facts import ORDER, Searched, facts_of
from converter.explaining.search import search
from converter.explaining.unit import load, unpack
from converter.explaining.ways import Mark, connected
from converter.opening import Given, opened
from converter.processing import in_order
from converter.processing.step import is_vector
from converter.processing.steps import BY_NAME
from converter.progress import Progress, silent
from converter.route import groups

_UNCLEAR = "too little agrees to tell"


@dataclass
class _Read:
    """What a pass over all weights gives."""

    tensors: list[Searched] = field(default_factory=list)
    codes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """How many matrices have which dtypes: before, after, and stored as."""
    sides: set[str] = field(default_factory=set)
    """Which checkpoints carry biases in their LayerNorms."""


def explain(original: Given, converted: Given, *, progress: Progress | None = None) -> Explanation:
    """Name the processing steps that separate two checkpoints of one model, from weights alone.

    The verdict is
        same-weights     every tensor holds the same numbers; layout and a widening cast aside
        same-function    the numbers differ, and the steps, a cast to a narrower dtype (within its
                         rounding), or a change that provably does nothing account for it
        different-model  something else differs, or the configs say so (sizes included)

    Memory is bounded by one unit of each.

    Raises:
        BadInput: see `open_checkpoint`.
    """
    original, converted = opened(original), opened(converted)
    reasons = _other_sizes(original, converted)
    if reasons:
        return _verdict(original, converted, _Read(), False, reasons)
    compare, progress = Comparer(), progress or silent
    with threadpool_limits(1, user_api="blas"):  # small matrices: threads would wait for each other
        read = _read(original, converted, compare, progress)
        if compare.coarse:  # met on the way: what came before is to be judged alike
            read = _read(original, converted, compare, progress)
    # The weights show a scale of the scores: GPT-Neo has it in W_Q.
    a, b = (replace(c.config, score_divisors=()) for c in (original, converted))
    reasons = [f"{name} differs in the configs" for name in a.differences(b)]
    if original.config.n_ctx != converted.config.n_ctx:
        reasons.append(
            f"the converted model has {converted.config.n_ctx} positions,"
            f" the original {original.config.n_ctx}"
        )
    return _verdict(original, converted, read, compare.coarse, reasons)


def _read(
    original: Checkpoint, converted: Checkpoint, compare: Comparer, progress: Progress
) -> _Read:
    """One pass over the weights of both."""
    read = _Read()
    done, total = 0, sum(stored.nbytes for stored in converted.stored.values())
    for what, keys in _groups(converted):
        progress(f"weights: {what}", done, total)
        done += sum(converted.stored[k].nbytes for k in keys if k in converted.stored)
        pair = unpack(load(original, converted, keys))
        carried = {name for part in pair.a_carried | pair.b_carried for name in part.changes}
        for name, found in search(pair, compare).items():
            read.tensors.append(
                Searched(pair.prefix + name, pair.raw[name], found, name in carried)
            )
        read.sides |= {"original"} if pair.a_carried else set()
        read.sides |= {"converted"} if pair.b_carried else set()
        for name, b in pair.b.items():
            if b.value.ndim > 1 and b.value.any():
                codes = pair.a[name].code, b.code, converted.code(pair.prefix + name)
                read.codes[codes] += 1
    return read


def _other_sizes(original: Checkpoint, converted: Checkpoint) -> list[str]:
    return [
        f"{field} is {getattr(converted.config, field)} in the converted model"
        f" and {getattr(original.config, field)} in the original"
        for field in SIZES
        if field != "n_ctx" and getattr(original.config, field) != getattr(converted.config, field)
    ]


def _groups(checkpoint: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """The `hooked` names that are read together, in the order of the forward pass: of a module,
    with all that shares a step's part with it."""
    for slots in groups(checkpoint.slots, whole=True):
        keys = {slot.local: slot.key for slot in slots}
        for _, sets in groupby(connected(list(keys)), lambda names: names[-1].split(".")[0]):
            names = [name for each in sets for name in each]
            yield keys[names[-1]].rpartition(".")[0], [keys[name] for name in names]


def _vote(tensors: list[Searched]) -> dict[str, Mark]:
    """What most tensors say about each step; SILENT where none says anything, SPOILT where none can.

    Of as many, matrices decide: a bias of zeros looks centred, whatever was done.
    """
    result = {}
    for step in ORDER:
        voting = [t for t in tensors if step in t.found.marks]
        votes = Counter(t.found.marks[step] for t in voting)
        matrices = Counter(t.found.marks[step] for t in voting if not is_vector(t.key))
        said = [m for m in (Mark.APPLIED, Mark.UNDONE, Mark.ABSENT) if votes[m]]
        if said:
            result[step] = max(said, key=lambda m: (votes[m], matrices[m]))
        else:
            result[step] = Mark.SILENT if votes[Mark.SILENT] or not votes else Mark.SPOILT
    return result


def _verdict(
    original: Checkpoint,
    converted: Checkpoint,
    read: _Read,
    coarse: bool,
    reasons: list[str],
) -> Explanation:
    tensors, cast = read.tensors, _cast(read.codes)
    decided = _vote(tensors)
    facts = facts_of(original, converted, tensors, decided, cast)
    verdict: Verdict = "same-function"
    if reasons or any(not fact.explained and not fact.keeps_function for fact in facts):
        verdict = "different-model"
    elif all(fact.same for fact in facts):
        verdict = "same-weights"
    steps = tuple(s for s in ORDER if decided[s] in (Mark.APPLIED, Mark.UNDONE))
    silence = {}
    for step in ORDER if tensors else ():
        if decided[step] is Mark.SPOILT:
            silence[step] = _UNCLEAR
        elif decided[step] is Mark.SILENT:
            by = [s.name for s in in_order(steps) if BY_NAME[step] in s.includes]
            silence[step] = f"{by[0]} does it as well" if by else BY_NAME[step].silence
    return Explanation(
        original=original.source.given,
        converted=converted.source.given,
        layouts=(original.layout, converted.layout),
        verdict=verdict,
        steps=steps,
        undone=tuple(s for s in steps if decided[s] is Mark.UNDONE),
        silence=silence,
        carried=" and ".join(sorted(read.sides, reverse=True)) or None,
        cast=cast,
        coarse=coarse,
        reasons=tuple(reasons),
        tensors=facts,
    )


def _cast(codes: Counter[tuple[str, str, str]]) -> Cast | None:
    """From what most matrices say."""
    if not codes:
        return None
    before, after, stored = codes.most_common(1)[0][0]
    if before == after:
        return None
    finer = [ml_dtypes.finfo(CODES[code]) for code in (after, before)]
    exact = bool(finer[0].eps < finer[1].eps and finer[0].max >= finer[1].max)
    return Cast(before, after, stored, exact)
