"""An ONNX graph to be spoiled: nodes by name, as neoconvert's exporter names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from converter.onnx.dialect import LOGITS, MASK, POSITIONS, TOKENS
from converter.verification.probes import Probe


class Graph:
    """Edits keep the nodes in order: what is inserted comes right before its first reader."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    def node(self, name: str) -> onnx.NodeProto:
        nodes: list[onnx.NodeProto] = list(self.model.graph.node)
        return next(node for node in nodes if node.name == name)

    def constant(self, value: Any) -> str:
        """An initializer; its name."""
        name = f"fault_{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def attribute(self, name: str, **values: Any) -> None:
        node = self.node(name)
        kept = [a for a in node.attribute if a.name not in values]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in values.items())

    def read(self, name: str, place: int, value: str) -> None:
        """Let a node read another value."""
        self.node(name).input[place] = value

    def become(self, name: str, kind: str, *inputs: str) -> None:
        """Let a node be another one."""
        node = self.node(name)
        node.op_type = kind
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)

    def after(self, name: str, *made: onnx.NodeProto) -> None:
        """New nodes right after a node."""
        index = [node.name for node in self.model.graph.node].index(name)
        for offset, node in enumerate(made, start=1):
            self.model.graph.node.insert(index + offset, node)

    def through(self, name: str, kind: str, *others: str, **attributes: Any) -> None:
        """What reads a node's output reads `kind(output, *others)` instead."""
        node = self.node(name)
        old = node.output[0]
        node.output[0] = f"{name}/before"
        made = onnx.helper.make_node(
            kind, [node.output[0], *others], [old], name=f"{name}/{kind}", **attributes
        )
        self.after(name, made)

    def detached(self, name: str, output: str) -> str:
        """Take a graph's output away from the node that makes it; the value's name inside."""
        inside = f"{output}/inside"
        for node in self.model.graph.node:
            node.input[:] = [inside if value == output else value for value in node.input]
        self.node(name).output[0] = inside
        return inside


def make(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, inputs, [output], name=f"fault/{output}", **attributes)


class Exact:
    """A graph of neoconvert's in float64, run by onnx's own reference implementation."""

    def __init__(self, path: Path) -> None:
        model = onnx.load_model(str(path))
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                wide = onnx.numpy_helper.to_array(tensor).astype(np.float64)
                tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
        self._past = {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in model.graph.input
            if value.name not in (TOKENS, MASK, POSITIONS)
        }
        self._session = ReferenceEvaluator(model)

    def __call__(self, probe: Probe) -> np.ndarray:
        """Logits [batch, pos, v], in one pass."""
        batch, _ = probe.tokens.shape
        mask = np.ones_like(probe.tokens) if probe.mask is None else probe.mask.astype(np.int64)
        feeds = {TOKENS: probe.tokens, MASK: mask, POSITIONS: probe.positions.astype(np.int64)}
        feeds |= {k: np.zeros((batch, n, 0, h)) for k, (_, n, _, h) in self._past.items()}
        logits: np.ndarray = self._session.run([LOGITS], feeds)[0]  # type: ignore[index]
        return logits
