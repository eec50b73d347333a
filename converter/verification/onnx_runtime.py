"""An ONNX file in onnxruntime, as a runtime of verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from converter.checkpoint import Checkpoint
from converter.errors import CorruptFile
from converter.onnx.dialect import LOGITS, MASK, POSITIONS
from converter.onnx.opening import reader_of
from converter.onnx.session import Array, Edit, Session, has_cuda, past_of, with_outputs
from converter.verification.evidence import NotComparable
from converter.verification.loading import installed
from converter.verification.probes import Probe
from converter.verification.runtime import Runtime
from converter.verification.twin import twin

if TYPE_CHECKING:
    from torch import Tensor

_LARGE = 2**30
"""Bytes of weights beyond which they stay mapped, instead of being packed into a second copy."""


def open_onnx(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    required: bool = False,
    name: str | None = None,
) -> Runtime:
    """Open a checked graph in onnxruntime.

    Args:
        device: used where onnxruntime can; else the CPU is.
        required: onnxruntime was asked for by name, so that it must run on `device`.
        name: the graph's, where there are several.

    Raises:
        CannotDoHere: no onnxruntime, or `required` and it cannot use the device.
        BadInput: see `converter.onnx.read_onnx`.
    """
    cuda = device.type == "cuda" and (required or has_cuda())
    session = _session(checkpoint, device if cuda else torch.device("cpu"))
    where = device if cuda else torch.device("cpu")
    library = "onnxruntime"
    what = library if name is None else f"{library}: {name}"
    version = installed("onnxruntime") or installed("onnxruntime-gpu")
    return OnnxRuntime(library, what, version, where, checkpoint, session)


def lacks(graph: Checkpoint, probe: Probe) -> str | None:
    """The input that a probe needs and the graph does not have, if there is one."""
    file = reader_of(graph).file
    if probe.prefill is not None and not file.with_past:
        return "past_key_values"
    if probe.mask is not None and MASK not in file.inputs:
        return MASK
    if (probe.mask is not None or probe.start) and POSITIONS not in file.inputs:
        return POSITIONS
    return None


def inputs_lacking(graph: Checkpoint, probes: Sequence[Probe]) -> list[str]:
    """One sentence for each input that a graph lacks, with what cannot be asked without it."""
    missing: dict[str, list[str]] = {}
    for probe in probes:
        if (name := lacks(graph, probe)) is not None:
            missing.setdefault(name, []).append(probe.name)
    return [
        f"{graph.graph_file} has no input {name}; left out: {', '.join(names)}."
        for name, names in missing.items()
    ]


def _session(checkpoint: Checkpoint, device: torch.device, edit: Edit | None = None) -> Session:
    assert checkpoint.graph is not None
    nbytes = sum(stored.nbytes for stored in checkpoint.stored.values())
    return Session(
        checkpoint.graph,
        lean=nbytes > _LARGE,
        threads=torch.get_num_threads(),
        cuda=(device.index or 0) if device.type == "cuda" else None,
        edit=edit,
    )


@dataclass
class OnnxRuntime(Runtime):
    """With a cache if the graph has one."""

    checkpoint: Checkpoint
    session: Session

    def runs(self, probe: Probe) -> bool:
        return lacks(self.checkpoint, probe) is None

    def logits(self, probe: Probe) -> Tensor:
        found = self._run(self.session, probe, (LOGITS,))[LOGITS]
        return torch.from_numpy(found.astype(np.float32, copy=False)).to(self.device)

    def exact_logits(self, probe: Probe) -> Tensor:
        found = self._run(self._twin, probe, (LOGITS,))[LOGITS]
        if found.dtype != np.float64:
            raise NotComparable(f"its logits stay {found.dtype}")
        return torch.from_numpy(found)

    def exact_outputs(self, probe: Probe, names: Sequence[str]) -> dict[str, Tensor]:
        """These outputs in float64, each [batch, pos, …].

        Raises: see `exact_logits`.
        """
        found = self._run(self._twin, probe, tuple(names))
        if narrow := [name for name, value in found.items() if value.dtype != np.float64]:
            raise NotComparable(f"its {narrow[0]} stays {found[narrow[0]].dtype}")
        return {name: torch.from_numpy(value) for name, value in found.items()}

    @cached_property
    def _twin(self) -> Session:
        assert self.checkpoint.graph is not None
        try:
            return Session(
                self.checkpoint.graph,
                lean=True,
                threads=torch.get_num_threads(),
                edit=partial(twin, config=self.checkpoint.config),
                optimised=False,
            )
        except CorruptFile as error:
            raise NotComparable(f"in float64, {error.what}") from error

    def _run(self, session: Session, probe: Probe, wanted: tuple[str, ...]) -> dict[str, Array]:
        """The wanted outputs, each [batch, pos, …]."""
        batch, length = probe.tokens.shape
        if probe.prefill is None:
            found = session(probe.tokens, probe.mask, start=probe.start, wanted=wanted)
            return {name: found[name].reshape(batch, length, -1) for name in wanted}
        # A prefill, then one token at a time, each step fed the cache of the one before.
        mask = np.ones_like(probe.tokens, bool) if probe.mask is None else probe.mask
        pieces: dict[str, list[Array]] = {name: [] for name in wanted}
        outputs: dict[str, Array] = {}
        ends = [*range(probe.prefill, length), length]
        for begin, end in zip([0, *ends], ends, strict=False):
            outputs = session(probe.tokens[:, begin:end], mask[:, :end], past_of(outputs))
            for name in wanted:
                pieces[name].append(outputs[name].reshape(batch, end - begin, -1))
        return {name: np.concatenate(parts, axis=1) for name, parts in pieces.items()}

    def streams(self, probe: Probe) -> dict[str, Tensor]:
        """Of a graph that neoconvert wrote; others do not say where their residual stream is."""
        graph = reader_of(self.checkpoint).model.graph
        there = {name for node in graph.node for name in node.output}
        named = {"embed": "embed/Reshape"} | {
            f"block {i}": f"blocks.{i}/Add_2" for i in range(self.checkpoint.config.n_layers)
        }
        values = {unit: value for unit, value in named.items() if value in there}
        if not values:
            return {}
        wanted = tuple(values.values())
        session = _session(self.checkpoint, self.device, with_outputs(wanted))
        found = self._run(session, probe, wanted)
        return {unit: torch.from_numpy(found[value]) for unit, value in values.items()}
