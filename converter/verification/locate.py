"""Where artifact and original part: residual streams unit by unit, then the unit's tensors.

Streams are centred over d before they are compared: TransformerLens's processing changes them by
their mean, which no LayerNorm sees, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from converter.checkpoint import Checkpoint
from converter.dtypes import same_bits
from converter.route import Expected, Route
from converter.verification.function import threads_for
from converter.verification.judge import ULP
from converter.verification.probes import Probe, cost
from converter.verification.reference import Source, forward
from converter.verification.result import Divergence, Layers, UnitError
from converter.verification.runtimes import exact_float32
from converter.verification.standard import rounding
from converter.verification.subjects import Subject

_DRAWS = 4
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
            found, what = _streams(artifact, [probe], torch.float32)[0], "neoconvert's own forward"
    units = []
    for unit, stream in exact.items():
        if unit in found:
            scale = float(stream.abs().max()) or 1.0
            floor = max(_furthest(draw[unit], stream, probe) for draw in noise)
            error = _furthest(found[unit], stream, probe)
            units.append(UnitError(unit, error / scale, max(floor / scale, ULP)))
    return Layers(what, probe.name, tuple(units))


def _streams(
    source: Source, probes: Sequence[Probe], dtype: torch.dtype, jitter: Sequence[int] | None = None
) -> list[Streams]:
    """Centred residual streams by unit, for each probe."""
    streams: list[Streams] = [{} for _ in probes]

    def keep(unit: str, residuals: Sequence[Tensor]) -> None:
        for mine, residual in zip(streams, residuals, strict=True):
            if unit != "final":
                mine[unit] = _centred(residual)

    with exact_float32():
        forward(source, probes, dtype=dtype, jitter=jitter, watch=keep)
    return streams


def _centred(stream: Tensor) -> Tensor:
    wide = stream.to("cpu", torch.float64)
    return wide - wide.mean(-1, keepdim=True)


def _furthest(found: Tensor, expected: Tensor, probe: Probe) -> float:
    error = (_centred(found) - expected).abs().amax(-1)
    if probe.mask is not None:
        error = error[torch.from_numpy(probe.mask)]
    return float(error.max())


def locate(route: Route, artifact: Checkpoint, layers: Layers, max_ratio: float) -> Divergence:
    """The first unit that is off float32's noise, and the tensor of it most likely at fault.

    Where no stream is off, the weights decide; and where these are the same too, what follows
    the last block.
    """
    off = next((u.unit for u in layers.units if not u.ratio <= max_ratio), None)
    differing = _differing(route, artifact)
    if off is None:
        off = next((unit for unit, tensors in differing.items() if tensors), "final")
    # Where every unit differs, the route is not the one the artifact took, and tells nothing.
    tensors = {} if all(differing.values()) else differing.get(off, {})
    return Divergence(off, max(tensors, key=tensors.__getitem__) if tensors else None)


def _differing(route: Route, artifact: Checkpoint) -> dict[str, dict[str, float]]:
    """By unit, the tensors that are not what the route makes, with their relative difference."""
    if not artifact.complete:
        return {}
    made = Expected(route, {key: artifact.code(key) for key in artifact.slots})
    units: dict[str, dict[str, float]] = {}
    for key, slot in artifact.slots.items():
        tensors = units.setdefault(slot.place, {})
        found, expected = artifact.tensor(key), made.tensor(key)
        if not same_bits(found, expected) and (difference := _relative(found, expected)):
            tensors[slot.name or key] = difference
    return units


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the tensor; NaN where only one of the two has it counts as infinite."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(a - b)
    difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    largest = float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
    return largest / (float(np.nan_to_num(np.abs(b)).max(initial=0.0)) or 1.0)
