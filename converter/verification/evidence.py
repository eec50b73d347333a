"""What is known of an artifact, link by link of the chain that ties it to its original; the verdict.

Each subject stands for itself: nothing that is known of one clears another. Whatever differs fails,
and so does whatever is required and could not be compared. What is left is verified.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Link = Literal["weights", "structure", "program", "route", "arithmetic"]
"""weights: the stored values are what the route makes of the original's, bit for bit.
structure: the nodes of a graph are those that its config makes.
program: the software, in float64 on the stored weights, computes GPT-Neo.
route: the route's weights, before they are rounded, compute what the original does.
arithmetic: the float32 run that users see is the program's, within float32's noise."""
Answer = Literal["same", "differs", "not comparable"]
LINKS: tuple[Link, ...] = get_args(Link)
QUESTIONS: dict[Link, str] = {
    "weights": "Is every stored value what the route makes of the original’s?",
    "structure": "Are the graph’s nodes those that its config makes?",
    "program": "Does the software compute GPT-Neo, in float64?",
    "route": "Do the weights made compute what the original does, in float64?",
    "arithmetic": "Is the float32 run as exact as float32 allows?",
}
"""Each link, for people."""


class NotComparable(Exception):
    """Why two things cannot be compared: what could not be done, as a clause."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(why)


@dataclass(frozen=True)
class Evidence:
    """One link of one subject. Says nothing of other links, or of other subjects."""

    subject: str
    """What was examined: these weights in this software, this graph."""
    link: Link
    outcome: Answer
    why: str | None = None
    """Of what is not comparable: the reason, as a clause. Of what differs: what is wrong, as a
    sentence. Of what is the same: how that is known, if not bit for bit or by running it."""
    where: str | None = None
    """The probe, tensor or node that is furthest off."""
    error: float | None = None
    """By how much, at most: the largest |Δ log p| of the probes."""
    times: float | None = None
    """The same in units of what is allowed: what is the same is at most at 1."""
    required: bool = False
    """Whether it fails where it is not comparable."""

    def __post_init__(self) -> None:
        assert self.why is not None or self.outcome == "same", self
        assert self.where is not None or self.outcome != "differs", self

    @staticmethod
    def not_comparable(subject: str, link: Link, why: str) -> Evidence:
        return Evidence(subject, link, "not comparable", why=why)

    @staticmethod
    def differing(subject: str, link: Link, where: str, why: str) -> Evidence:
        return Evidence(subject, link, "differs", why, where)

    @staticmethod
    def measured(
        subject: str, link: Link, where: str, error: float, times: float, why: str
    ) -> Evidence:
        """Of a measurement: the worst there is. NaN is an error like any other.

        `why`: what is wrong, should it be too much.
        """
        if times <= 1:
            return Evidence(subject, link, "same", where=where, error=error, times=times)
        return Evidence(subject, link, "differs", why, where, error, times)

    @property
    def problem(self) -> str | None:
        """A sentence, if this makes the artifact fail."""
        if self.outcome == "differs":
            return self.why
        if self.required and self.outcome == "not comparable":
            return f"{self.subject}: {self.link} could not be compared, and must be: {self.why}."
        return None

    def __str__(self) -> str:
        """`same: max |Δ log p| 2.1e-14, 0.03 of what is allowed (length 16)`"""
        if self.error is None or self.times is None:
            more = self.why if self.outcome != "differs" else self.where
            return self.outcome + (f": {more}" if more else "")
        share = (
            f"{self.times:.2g} of" if self.times <= 1 else f"{self.times:.3g} times"
        ) + " what is allowed"
        return f"{self.outcome}: max |Δ log p| {self.error:.2e}, {share} ({self.where})"

    def to_json(self) -> dict[str, Any]:
        """A number that is not finite becomes null."""
        return {
            "subject": self.subject,
            "link": self.link,
            "outcome": self.outcome,
            "why": self.why,
            "where": self.where,
            "error": _finite(self.error),
            "times": _finite(self.times),
            "required": self.required,
        }


def problems(evidence: Iterable[Evidence], require: Iterable[str] = ()) -> list[str]:
    """What makes the artifact fail, as sentences; none: it is verified.

    `require`: links that were asked for, of which there must be evidence.
    """
    evidence = tuple(evidence)
    known = {item.link for item in evidence}
    return [
        *(item.problem for item in evidence if item.problem is not None),
        *(
            f"{link} is required, and was not compared{_MISSING.get(link, '')}."
            for link in require
            if link not in known
        ),
    ]


_MISSING = {"structure": ": there is no graph, which alone has one"}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
