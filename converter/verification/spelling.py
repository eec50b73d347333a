"""Nodes of an ONNX graph spelled out in simpler operators, for float64.

onnxruntime has no exact kernel for Gelu and Erf, and epsilon, an attribute of LayerNormalization,
cannot hold a float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto
from onnx.helper import get_attribute_value, make_node
from onnx.numpy_helper import from_array, to_array

from converter.verification.evidence import NotComparable

_GELUS = {"Gelu": "none", "BiasGelu": "none", "FastGelu": "tanh"}
"""com.microsoft's, with an optional bias."""
BEND, ROOT = 0.044715, math.sqrt(2 / math.pi)
"""Of gelu_new: x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))."""


@dataclass
class Doubles:
    """The numbers of one graph in float64, and names for new nodes."""

    opset: int
    exact: dict[np.float32, float]
    count: int = 0

    def number(self, value: float) -> float:
        return self.exact.get(np.float32(value), float(value))

    def constant(self, tensor: TensorProto) -> TensorProto:
        """A float32 constant of the graph."""
        if tensor.data_location == TensorProto.EXTERNAL:
            raise NotComparable(f"a constant of the graph, {tensor.name}, is in another file")
        array = to_array(tensor)
        wide = array.astype(np.float64)
        if array.size == 1:
            wide[...] = self.number(array.item())
        return from_array(wide, tensor.name)

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}/float64/{self.count}"


def attribute_of(node: NodeProto, name: str, default: int | float | str) -> int | float | str:
    for given in node.attribute:
        if given.name == name:
            value: int | float | bytes = get_attribute_value(given)
            return value.decode() if isinstance(value, bytes) else value
    return default


@dataclass
class _Spelled:
    """Nodes that stand for one: `op` appends them."""

    of: NodeProto
    doubles: Doubles
    nodes: list[NodeProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str | float, axes: Sequence[int] = ()) -> str:
        """A node; the name of its output. Numbers become constants."""
        named = [
            i if isinstance(i, str) else self._constant(np.asarray(i, np.float64)) for i in inputs
        ]
        extra: dict[str, Any] = {}
        if axes and self.doubles.opset >= 18:
            named.append(self._constant(np.asarray(axes, np.int64)))
        elif axes:
            extra = {"axes": axes}
        return self._add(make_node(kind, named, [self._name()], **extra))

    def end(self, value: str, output: int = 0) -> None:
        """`value` is the node's output."""
        if output < len(self.of.output) and self.of.output[output]:
            self._add(make_node("Identity", [value], [self.of.output[output]]))

    def _constant(self, value: np.ndarray) -> str:
        return self._add(make_node("Constant", [], [self._name()], value=from_array(value)))

    def _add(self, node: NodeProto) -> str:
        node.name = f"{self.of.name}/{node.output[0]}"
        self.nodes.append(node)
        return str(node.output[0])

    def _name(self) -> str:
        return self.doubles.name(self.of.output[0])


def _layer_norm(s: _Spelled, node: NodeProto) -> None:
    """x' = x - mean x;   y = x' / sqrt(mean x'² + eps) · w + b"""
    if attribute_of(node, "axis", -1) != -1 or attribute_of(node, "stash_type", 1) != 1:
        raise NotComparable(f"LayerNormalization {node.name} has an axis or a type of its own")
    x, scale, *bias = (name for name in node.input if name)
    mean = s.op("ReduceMean", x, axes=[-1])
    centred = s.op("Sub", x, mean)
    variance = s.op("ReduceMean", s.op("Mul", centred, centred), axes=[-1])
    eps = s.doubles.number(float(attribute_of(node, "epsilon", 1e-5)))
    deviation = s.op("Sqrt", s.op("Add", variance, eps))
    y = s.op("Mul", s.op("Div", centred, deviation), scale)
    s.end(s.op("Add", y, bias[0]) if bias else y)
    s.end(mean, output=1)
    s.end(s.op("Reciprocal", deviation), output=2)


def _erf(s: _Spelled, x: str) -> str:
    """erf x = 2/√π · x · exp(-x²) · Σ 2ⁿ x²ⁿ / (1·3·…·(2n+1)): no term cancels another.
    Beyond ±6 it is ±1 in float64."""
    x = s.op("Min", s.op("Max", x, -6.0), 6.0)
    square = s.op("Mul", x, x)
    total = s.op("Add", s.op("Mul", square, 0.0), 1.0)
    for n in range(120, 0, -1):
        total = s.op("Add", s.op("Mul", s.op("Mul", total, square), 2 / (2 * n + 1)), 1.0)
    bell = s.op("Mul", s.op("Exp", s.op("Neg", square)), 2 / math.sqrt(math.pi))
    return s.op("Mul", s.op("Mul", x, bell), total)


def _gelu_of(s: _Spelled, x: str, approximate: str) -> str:
    if approximate == "tanh":
        cube = s.op("Mul", s.op("Mul", s.op("Mul", x, x), x), BEND)
        root = s.doubles.number(ROOT)
        inner = s.op("Tanh", s.op("Mul", s.op("Add", x, cube), root))
    else:
        inner = _erf(s, s.op("Mul", x, math.sqrt(0.5)))
    return s.op("Mul", s.op("Mul", x, 0.5), s.op("Add", inner, 1.0))


def _gelu(s: _Spelled, node: NodeProto) -> None:
    s.end(_gelu_of(s, node.input[0], str(attribute_of(node, "approximate", "none"))))


def _biased_gelu(s: _Spelled, node: NodeProto) -> None:
    x, *bias = (name for name in node.input if name)
    x = s.op("Add", x, bias[0]) if bias else x
    s.end(_gelu_of(s, x, _GELUS[node.op_type]))


_SPELLINGS: dict[tuple[str, str], Callable[[_Spelled, NodeProto], None]] = {
    ("", "LayerNormalization"): _layer_norm,
    ("", "Gelu"): _gelu,
    ("", "Erf"): lambda s, node: s.end(_erf(s, node.input[0])),
    **dict.fromkeys((("com.microsoft", kind) for kind in _GELUS), _biased_gelu),
}


def spelled(node: NodeProto, doubles: Doubles) -> list[NodeProto]:
    """The nodes that stand for one in the twin; itself, where onnxruntime runs it in float64."""
    spell = _SPELLINGS.get((node.domain, node.op_type))
    if spell is None:
        return [node]
    s = _Spelled(node, doubles)
    spell(s, node)
    return s.nodes
