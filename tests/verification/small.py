"""Faults a thousand times smaller, and single weights moved by one unit in the last place.

Float32's noise hides most of them. Only the links that are measured in float64 can tell.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from converter.checkpoint import Checkpoint, NeoConfig
from converter.choices import Effort
from converter.errors import BadInput
from converter.layout import EMBEDDING, HEAD
from converter.verification import verify
from converter.verification.program import MAX_TIMES
from tests.verification import software
from tests.verification.fault import ALL, RAW, Artifact, Edit, Fault, Weights, one, own_head, put
from tests.verification.faulty import NothingChanges, Workshop
from tests.verification.graph import Graph

SHARE = 1e-3
_NUMBERS = ("eps",)
"""Fields of the architecture that can change by a little."""


def smaller(fault: Fault, share: float = SHARE) -> Fault | None:
    """The same fault at `share` of its size. None where it has none: a window is moved by a whole
    position or not at all, a flag is set or not."""
    name = f"{share:g} of {fault.name}"
    if fault.software:
        gradual = software.smaller(fault.name, share)
        return gradual and replace(fault, name=name, software=gradual)
    if fault.graph:
        if any(
            word in fault.name
            for word in ("token", "padding", "float16", "layer global", "cache position")
        ):
            return None  # which positions are seen; a dtype
        return replace(fault, name=name, graph=_blended(fault.graph, share), faint=False)
    if fault.config:
        return replace(fault, name=name, config=partial(_nearer, fault.config, share))
    if fault.weights and not fault.document:
        return replace(fault, name=name, weights=_scaled(fault.weights, share))
    return None


def _scaled(edit: Edit, share: float) -> Edit:
    def scaled(weights: Weights, original: Checkpoint) -> None:
        before = {key: np.asarray(w, np.float64) for key, w in weights.items()}
        edit(weights, original)
        for key, after in weights.items():
            weights[key] = before[key] + share * (np.asarray(after, np.float64) - before[key])

    return scaled


def _nearer(
    config: Callable[[NeoConfig], Mapping[str, Any]], share: float, old: NeoConfig
) -> Mapping[str, Any]:
    found = {
        name: (was := getattr(old, name)) + share * (value - was)
        for name, value in config(old).items()
        if name in _NUMBERS
    }
    if not found:
        raise NothingChanges
    return found


def _blended(edit: Callable[[Graph], None], share: float) -> Callable[[Graph], None]:
    """Every node that the edit changes is there twice, as it was and as it is now; what comes
    after reads a mixture of the two."""

    def blended(graph: Graph) -> None:
        before = onnx.ModelProto()
        before.CopyFrom(graph.model)
        old = {node.name: node for node in before.graph.node}
        edit(graph)
        amount = graph.constant(np.float32(share))
        for node in [*graph.model.graph.node]:
            was = old.get(node.name)
            if was is None or node == was:
                continue
            result = was.output[0]
            if node.output[0] != result:  # the edit put something behind it
                node = next(n for n in graph.model.graph.node if result in n.output)
            honest = onnx.NodeProto()
            honest.CopyFrom(was)
            honest.name, honest.output[0] = f"{was.name}/honest", f"{result}/honest"
            node.output[0] = f"{result}/faulty"
            graph.after(
                node.name,
                honest,
                onnx.helper.make_node("Sub", [node.output[0], honest.output[0]], [f"{result}/off"], name=f"{was.name}/off"),
                onnx.helper.make_node("Mul", [f"{result}/off", amount], [f"{result}/little"], name=f"{was.name}/little"),
                onnx.helper.make_node("Add", [honest.output[0], f"{result}/little"], [result], name=f"{was.name}/mixed"),
            )  # fmt: skip

    return blended


def _next(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


B = "blocks.1."
_KINDS: dict[str, tuple[tuple[Artifact, ...], str]] = {
    EMBEDDING: (ALL, "embed"),
    "pos_embed.W_pos": (ALL, "embed"),
    **{f"{B}attn.W_{x}": (ALL, "block 1") for x in "QKVO"},
    **{f"{B}attn.b_{x}": (("processed",), "block 1") for x in "QK"},
    **{B + k: (ALL, "block 1") for k in ("attn.b_O", "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out")},
    **{f"{B}ln{n}.{x}": ((*RAW, "baked"), "block 1") for n in "12" for x in "wb"},
    **{f"ln_final.{x}": ((*RAW, "baked"), "final") for x in "wb"},
    HEAD: (ALL, "final"),
    "unembed.b_U": (("processed",), "final"),
}  # fmt: skip
"""Each kind of tensor: which artifacts store it, and the unit that reads it."""
ULPS = tuple(
    Fault(f"one ulp of {key}", on, unit, put(key, one(_next)), needs=own_head if key == HEAD else None)
    for key, (on, unit) in _KINDS.items()
)  # fmt: skip


MISSED = "missed"


@dataclass(frozen=True)
class Small:
    """What the function check alone said of one small fault."""

    fault: Fault
    artifact: Artifact
    change: float | None
    """How much the function changes, in units of float64's noise floor; None: unknown."""
    times: float
    """The worst of the program and route links, over what is allowed: above 1 is caught."""
    unit: str | None
    """The first unit that is named."""
    effort: Effort
    """The least that tells: thorough where no probe of the standard ones reaches the fault's token."""

    @property
    def wrong(self) -> str | None:
        """Why this outcome speaks against the verifier."""
        seen = self.change is None or self.change > ALLOWED
        if seen and not self.times > 1:
            return MISSED
        if self.unit is not None and self.fault.unit is not None and self.unit != self.fault.unit:
            return f"located in {self.unit}, not {self.fault.unit}"
        return None


ALLOWED = 2 * MAX_TIMES
"""A change that cannot be missed, in units of float64's noise floor: the run's own noise, which may
be as large as what is allowed, may take from it."""


def judge(workshop: Workshop, fault: Fault, artifact: Artifact) -> Small | None:
    """None: in the dtype of the weights nothing changes."""
    with tempfile.TemporaryDirectory(dir=workshop.directory) as scratch:
        try:
            spoiled = workshop.spoil(fault, artifact, Path(scratch) / "artifact")
        except NothingChanges:
            return None
        change = workshop.change_in_float64(fault, artifact, spoiled)
        for effort in get_args(Effort)[1:]:
            try:
                with fault.software() if fault.software else contextlib.nullcontext():
                    result = verify(
                        workshop.original, spoiled, checks=["function"], device="cpu", effort=effort
                    )
            except BadInput:  # its software refuses it, so that nothing is left to be measured
                return Small(fault, artifact, change, math.inf, None, effort)
            links = [e for e in result.evidence if e.link in ("program", "route")]
            times = [e.times for e in links if e.times is not None]
            if set(result.problems) - {e.problem for e in result.evidence}:
                times.append(math.inf)  # the software that runs the original too is what is wrong
            unit = result.first_divergence.unit if result.first_divergence else None
            found = Small(fault, artifact, change, max(times, default=math.nan), unit, effort)
            if found.wrong != MISSED:  # what is in one token may need every token
                break
        return found
