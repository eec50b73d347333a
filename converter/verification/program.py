"""The program link: the software of a subject, in float64, against our reference on the same weights.

Both compute in float64 from the same stored values, so that nothing but float64's rounding is
between them: nine digits below float32's noise, a fault in the program has nowhere to hide. What
the weights are, and how float32 rounds, are other links' questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from converter.verification.evidence import Evidence, NotComparable
from converter.verification.judge import Errors, Floor, measure, pooled_floor
from converter.verification.probes import Probe
from converter.verification.reference import Forward, Source, forward
from converter.verification.runtimes import Runtime

MAX_TIMES = 64.0
"""How many times float64's own noise a program may be off."""
ULP = 2.0**-52
"""float64's unit in the last place, relative."""
_DRAWS = 2


@dataclass(frozen=True)
class Reference:
    """What a program is held to: our own forward pass in float64, and what rounding makes of it."""

    exact: Forward
    probes: tuple[Probe, ...]
    noise: tuple[Errors, ...]
    """A run of the same whose embeddings were moved by a unit in the last place, for each probe."""
    floor: Floor
    """Of all probes together. Where attention is sharp a single rounding shows or does not, as
    it falls: a probe's own few draws may all miss it."""

    @staticmethod
    def of(source: Source, probes: Sequence[Probe], *, seed: int = 0) -> Reference:
        """
        Args:
            source: the stored weights that the program runs on, and the config that says what
                it is to compute.
        """
        count = len(probes)
        copies = range(count * _DRAWS)
        jitter = [*[None] * count, *(seed * 1000 + copy for copy in copies)]
        exact = forward(source, [*probes] * (1 + _DRAWS), dtype=torch.float64, jitter=jitter)
        noise = [
            measure(exact, i, [partial(exact.at, copy) for copy in range(i + count, len(jitter), count)])
            for i in range(count)
        ]  # fmt: skip
        floors = [pooled_floor(runs, ulp=ULP) for runs in noise]
        floor = Floor(max(f.max_abs for f in floors), max(f.rms for f in floors))
        return Reference(exact, tuple(probes), tuple(runs[0] for runs in noise), floor)


@dataclass(frozen=True)
class ProgramProbe:
    """One probe, run in float64."""

    name: str
    max_abs_logprob_diff: float
    noise_floor: float
    """The largest |Δ log p| that float64's own rounding gives."""
    ratio: float
    """How many times its floor the error is, by maximum or by root mean square."""


@dataclass(frozen=True)
class Program:
    """The evidence, and what it is made of."""

    evidence: Evidence
    probes: tuple[ProgramProbe, ...] = ()


def compare_program(runtime: Runtime, reference: Reference, subject: str | None = None) -> Program:
    """Run the probes that the software can run, and measure how far from the reference it is.

    Args:
        subject: what is examined, for people; None: the software's name.
    """
    subject = subject or runtime.what
    try:
        found = tuple(_measured(runtime, reference))
    except NotComparable as error:
        return Program(Evidence.not_comparable(subject, "program", error.why))
    worst = max(found, key=lambda probe: probe.ratio)
    evidence = Evidence.measured(
        subject, "program", worst.name, worst.max_abs_logprob_diff, worst.ratio / MAX_TIMES
    )
    return Program(evidence, found)


def _measured(runtime: Runtime, reference: Reference) -> list[ProgramProbe]:
    found, compared = [], 0
    for index, probe in enumerate(reference.probes):
        if not runtime.runs_exactly(probe):
            continue
        logits = _logits(runtime, probe)
        (run,) = measure(reference.exact, index, [logits])
        honest, floor = reference.noise[index], reference.floor
        # NaN and infinities belong where the reference has them.
        ratio = run.ratio(floor) if run.same_classes(honest) else float("inf")
        found.append(ProgramProbe(probe.name, run.max_abs, floor.max_abs, ratio))
        compared += honest.compared
    if not found:
        raise NotComparable("it has not what the probes need")
    if not compared:
        raise NotComparable("no log-probability is finite")
    return found


def _logits(runtime: Runtime, probe: Probe) -> torch.Tensor:
    try:
        return runtime.exact_logits(probe)
    except (NotComparable, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # of any library that was not made for float64
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotComparable(
            f"in float64 it stops at probe {probe.name!r}: {reason[:200]}"
        ) from error
