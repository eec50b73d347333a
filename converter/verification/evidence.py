"""What is known of an artifact, link by link of the chain that ties it to its original."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Link = Literal["weights", "structure", "program", "route", "arithmetic"]
"""weights: the stored values are what the route makes of the original's, bit for bit.
structure: the nodes of a graph are those that its config makes.
program: the software, in float64 on the stored weights, computes GPT-Neo.
route: the route's weights, before they are rounded, compute what the original does.
arithmetic: the float32 run that users see is the program's, within float32's noise."""
Outcome = Literal["same", "differs", "not comparable"]
LINKS: tuple[Link, ...] = get_args(Link)


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
    outcome: Outcome
    why: str | None = None
    """Of what is not comparable: the reason."""
    where: str | None = None
    """The probe, tensor or node that is furthest off."""
    error: float | None = None
    """By how much, at most: the largest |Δ log p| of the probes."""
    times: float | None = None
    """The same in units of what is allowed: what is the same is at most at 1."""

    def __post_init__(self) -> None:
        assert (self.why is not None) == (self.outcome == "not comparable"), self
        assert (self.where is not None) or self.outcome != "differs", self

    @staticmethod
    def not_comparable(subject: str, link: Link, why: str) -> Evidence:
        return Evidence(subject, link, "not comparable", why=why)

    @staticmethod
    def measured(subject: str, link: Link, where: str, error: float, times: float) -> Evidence:
        """Of a measurement: the worst there is. NaN is an error like any other."""
        outcome: Outcome = "same" if times <= 1 else "differs"
        return Evidence(subject, link, outcome, where=where, error=error, times=times)

    @property
    def failed(self) -> bool:
        return self.outcome == "differs"

    def __str__(self) -> str:
        """`same in HookedTransformer: max |Δ log p| 2.1e-14, 0.03 of what is allowed (length 16)`"""
        if self.outcome == "not comparable":
            return f"not comparable in {self.subject}: {self.why}"
        if self.error is None or self.times is None:
            return f"{self.outcome} in {self.subject}" + (f": {self.where}" if self.where else "")
        share = (
            f"{self.times:.2g} of" if self.times <= 1 else f"{self.times:.3g} times"
        ) + " what is allowed"
        return (
            f"{self.outcome} in {self.subject}: max |Δ log p| {self.error:.2e}, {share}"
            f" ({self.where})"
        )

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
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
