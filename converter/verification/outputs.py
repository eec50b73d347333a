"""A graph's outputs beside logits and cache, against the hook points whose names they have.

In a graph whose nodes are known to be what its config makes, so are they. Where another tool wrote the
graph, or went over it, only running it shows what an output holds: no logit depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from converter.onnx.hooks import hook_names
from converter.onnx.opening import reader_of
from converter.route import Route
from converter.verification.evidence import Evidence, NotComparable
from converter.verification.exact import Truth
from converter.verification.logits import Tensors
from converter.verification.onnx_runtime import OnnxRuntime
from converter.verification.probes import Probe
from converter.verification.program import MAX_TIMES, ULP64, exactly, few_of
from converter.verification.reference import forward
from converter.verification.runtime import Runtime
from converter.verification.subjects import Subject

_DRAWS = 2
_NEVER_WHOLE = ("attn.hook_attn_scores", "attn.hook_pattern")
"""Hook points that the reference does not show."""


def compare_outputs(
    route: Route,
    subject: Subject,
    runtime: Runtime,
    true: Truth,
    seed: int,
    *,
    same: bool,
    lossy: bool,
) -> tuple[list[Evidence], list[str]]:
    """Evidence, for the program link, of outputs that are not the hook points they are named after;
    and a remark on those that could not be compared.

    Args:
        true: of the probes, of which a few are run.
        same: the graph's weights are the route's. Where they are not known, neither are the streams,
            which processing moves.
        lossy: limits were stated, which say nothing of these outputs.
    """
    graph = subject.checkpoint
    named = reader_of(graph).file.hooks
    points = set(hook_names(graph.config)) if not lossy and (same or graph.complete) else set()
    wanted = [n for n in named if n in points and not n.endswith(_NEVER_WHOLE)]
    few = [p for p in few_of(graph.config, true.probes).values() if runtime.runs_exactly(p)]
    found: list[Evidence] = []
    if wanted and few:
        assert isinstance(runtime, OnnxRuntime)
        source = graph if graph.complete else route.into(graph)
        try:
            name = f"{subject.name} (onnxruntime)"
            found = _compared(runtime, source, few, wanted, name, seed)
        except NotComparable:
            wanted = []
    left = [name for name in named if name not in wanted or not few]
    some = f"{', '.join(left[:4])}{' …' * (len(left) > 4)}"
    return found, [f"Outputs of {graph.graph_file} that were not compared: {some}."] if left else []


@dataclass
class _Point:
    """What the reference has at a hook point."""

    exact: list[Tensor] = field(default_factory=list)
    """Of each probe [batch, pos, width]."""
    noise: float = 0.0
    """What rounding makes of it, relative to its largest element."""


def _compared(
    runtime: OnnxRuntime,
    source: Tensors,
    probes: Sequence[Probe],
    names: Sequence[str],
    subject: str,
    seed: int,
) -> list[Evidence]:
    count = len(probes)
    points = {name: _Point() for name in names}

    def keep(index: int, name: str, value: Tensor) -> None:
        if (point := points.get(name)) is None:
            return
        rows = _rows(value, probes[index % count])
        if index < count:
            point.exact.append(rows)
        else:
            exact = point.exact[index % count]
            point.noise = max(point.noise, _off(rows, exact) / _scale(exact))

    copies = range(count * _DRAWS)
    jitter = [*[None] * count, *(seed * 1000 + copy for copy in copies)]
    forward(source, [*probes] * (1 + _DRAWS), dtype=torch.float64, jitter=jitter, tap=keep)
    worst: dict[str, tuple[float, float, str]] = {}
    for index, probe in enumerate(probes):
        outputs = exactly(partial(runtime.exact_outputs, names=names), probe)
        for name, value in outputs.items():
            exact, rows = points[name].exact[index], _rows(value, probe)
            off = _off(rows, exact) if rows.shape == exact.shape else math.inf
            allowed = MAX_TIMES * max(points[name].noise, ULP64) * _scale(exact)
            worst[name] = max(worst.get(name, (0.0, 0.0, "")), (off / allowed, off, probe.name))
    wrong = [name for name, (times, _, _) in worst.items() if times > 1]
    if not wrong:
        return []
    times, off, probe_name = worst[wrong[0]]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    why = (
        f"{subject}: the output {wrong[0]}{more} is not that hook point: in float64 it is off by"
        f" {off:.2e}, {times:.3g} times what is allowed (probe {probe_name!r})."
    )
    return [Evidence.differing(subject, "program", wrong[0], why)]


def _rows(value: Tensor, probe: Probe) -> Tensor:
    """[batch, pos, …] without padding, as [rows, width]."""
    rows = value.flatten(0, 1).flatten(1)
    return rows if probe.mask is None else rows[torch.from_numpy(probe.mask.reshape(-1).copy())]


def _off(found: Tensor, exact: Tensor) -> float:
    """The largest difference. NaN and infinities belong where the other has them."""
    same = (found == exact) | (found.isnan() & exact.isnan())
    off = (found - exact).abs().masked_fill(same, 0.0)
    return float(off.nan_to_num(nan=math.inf, posinf=math.inf).max()) if off.numel() else 0.0


def _scale(exact: Tensor) -> float:
    finite = exact[exact.isfinite()]
    return float(finite.abs().max()) or 1.0 if finite.numel() else 1.0
