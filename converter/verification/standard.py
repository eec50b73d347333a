"""What an artifact is held to: the float64 reference of its rounded weights, and the noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from converter.checkpoint import Checkpoint
from converter.dtypes import CODES
from converter.progress import Progress
from converter.route import Route, Weights
from converter.verification.exact import Truth
from converter.verification.judge import Floor, pooled_floor
from converter.verification.logits import Forward, Tensors
from converter.verification.measuring import Errors, Rows, measure, measure_rows
from converter.verification.probes import AFFORDABLE, Probe, cost
from converter.verification.reference import forward
from converter.verification.runtime import exact_float32

_FEW = 64
"""Positions up to which a probe is cheap for any model."""


@dataclass(frozen=True)
class Standard:
    """What artifacts of certain dtypes are held to."""

    reference: Truth
    """float64, of the weights as these dtypes round them."""
    floors: Sequence[Floor]
    honest: Sequence[Errors]
    """A float32 run of the original for each probe: where NaN and infinity belong."""
    costs: Sequence[Errors | None]
    """What rounding alone does to each probe; None where nothing is rounded."""


def standard_for(
    route: Route,
    artifact: Checkpoint,
    true: Truth,
    own: Sequence[Errors | None],
    noise: Sequence[Sequence[Errors]],
    seed: int,
    say: Progress,
    *,
    itself: bool = False,
) -> Standard:
    """What this artifact is held to. `own`, `noise`: float32 runs of the original.

    `itself`: to its own stored weights, which have been judged.
    """
    probes, device = true.probes, true.device
    rounded: Tensors | None = artifact if itself else rounding(route, artifact)
    reference = true
    costs: list[Errors | None] = [None] * len(probes)
    if rounded is not None:
        say("reference: float64, weights rounded")
        stored = forward(rounded, probes, dtype=torch.float64, device=device).keeping()
        pairs = (partial(stored.at, index) for index in range(len(probes)))
        costs = [measure(true, index, [rows])[0] for index, rows in enumerate(pairs)]
        say("noise floor")
        reference, noise = stored, noise_of(rounded, stored, seed)
    draws = [[*([run] if run else []), *more] for run, more in zip(own, noise, strict=True)]
    floors = [pooled_floor(runs) for runs in draws]
    return Standard(reference, floors, [runs[0] for runs in draws], costs)


def rounding(route: Route, artifact: Checkpoint) -> Weights | None:
    """The weights as the artifact's dtype rounds them; None where it is no coarser than the
    original's, so that all the rounding there is belongs to the judged error. Weights that are
    computed, not moved, are rounded by a 16-bit dtype even if it is the original's own."""
    original = route.source
    if undoes_rounding(route):
        return route.into(artifact)

    def rounds(key: str) -> bool:
        a, b = original.code(key), artifact.code(key)
        computed = route.whole_units and CODES[b].itemsize < 4
        return CODES[b].itemsize <= CODES[a].itemsize and (a != b or computed)

    if not route.rescales and not any(rounds(key) for key in original.stored):
        return None
    return route.into(artifact)


def undoes_rounding(route: Route) -> bool:
    """Whether the route goes back to what was there before its source was stored in 16 bits."""
    return route.name == "undoing" and route.source.coarse


def noise_of(source: Tensors, reference: Forward, seed: int) -> list[list[Errors]]:
    """For each probe, our own float32 runs with jittered embeddings, against the reference."""
    probes, whole = reference.probes, reference.wholes
    total = sum(cost(source.config, p.tokens.size) for p in probes)
    draws = [_draws(probe, total) for probe in probes]
    # A draw of a whole serves its parts, which are drawn more often if they are short.
    own = [
        range(0 if whole[i] == i else min(draws[i], draws[whole[i]]), draws[i])
        for i in range(len(probes))
    ]
    # Those of a short one are one batch: the more rows a product has, the less each of them takes.
    many = [
        (i, draw, count)
        for i, more in enumerate(own)
        for count in [len(more) if probes[i].tokens.size <= _FEW else 1]
        for draw in more[:: count or 1]
    ]
    results: list[list[Rows]] = [[] for _ in probes]
    with exact_float32():
        jittered = forward(
            source, [probes[i].repeated(count) for i, _, count in many], dtype=torch.float32,
            device=reference.device, jitter=[seed * 1000 + draw for _, draw, _ in many],
        )  # fmt: skip
        for index in sorted(range(len(probes)), key=lambda i: whole[i] != i):
            copies = [
                run
                for place, (i, _, count) in enumerate(many)
                if i == index
                for run in jittered.each(place, count)
            ]
            batch, length = probes[index].tokens.shape
            if whole[index] != index:
                results[index] = [rows.part(batch, length) for rows in results[whole[index]]]
            if copies:
                results[index] += measure_rows(reference, index, copies)
    return [[rows.errors() for rows in found] for found in results]


def _draws(probe: Probe, total: float) -> int:
    """Few positions say little of the noise, and cost little: they are drawn more often.
    `total`: what running all probes once costs."""
    if probe.tokens.size <= _FEW:
        return 8
    return 4 if total < AFFORDABLE / 10 else 2
