"""Is a run as close to the original as float32 allows? The noise floor and the verdict.

The error of a run on a probe is its log-probabilities minus those of the float64 reference,
both normalised in float64 from the run's logits. Two statistics of it are judged: the largest
|error|, which sees one wrong element, and the root mean square, which sees a small error
everywhere. Each is divided by its noise floor; the larger quotient is the probe's `ratio`.

The floor is what float32 arithmetic alone costs the *original*: its run in its own software,
pooled with runs of our own forward whose embeddings were moved by one unit in the last place.
One run alone would not do. In an ill-conditioned model rounding is amplified along few
directions, so that the error of a run is like |g| times a constant, g normal: the quotient of
two such has a Cauchy tail and exceeds 10 once in 16 times. Pooling several draws tames it.
The floor is never below the rounding of the logits themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from converter.verification.measuring import Errors

MAX_RATIO = 8.0
"""How many times float32's own noise an honest artifact may be off.

Measured on 240 honest conversions of random and ill-conditioned models under either
TransformerLens, 3,900 probes (scripts/honest): 99 in 100 are below 2.1, the worst is at 5.1.
(With the original's one run as the floor, a few in a thousand would exceed 18.) Of the faults that
change the function (scripts/faults), the faintest, another epsilon, is at 30; a lost window, swapped
heads, a shifted position or a dropped bias are at ten thousand to several million.
"""
ULP32 = 2.0**-23
"""float32's unit in the last place, relative."""


@dataclass(frozen=True)
class Floor:
    """What float32 arithmetic alone costs the original on a probe."""

    max_abs: float
    rms: float
    by_position: tuple[float, ...] = ()


def widest(floors: Sequence[Floor], *, share: float = 1.0) -> Floor:
    """The floor that holds on any of several probes, times `share`."""
    return Floor(share * max(f.max_abs for f in floors), share * max(f.rms for f in floors))


def pooled_floor(runs: Sequence[Errors], *, ulp: float = ULP32) -> Floor:
    """The floor that several runs of the original show together, whose unit in the last place
    is `ulp`."""
    scale = max(run.scale for run in runs)
    positions = (max(errors) for errors in zip(*(run.by_position for run in runs), strict=True))
    return Floor(
        by_position=tuple(max(error, 2 * ulp * scale) for error in positions),
        # Logit and normaliser are each rounded by up to half a unit, in either run.
        max_abs=max(*(run.max_abs for run in runs), 2 * ulp * scale),
        rms=max(math.sqrt(sum(run.rms**2 for run in runs) / len(runs)), ulp * scale),
    )
