"""What an artifact is held to: the float64 reference of its rounded weights, and the noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from converter.checkpoint import Checkpoint, NeoConfig
from converter.dtypes import CODES
from converter.processing import Rounding
from converter.progress import Progress
from converter.route import Expected, Route, Undoing
from converter.verification.judge import Errors, Floor, measure, pooled_floor
from converter.verification.probes import AFFORDABLE, Probe, cost
from converter.verification.reference import Forward, Source, forward
from converter.verification.runtimes import exact_float32

_DECOMPOSED = 8
"""TransformerLens's decompositions in float32 cost as much as this many roundings of its storage:
17 times what one does to the function was measured, of 64 allowed; without them 1.8, of 8."""
_FEW = 64
"""Positions up to which a probe is cheap for any model."""


@dataclass(frozen=True)
class Standard:
    """What artifacts of certain dtypes are held to."""

    reference: Forward
    """float64, of the weights as these dtypes round them."""
    floors: Sequence[Floor]
    honest: Sequence[Errors]
    """A float32 run of the original for each probe: where NaN and infinity belong."""
    costs: Sequence[Errors | None]
    """What rounding alone does to each probe; None where nothing is rounded."""


def standard_for(
    route: Route,
    artifact: Checkpoint,
    true: Forward,
    own: Sequence[Errors | None],
    seed: int,
    say: Progress,
    *,
    itself: bool = False,
) -> tuple[Standard, list[list[Errors]]]:
    """What this artifact is held to, and the noise that went into it.

    `itself`: to its own stored weights, which have been judged.
    """
    probes, device = true.probes, true.final[0].device
    rounded: Source | None = artifact if itself else rounding(route, artifact)
    reference = true
    costs: list[Errors | None] = [None] * len(probes)
    if rounded is not None:
        say("reference: float64, weights rounded")
        reference = forward(rounded, probes, dtype=torch.float64, device=device)
        pairs = (partial(reference.at, index) for index in range(len(probes)))
        costs = [measure(true, index, [rows])[0] for index, rows in enumerate(pairs)]
    say("noise floor")
    noise = noise_of(rounded or route.source, reference, seed)
    draws = [[*([run] if run else []), *more] for run, more in zip(own, noise, strict=True)]
    floors = [pooled_floor(runs) for runs in draws]
    return Standard(reference, floors, [runs[0] for runs in draws], costs), noise


def rounding(route: Route, artifact: Checkpoint) -> Expected | None:
    """The weights as the artifact's dtype rounds them; None where it is no coarser than the
    original's, so that all the rounding there is belongs to the judged error. Weights that are
    computed, not moved, are rounded by a 16-bit dtype even if it is the original's own."""
    original = route.source
    if undoes_rounding(route):
        return Expected(route, {key: artifact.code(key) for key in artifact.slots})

    def rounds(key: str) -> bool:
        a, b = original.code(key), artifact.code(key)
        computed = route.whole_units and CODES[b].itemsize < 4
        return CODES[b].itemsize <= CODES[a].itemsize and (a != b or computed)

    if not route.rescales and not any(rounds(key) for key in original.stored):
        return None
    return Expected(route, {key: artifact.code(key) for key in artifact.slots})


def undoes_rounding(route: Route) -> bool:
    """Whether the route goes back to what was there before its source was stored in 16 bits."""
    return route.name == "undoing" and CODES[route.source.dtype].itemsize < 4


def changed_function(
    route: Route, true: Forward, standard: Standard, limit: float, seed: int, say: Progress
) -> list[str]:
    """Rounding would hide a fault of processing: without it, the function must be the same.

    Undoing what was stored in 16 bits is asked twice. With every tensor made from the file, the
    function must be the file's. With the original ones put back where no edit reached, it is
    another, by what storing them had cost.
    """
    if standard.reference is true or not route.whole_units:
        return []
    say("processing: float64")
    if not undoes_rounding(route):
        return _departs(route, true, standard.floors, limit, "float32's own noise")
    assert isinstance(route, Undoing)
    from_file = replace(route, from_file=True, tied=False)
    problems = _departs(from_file, true, standard.floors, limit, "float32's own noise")
    say("what storing the source had cost")
    floors = storage_floors(route.source, true, seed)
    return problems or _departs(route, true, floors, limit, "what storing the source cost")


def departs(
    artifact: Checkpoint,
    true: Forward,
    standard: Standard,
    limit: float,
    seed: int,
    say: Progress,
    *,
    decomposed: bool,
) -> list[str]:
    """A sentence where an artifact's stored weights compute another function than the original's,
    by more than moving them at random within their rounding does.

    `decomposed`: the heads are in a basis of TransformerLens's making, in float32.
    """
    say("what storing the artifact costs")
    limit *= _DECOMPOSED if decomposed and CODES[artifact.dtype].itemsize >= 4 else 1
    floors = storage_floors(artifact, standard.reference, seed)
    for probe, spent, floor in zip(true.probes, standard.costs, floors, strict=True):
        ratio = spent.ratio(floor) if spent else 0.0
        if not ratio <= limit:
            return [
                f"The stored weights compute another function (probe {probe.name!r},"
                f" {ratio:.3g} times what rounding them does)."
            ]
    return []


def _departs(
    route: Route, true: Forward, floors: Sequence[Floor], limit: float, unit: str
) -> list[str]:
    """A sentence where the unrounded weights that a route makes compute another function."""
    device = true.final[0].device
    made = forward(Expected(route, "F64"), true.probes, dtype=torch.float64, device=device)
    for index, (probe, floor) in enumerate(zip(true.probes, floors, strict=True)):
        ratio = measure(true, index, [partial(made.at, index)])[0].ratio(floor)
        if not ratio <= limit:
            return [
                f"Before rounding, the weights made compute another function (probe"
                f" {probe.name!r}, {ratio:.3g} times {unit})."
            ]
    return []


@dataclass(frozen=True)
class Stored:
    """A checkpoint's weights, each moved at random by up to what its storage may have moved it."""

    checkpoint: Checkpoint
    seed: int

    @property
    def config(self) -> NeoConfig:
        return self.checkpoint.config

    def tensor(self, key: str) -> np.ndarray:
        """float64, in `hooked` axes."""
        own = self.checkpoint.tensor(key, "F64")
        rounding = Rounding.of(self.checkpoint.code(key))
        rng = np.random.default_rng([self.seed, *key.encode()])
        bound = np.where(own == 0, 0, rounding.relative * np.abs(own) + rounding.absolute)
        return np.asarray(own + bound * rng.uniform(-1, 1, own.shape))


def storage_floors(source: Checkpoint, true: Forward, seed: int) -> list[Floor]:
    """For each probe, what rounding to the source's own dtype does to its function."""
    device, total = (
        true.final[0].device,
        sum(cost(source.config, p.tokens.size) for p in true.probes),
    )
    runs = [
        forward(Stored(source, seed * 1000 + draw), true.probes, dtype=torch.float64, device=device)
        for draw in range(16 if total < AFFORDABLE / 10 else 4)
    ]
    return [
        pooled_floor(measure(true, index, [partial(run.at, index) for run in runs]))
        for index in range(len(true.probes))
    ]


def noise_of(source: Source, reference: Forward, seed: int) -> list[list[Errors]]:
    """For each probe, our own float32 runs with jittered embeddings, against the reference."""
    probes = reference.probes
    total = sum(cost(source.config, p.tokens.size) for p in probes)
    draws = [_draws(probe, total) for probe in probes]
    many = [probe for probe, count in zip(probes, draws, strict=True) for _ in range(count)]
    results, first = [], 0
    with exact_float32():
        jittered = forward(
            source, many, dtype=torch.float32,
            device=reference.final[0].device, jitter=[seed * 1000 + i for i in range(len(many))],
        )  # fmt: skip
        for index, count in enumerate(draws):
            rows = [partial(jittered.at, copy) for copy in range(first, first + count)]
            results.append(measure(reference, index, rows))
            first += count
    return results


def _draws(probe: Probe, total: float) -> int:
    """Few positions say little of the noise, and cost little: they are drawn more often.
    `total`: what running all probes once costs."""
    if probe.tokens.size <= _FEW:
        return 8
    return 4 if total < AFFORDABLE / 10 else 2
