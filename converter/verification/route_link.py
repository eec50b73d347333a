"""The route link: do the weights that the route makes, before they are rounded, compute what the
original does? And are the stored ones those, rounded?

Both are asked in float64, of our own forward pass: nothing but float64's rounding is between the
sides, and what storage rounding costs is computed, not allowed for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from converter.checkpoint import Checkpoint, NeoConfig
from converter.processing import Rounding, in_order
from converter.progress import Progress
from converter.route import Expected, Route, Undoing
from converter.verification.evidence import Evidence
from converter.verification.exact import Truth
from converter.verification.judge import Floor, pooled_floor, widest
from converter.verification.logits import Forward
from converter.verification.measuring import Errors, measure
from converter.verification.probes import AFFORDABLE, Probe, cost
from converter.verification.program import MAX_TIMES, ULP64, floor_in_float64
from converter.verification.reference import forward
from converter.verification.standard import Standard, undoes_rounding
from converter.verification.subjects import THE_WEIGHTS

_DECOMPOSED = 8
"""TransformerLens's decompositions in float32 cost as much as this many roundings of its storage:
17 times what one does to the function was measured, of 64 allowed; without them 1.8, of 8."""
_SHORT = 32
"""Positions that show what processing does: it knows no positions."""
_DRAWS = 4


def examine_route(
    route: Route,
    subject: str,
    artifact: Checkpoint,
    true: Truth,
    standard: Standard,
    expected: Truth,
    stored: Forward | None,
    *,
    same: bool,
    explained: Sequence[str] | None,
    known: bool,
    limit: float,
    seed: int,
    say: Progress,
) -> Evidence:
    """
    Args:
        expected: float64, of what the route makes as the artifact's dtypes round it: a few probes.
        stored: the same of the artifact's stored weights; None: they are known to be these, or
            nobody knows which they are.
        same: the stored weights are known to be what the route makes, bit for bit.
        explained: the artifact is accounted for by these steps, within the rounding of other
            arithmetic than ours, and is judged as it is stored.
        known: neoconvert made the artifact, as it says: the route is the one it took. Of others a
            route is a guess, and weights of the same function may be another's arithmetic.
        limit: how many times what rounding costs may be off, where rounding is the measure.
    """
    of = "" if subject == THE_WEIGHTS else f"{subject}: "
    made = f"{of}Before rounding, the weights made compute another function"
    if explained is not None:
        say("what storing the artifact costs")
        decomposed = any(step.decomposes for step in in_order(explained))
        decomposed = decomposed and not artifact.coarse
        floors = storage_floors(artifact, standard.reference, seed)
        errors = [cost or _NOTHING for cost in standard.costs]
        worst = _Worst.of(errors, floors, true.probes)
        return worst.evidence(
            subject, limit * (_DECOMPOSED if decomposed else 1),
            f"{of}The stored weights compute another function", "what rounding them does",
        )  # fmt: skip
    if route.whole_units and undoes_rounding(route):
        assert isinstance(route, Undoing)
        # With every tensor made from the file, the function must be the file's. With the original
        # ones put back where no edit reached, it is another, by what storing them had cost.
        from_file = replace(route, from_file=True, tied=False)
        worst = _of_route(from_file, true, standard.floors)
        if worst.ratio > limit:
            return worst.evidence(subject, limit, made, "float32's own noise")
        say("what storing the source had cost")
        worst = _of_route(route, true, storage_floors(route.source, true, seed))
        return worst.evidence(subject, limit, made, "what storing the source cost")
    if route.whole_units:
        say("processing: float64")
        processed = _processed(route, subject, made, true, standard, limit, seed)
        if processed.outcome == "differs":
            return processed
    else:
        processed = None
        say("route: float64")
    if stored is None and not same:
        why = "its weights have no names that say what they are"
        return Evidence.not_comparable(subject, "route", why)
    if stored is None:
        return processed or Evidence(subject, "route", "same", why="the weights are the original's")
    count = len(expected.probes)
    errors = [measure(expected, i, [partial(stored.at, i)])[0] for i in range(count)]
    floor, most, unit = floor_in_float64(standard.floors), MAX_TIMES, "float64's own noise"
    if not known:
        floor, most, unit = widest(standard.floors), limit, "float32's own noise"
    worst = _Worst.of(errors, [floor] * count, expected.probes)
    what = f"{of}The stored weights are not what the original makes: they compute another function"
    if differing := route.target_config.differences(artifact.config):
        what = f"{of}With its config, which differs in {', '.join(differing)}, the artifact computes another function"
    kept = worst.evidence(subject, most, what, unit)
    return kept if kept.outcome == "differs" or processed is None else processed


_NOTHING = Errors(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0)


@dataclass(frozen=True)
class _Worst:
    """The probe that is furthest off."""

    probe: str
    error: float
    ratio: float

    @staticmethod
    def of(errors: Sequence[Errors], floors: Sequence[Floor], probes: Sequence[Probe]) -> _Worst:
        found = [
            _Worst(
                probe.name,
                error.max_abs,
                math.inf if error.misplaced else error.ratio(floor),
            )
            for error, floor, probe in zip(errors, floors, probes, strict=True)
        ]
        return max(found, key=lambda worst: worst.ratio)

    def evidence(self, subject: str, limit: float, what: str, unit: str) -> Evidence:
        why = f"{what} (probe {self.probe!r}, {self.ratio:.3g} times {unit})."
        return Evidence.measured(subject, "route", self.probe, self.error, self.ratio / limit, why)


def _of_route(route: Route, true: Truth, floors: Sequence[Floor]) -> _Worst:
    """The unrounded weights that a route makes, against the original."""
    device = true.device
    made = forward(Expected(route, "F64"), true.probes, dtype=torch.float64, device=device)
    errors = [measure(true, i, [partial(made.at, i)])[0] for i in range(len(true.probes))]
    return _Worst.of(errors, floors, true.probes)


def _processed(
    route: Route,
    subject: str,
    made: str,
    true: Truth,
    standard: Standard,
    limit: float,
    seed: int,
) -> Evidence:
    """A few positions of the longest probe are enough. The floor is what float64 makes of them:
    float32's, from a smaller unit; and only if that is exceeded one of its own. Undoing is held to
    float32's: what a ledger holds, and the file it is for, were rounded to that."""
    at = max(range(len(true.probes)), key=lambda i: _plainness(true.probes[i]))
    probe = true.probes[at]
    if probe.mask is None:
        probe = replace(probe, tokens=probe.tokens[:1, :_SHORT], prefill=None)
    exact = true.part({at: probe})
    device = true.device
    ran = forward(Expected(route, "F64"), [probe], dtype=torch.float64, device=device)
    errors = measure(exact, 0, [partial(ran.at, 0)])
    if isinstance(route, Undoing):
        worst = _Worst.of(errors, [widest(standard.floors)], [probe])
        return worst.evidence(subject, limit, made, "float32's own noise")
    worst = _Worst.of(errors, [floor_in_float64(standard.floors)], [probe])
    if worst.ratio > MAX_TIMES:
        runs = [
            forward(Moved(route.source, "F64", seed * 1000 + draw), [probe], dtype=torch.float64)
            for draw in range(_DRAWS)
        ]
        floor = pooled_floor(measure(exact, 0, [partial(run.at, 0) for run in runs]), ulp=ULP64)
        worst = _Worst.of(errors, [floor], [probe])
    return worst.evidence(subject, MAX_TIMES, made, "float64's own noise")


def _plainness(probe: Probe) -> tuple[bool, int]:
    return probe.mask is None, probe.tokens.shape[1]


@dataclass(frozen=True)
class Moved:
    """A checkpoint's weights, each moved at random by up to what storing it in `code` may move it;
    None: in its own dtype."""

    checkpoint: Checkpoint
    code: str | None
    seed: int

    @property
    def config(self) -> NeoConfig:
        return self.checkpoint.config

    def tensor(self, key: str) -> np.ndarray:
        """float64, in `hooked` axes."""
        own = self.checkpoint.tensor(key, "F64")
        rounding = Rounding.of(self.code or self.checkpoint.code(key))
        rng = np.random.default_rng([self.seed, *key.encode()])
        bound = np.where(own == 0, 0, rounding.relative * np.abs(own) + rounding.absolute)
        return np.asarray(own + bound * rng.uniform(-1, 1, own.shape))


def storage_floors(source: Checkpoint, true: Truth, seed: int) -> list[Floor]:
    """For each probe, what rounding to the source's own dtype does to its function."""
    device = true.device
    total = sum(cost(source.config, p.tokens.size) for p in true.probes)
    runs = [
        forward(
            Moved(source, None, seed * 1000 + draw), true.probes, dtype=torch.float64, device=device
        )
        for draw in range(16 if total < AFFORDABLE / 10 else 4)
    ]
    return [
        pooled_floor(measure(true, index, [partial(run.at, index) for run in runs]))
        for index in range(len(true.probes))
    ]
