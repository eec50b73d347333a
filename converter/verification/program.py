"""The program link: the software of a subject, in float64, against our reference on the same weights.

Both compute in float64 from the same stored values, so that nothing but float64's rounding is
between them: nine digits below float32's noise, a fault in the program has nowhere to hide. What
the weights are, and how float32 rounds, are other links' questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from converter.checkpoint import NeoConfig
from converter.errors import Fault, classified
from converter.verification.evidence import Evidence, NotComparable
from converter.verification.exact import Truth
from converter.verification.judge import ULP32, Floor, pooled_floor, widest
from converter.verification.logits import Tensors
from converter.verification.measuring import measure
from converter.verification.probes import Probe, cost
from converter.verification.reference import forward
from converter.verification.runtime import Runtime

T = TypeVar("T")
MAX_TIMES = 64.0
"""How many times float64's own noise a program may be off."""
ULP64 = 2.0**-52
"""float64's unit in the last place, relative."""
_DRAWS = 2
_LONG = 600
"""Positions of the longest probe that a verification runs in float64."""
_LARGE, _STEPS = 5e8, 4e8
"""Weights of a model that runs one probe only; and of all the steps of a cache."""


@dataclass(frozen=True)
class Reference:
    """What a program is held to: our own forward pass in float64, and what rounding makes of it."""

    exact: Truth
    """Its first probes are these."""
    probes: tuple[Probe, ...]
    floor: Floor
    """Of all probes together. Where attention is sharp a single rounding shows or does not, as
    it falls: a probe's own few draws may all miss it."""

    @staticmethod
    def of(source: Tensors, probes: Sequence[Probe], *, seed: int = 0) -> Reference:
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
        floors = [pooled_floor(runs, ulp=ULP64) for runs in noise]
        return Reference(exact, tuple(probes), widest(floors))


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
    off, times = worst.max_abs_logprob_diff, worst.ratio / MAX_TIMES
    why = (
        f"{subject} does not compute GPT-Neo: in float64 it is off by {off:.2e}, {times:.3g} times"
        f" what is allowed (probe {worst.name!r})."
    )
    evidence = Evidence.measured(subject, "program", worst.name, off, times, why)
    return Program(evidence, found)


def examine_program(
    runtime: Runtime,
    stored: Truth,
    floors: Sequence[Floor],
    subject: str,
    *,
    source: Tensors | None = None,
    seed: int = 0,
) -> Evidence:
    """The program link with as little work as it takes.

    Args:
        stored: float64, of the weights that the program runs on: a few probes.
        source: these weights; None: those that `stored` knows.
        floors: float32's noise on each probe: float64's is the same, amplified from a smaller
            unit. Only what exceeds it is held to a floor of its own, which takes more runs.
    """
    probes = tuple(stored.probes)
    found = compare_program(runtime, Reference(stored, probes, floor_in_float64(floors)), subject)
    if found.evidence.outcome == "differs":
        try:
            own = Reference.of(source or stored.source, probes, seed=seed)
        except NotComparable as error:
            return Evidence.not_comparable(subject, "program", error.why)
        found = compare_program(runtime, own, subject)
    return found.evidence


def floor_in_float64(floors: Sequence[Floor]) -> Floor:
    """Float64's noise on any of the probes: float32's, amplified from a smaller unit."""
    return widest(floors, share=ULP64 / ULP32)


def few_of(config: NeoConfig, probes: Sequence[Probe]) -> dict[int, Probe]:
    """By their place: the longest, one with padding, and one with a cache, a few steps of it; and
    those of every token, where there are such: some faults show on one token alone.
    (What is behind a position changes nothing at it.) A large model runs the first, and these."""
    every_token = {i: p for i, p in enumerate(probes) if p.of_vocabulary}
    plain = [
        (i, p)
        for i, p in enumerate(probes)
        if p.mask is None and p.prefill is None and i not in every_token
    ]
    short = [(i, p) for i, p in plain if p.tokens.shape[1] <= _LONG] or plain[:1]
    few = dict([max(short, key=lambda found: found[1].tokens.shape[1])] if short else [])
    if few and cost(config, 1) > _LARGE:
        return few | every_token
    kinds = [(p.mask is not None, p.prefill is not None) for p in probes]
    for kind in ((True, False), (False, True), (True, True)):
        if kind in kinds:
            few[kinds.index(kind)] = probes[kinds.index(kind)]
    return {i: _fewer_steps(config, p) for i, p in few.items()} | every_token


def _fewer_steps(config: NeoConfig, probe: Probe) -> Probe:
    """Steps with a cache, on either side of the window's end."""
    if probe.prefill is None:
        return probe
    steps = max(2, min(8, int(_STEPS / cost(config, 1))))
    end = min(probe.tokens.shape[1], config.window_size + steps // 2)
    mask = None if probe.mask is None else probe.mask[:, :end]
    prefill = max(1, end - steps)
    return replace(probe, tokens=probe.tokens[:, :end], mask=mask, prefill=prefill)


def _measured(runtime: Runtime, reference: Reference) -> list[ProgramProbe]:
    found, compared = [], 0
    for index, probe in enumerate(reference.probes):
        if not runtime.runs_exactly(probe):
            continue
        logits = exactly(runtime.exact_logits, probe)
        (run,) = measure(reference.exact, index, [logits])
        ratio = math.inf if run.misplaced else run.ratio(reference.floor)
        found.append(ProgramProbe(probe.name, run.max_abs, reference.floor.max_abs, ratio))
        compared += run.compared + run.misplaced
    if not found:
        raise NotComparable("it has not what the probes need")
    if not compared:
        raise NotComparable("no log-probability is finite")
    return found


def exactly(run: Callable[[Probe], T], probe: Probe) -> T:
    """What a run in float64 gives.

    Raises:
        NotComparable: it stops, in whatever way.
    """
    try:
        return run(probe)
    except NotComparable:
        raise
    except Exception as error:  # of any library that was not made for float64
        said = classified(error)
        if said is not error and not isinstance(said, Fault):
            raise  # the system's, or this machine's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotComparable(
            f"in float64 it stops at probe {probe.name!r}: {reason[:200]}"
        ) from error
