"""What is found about one tensor, and choosing among the ways that it may have gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

import numpy as np

from converter.explaining.compare import FEW, Match
from converter.explaining.operand import Operand, Way
from converter.processing.step import Array, centred


class Mark(Enum):
    """What one tensor tells about one step."""

    APPLIED = "applied"
    UNDONE = "undone"
    ABSENT = "absent"
    """It would have left a trace here, and has not."""
    SILENT = "silent"
    """It would leave no trace here: nothing to do."""
    SPOILT = "spoilt"
    """Too little of the tensor agrees with anything."""


MARKS = {Way.APPLIED: Mark.APPLIED, Way.UNDONE: Mark.UNDONE}


@dataclass
class Found:
    match: Match
    marks: dict[str, Mark] = field(default_factory=dict)
    """By step."""
    keeps: bool = True
    """The function is the same, whatever is left of the tensor's difference."""


Chosen = TypeVar("Chosen")
Matches = dict[str, Match]


def search(
    candidates: Iterable[Chosen], evaluate: Callable[[Chosen], Matches]
) -> tuple[Chosen, Matches, bool]:
    """The candidate that leaves least, what it leaves, and whether it says anything.

    The first one that leaves nothing ends the search, so the most plausible goes first.
    """
    tried: list[tuple[int, float, float, int, Chosen, Matches]] = []
    for i, candidate in enumerate(candidates):
        matches = evaluate(candidate)
        found = matches.values()
        share = sum(m.failing for m in found) / sum(m.cells for m in found)
        left = sum(m.relative**2 for m in found)
        if share == 0 and all(m.strict is None for m in found):
            return candidate, matches, True
        # What a wide tolerance accepts must not win over what but an edited element contradicts.
        edit = all(m.strict is None and m.share <= FEW for m in found)
        rank = 0 if edit else 1 if share == 0 else 2
        tried.append((rank, share, left if share else 0.0, i, candidate, matches))
    best = min(tried, key=lambda t: t[:4])
    others = [t[2] for t in tried if t[3] != best[3]]
    says = best[1] < 0.5 or (bool(others) and best[2] < 0.5 * min(others))
    return best[4], best[5], says


def off_centre(array: Array, axis: int) -> float:
    """How large means over an axis are beside what they are means of: a typical one."""
    size = np.abs(array).mean(axis)
    ratio = np.divide(np.abs(array.mean(axis)), size, out=np.zeros_like(size), where=size > 0)
    return float(np.median(ratio))


def centring_order(pairs: list[tuple[Operand, Operand]], axis: int) -> tuple[Way, ...]:
    """The ways of a subtraction of means over an axis, the most plausible first."""
    a = max(off_centre(x.value, axis) for x, _ in pairs)
    b = max(off_centre(y.value, axis) for _, y in pairs)
    telling = not all(has_no_means(x, axis) and has_no_means(y, axis) for x, y in pairs)
    if telling and b < a / 4:
        return (Way.APPLIED, Way.SAME, Way.UNDONE)
    if telling and a < b / 4:
        return (Way.UNDONE, Way.SAME, Way.APPLIED)
    return (Way.SAME, Way.APPLIED, Way.UNDONE)


def has_no_means(x: Operand, axis: int) -> bool:
    return centred(x.value, axis, x.rounding)


def mark(way: Way, *, nothing_to_do: bool, says: bool = True) -> Mark:
    if not says:
        return Mark.SPOILT
    return MARKS.get(way, Mark.SILENT if nothing_to_do else Mark.ABSENT)
