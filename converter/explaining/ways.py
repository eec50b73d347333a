"""What the search speaks of: ways, acts, candidates, and what is found about each tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from converter.explaining.compare import Match
from converter.processing import STEPS
from converter.processing.step import Part, Step


class Way(Enum):
    """What became of a step on one part, from the original to the converted one."""

    SAME = (False, False)
    APPLIED = (True, False)
    """The step takes the original's tensors to the converted one's."""
    UNDONE = (False, True)
    """The step takes the converted one's tensors to the original's."""
    BOTH = (True, True)
    """One of the two has gone through it, and a step that came before went the other way: only
    after that do they agree, when both have taken this one (again)."""


class Mark(Enum):
    """What one tensor shows about one step."""

    APPLIED = "applied"
    UNDONE = "undone"
    ABSENT = "absent"
    """It would show here, and does not."""
    SILENT = "silent"
    """It would not show here: there is nothing to do."""
    SPOILT = "spoilt"
    """Too little of the tensor agrees with anything."""


@dataclass
class Found:
    """What is found about one tensor."""

    match: Match
    marks: dict[str, Mark] = field(default_factory=dict)
    """By step."""
    keeps: bool = True
    """The function is the same, whatever is left of the tensor's difference."""
    foreign: bool = False
    """It is in another basis, and in none that a step chooses."""


Matches = dict[str, Match]


class Act(NamedTuple):
    """A step on one of its parts."""

    step: Step
    part: Part


class Candidate(NamedTuple):
    """The ways of all acts, in their order."""

    ways: tuple[Way, ...]
    late: bool = False
    """What carrying biases does as well was done then, after all other steps."""


def connected(names: list[str]) -> list[list[str]]:
    """A unit's tensors, those together that a step's part has together; in their order."""
    groups = [{name} for name in names]
    for step in STEPS:
        for part in step.parts_of(names):
            shared = [group for group in groups if not group.isdisjoint(part.names)]
            groups = [g for g in groups if g not in shared] + [set().union(*shared)]
    return sorted(([n for n in names if n in g] for g in groups), key=lambda g: names.index(g[0]))
