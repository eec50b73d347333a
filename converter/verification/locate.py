"""Where artifact and original part: unit by unit, then the unit's tensors.

Streams are centred over d before they are compared: TransformerLens's processing changes them by
their mean, which no LayerNorm sees, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from converter.checkpoint import Checkpoint
from converter.dtypes import same_bits
from converter.route import Route
from converter.verification.judge import ULP32
from converter.verification.loading import OWN
from converter.verification.logits import Tensors
from converter.verification.measuring import measure
from converter.verification.passes import threads_for
from converter.verification.probes import Probe, cost, wholes
from converter.verification.program import MAX_TIMES, ULP64
from converter.verification.reference import forward
from converter.verification.result import Divergence, Layers, UnitError
from converter.verification.runtime import exact_float32
from converter.verification.standard import rounding
from converter.verification.subjects import Subject

_DRAWS = 4
_LONG = 600
"""Positions of the longest probe that is looked into."""
Streams = dict[str, Tensor]


def layers_of(route: Route, subject: Subject, probe: Probe, seed: int = 0) -> Layers:
    """How far the artifact's residual stream is from the original's after each unit.

    The stream is the one inside the software that runs the artifact, or where that does not show
    it, our own forward's of the artifact's weights.
    """
    artifact = subject.checkpoint
    with threads_for(cost(artifact.config, probe.tokens.size)):
        source = rounding(route, artifact) or route.source
        exact = _streams(source, [probe], torch.float64)[0]
        noise = _streams(source, [probe] * _DRAWS, torch.float32, range(seed, seed + _DRAWS))
        runtime = subject.open()
        found = runtime.streams(probe) if runtime.runs(probe) else {}
        what = runtime.what
        if not found and artifact.complete:
            found, what = _streams(artifact, [probe], torch.float32)[0], OWN
    units = []
    for unit, stream in exact.items():
        if unit in found:
            scale = float(stream.abs().max()) or 1.0
            floor = max(_furthest(draw[unit], stream, probe) for draw in noise)
            error = _furthest(found[unit], stream, probe)
            units.append(UnitError(unit, error / scale, max(floor / scale, ULP32)))
    return Layers(what, probe.name, tuple(units))


def _streams(
    source: Tensors,
    probes: Sequence[Probe],
    dtype: torch.dtype,
    jitter: Sequence[int] | None = None,
) -> list[Streams]:
    """Centred residual streams by unit, for each probe."""
    streams: list[Streams] = [{} for _ in probes]

    def keep(unit: str, residuals: list[Tensor]) -> None:
        for mine, residual in zip(streams, residuals, strict=True):
            if unit != "final":
                mine[unit] = _centred(residual)

    with exact_float32():
        forward(source, probes, dtype=dtype, jitter=jitter, watch=keep)
    return streams


def _wide(stream: Tensor) -> Tensor:
    return stream.to("cpu", torch.float64)


def _centred(stream: Tensor) -> Tensor:
    wide = _wide(stream)
    return wide - wide.mean(-1, keepdim=True)


def _furthest(found: Tensor, expected: Tensor, probe: Probe) -> float:
    return _size(_centred(found) - expected, probe)


def _size(difference: Tensor, probe: Probe) -> float:
    error = difference.abs().amax(-1)
    if probe.mask is not None:
        error = error[torch.from_numpy(probe.mask)]
    return float(error.max())


def faulty_units(
    route: Route,
    failed: Sequence[tuple[Probe, Subject]],
    layers: Layers,
    limit: float,
    *,
    exact: bool,
) -> tuple[Divergence, ...]:
    """The units at fault, in forward order, with the tensor of each most likely to be it.

    Each unit is given the residual stream that the route's weights have there, so that no unit
    answers for another: what it then adds is the route's, within `limit` times float32's noise, or
    it is at fault. Where the weights are blameless, it is the unit in which the stream inside the
    software first leaves the noise; and where the software does not show it, none is named.

    Args:
        exact: float32 shows nothing; the noise is float64's, and the route's weights are as stored.
    """
    found: dict[str, Divergence] = {}
    for artifact, probes in _with_weights(failed):
        off = _forced(route, artifact, probes, limit, exact)
        differing = _differing(route, artifact)
        # Where every unit differs, the route is not the one the artifact took, and shows nothing.
        astray = all(differing.values())
        for unit in off:
            keys = {} if astray else differing.get(unit, {})
            if keys:
                key = max(keys, key=keys.__getitem__)
                place = Divergence(unit, artifact.tensor_name(key))
            else:
                place = Divergence(unit, None)
            found.setdefault(unit, place)
    if found:
        return tuple(found[unit] for unit in _units(route) if unit in found)
    if exact or layers.runtime == OWN:
        return ()
    left = [u.unit for u in layers.units if not u.ratio <= limit]
    return (Divergence(left[0] if left else "final", None),) if layers.units else ()


def _units(route: Route) -> list[str]:
    return list(dict.fromkeys(slot.place for slot in route.source.slots.values()))


def _with_weights(
    failed: Sequence[tuple[Probe, Subject]],
) -> Iterator[tuple[Checkpoint, list[Probe]]]:
    """Each checkpoint whose weights are known, with the probes that failed."""
    seen: set[int] = set()
    for _, subject in failed:
        artifact = subject.checkpoint
        if id(artifact) in seen or not artifact.complete:
            continue
        seen.add(id(artifact))
        own = [probe for probe, other in failed if other.checkpoint is artifact]
        short = [probe for probe in own if probe.tokens.shape[1] <= _LONG] or own[:1]
        yield artifact, [short[i] for i in sorted(set(wholes(short)))]


def _forced(
    route: Route, artifact: Checkpoint, probes: Sequence[Probe], limit: float, exact: bool
) -> set[str]:
    """Units that make something else than the route's of the route's own stream."""
    probes = [replace(probe, prefill=None) for probe in probes]
    source: Tensors = rounding(route, artifact) or route.source
    ulp, plain = ULP32, _centred
    if exact:
        source = route.into(artifact)
        ulp, limit, plain = ULP64, limit * MAX_TIMES * ULP64 / ULP32, _wide
    streams: dict[str, list[Tensor]] = {}

    def keep(unit: str, residuals: list[Tensor]) -> None:
        streams[unit] = list(residuals)

    def made(source: Tensors, dtype: torch.dtype) -> dict[str, list[float]]:
        errors: dict[str, list[float]] = {}

        def force(unit: str, residuals: list[Tensor]) -> None:
            if unit == "final":
                return
            pairs = zip(map(plain, residuals), map(plain, streams[unit]), strict=True)
            errors[unit] = [
                _size(a - b, probe) for (a, b), probe in zip(pairs, probes, strict=True)
            ]
            residuals[:] = [stream.to(dtype) for stream in streams[unit]]

        with exact_float32():
            ran = forward(source, probes, dtype=dtype, watch=force)
        runs = [measure(true, i, [partial(ran.at, i)])[0] for i in range(len(probes))]
        errors["final"] = [run.max_abs for run in runs]
        return errors

    with threads_for(cost(artifact.config, sum(probe.tokens.size for probe in probes))):
        true = forward(source, probes, dtype=torch.float64, watch=keep)
        noise, found = made(source, torch.float32), made(artifact, torch.float64)
    scales = {unit: [float(s.abs().max()) for s in kept] for unit, kept in streams.items()}
    return {
        unit
        for unit, errors in found.items()
        if any(
            not error <= limit * max(floor, ulp * scale)
            for error, floor, scale in zip(errors, noise[unit], scales[unit], strict=True)
        )
    }


def _differing(route: Route, artifact: Checkpoint) -> dict[str, dict[str, float]]:
    """By unit, the weights that are not what the route makes, with their relative difference."""
    if not artifact.complete:
        return {}
    made = route.into(artifact)
    units: dict[str, dict[str, float]] = {}
    for key, slot in artifact.slots.items():
        keys = units.setdefault(slot.place, {})
        found, expected = artifact.tensor(key), made.tensor(key)
        if not same_bits(found, expected) and (difference := _relative(found, expected)):
            keys[key] = difference
    return units


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the tensor; NaN where only one of the two has it counts as infinite."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(a - b)
    difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    largest = float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
    return largest / (float(np.nan_to_num(np.abs(b)).max(initial=0.0)) or 1.0)
