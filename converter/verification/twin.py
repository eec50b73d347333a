"""The twin of an ONNX graph: the same nodes on the same weights, in float64.

Float32 becomes float64 wherever a graph says it: inputs, outputs, constants, casts. The weights
stay float32 where they are, mapped from their file, and are cast at each use. Three kinds of node
are spelled out in simpler operators, because onnxruntime has no exact kernel for them, or because
an attribute cannot hold a float64: Gelu, Erf and LayerNormalization.

A float32 constant stands for the number whose rounding it is, if that number is one that GPT-Neo
has: epsilon, the divisor of the scores, √(2/π). The graph cannot say it more exactly. Any other
constant is taken as it is.

Float16 stays float16: a cast to it in the midst of a graph rounds in the twin as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import make_node
from onnx.inliner import inline_local_functions
from onnx.numpy_helper import from_array, to_array

from converter.checkpoint import NeoConfig
from converter.verification.evidence import NotComparable

_WIDE: dict[int, int] = {TensorProto.FLOAT: TensorProto.DOUBLE}
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPES = frozenset({"to", "dtype", "output_datatype", "output_dtype", "softmax_precision"})
"""Attributes that name an element type."""
_MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
_LATE = 2**18
"""Elements of a weight that is worth waiting for."""
_RANDOM = ("Random", "Bernoulli", "Multinomial")
_QUANTISED = ("Quant", "QLinear", "Integer", "NBits", "Bnb4")
_GELUS = {"Gelu": "none", "BiasGelu": "none", "FastGelu": "tanh"}
"""com.microsoft's, with an optional bias."""
_BEND, _ROOT = 0.044715, math.sqrt(2 / math.pi)
"""Of gelu_new: x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
_ROOT_IN_TEN_DIGITS = 0.7978845608
"""Of gelu_fast, and the same in float32."""


def twin(model: ModelProto, config: NeoConfig) -> ModelProto:
    """The graph in float64. `model` is left as it is; its external data is not read.

    Raises:
        NotComparable: it has something that float64 says nothing of: quantised weights, float16
            arithmetic, randomness.
    """
    if model.functions:
        model = inline_local_functions(model)
    made = ModelProto()
    made.CopyFrom(model)
    opsets = {entry.domain: entry.version for entry in made.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    root = _ROOT_IN_TEN_DIGITS if config.act_fn == "gelu_fast" else _ROOT
    roots = (root, math.sqrt(2), math.sqrt(0.5))
    numbers = (config.eps, *config.score_divisors, _BEND, *roots)
    exact = {np.float32(number): number for number in numbers}
    _widen(made.graph, _Twin(opset, exact), {}, {})
    return made


@dataclass
class _Twin:
    opset: int
    exact: dict[np.float32, float]
    count: int = 0

    def number(self, value: float) -> float:
        return self.exact.get(np.float32(value), float(value))

    def constant(self, tensor: TensorProto) -> TensorProto:
        """A float32 constant of the graph, in float64."""
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


def _widen(
    graph: GraphProto, twin: _Twin, narrow: dict[str, TensorProto], half: dict[str, TensorProto]
) -> None:
    """A graph, in place. `narrow`, `half`: weights of the graphs around it that it can see."""
    if graph.sparse_initializer:
        raise NotComparable("it has sparse weights")
    own = {tensor.name for tensor in graph.initializer}
    narrow, half = (
        {name: t for name, t in outer.items() if name not in own} for outer in (narrow, half)
    )
    for tensor in graph.initializer:
        if tensor.data_type in _HALF:
            half[tensor.name] = tensor
        elif tensor.data_type == TensorProto.FLOAT:
            if math.prod(tensor.dims) == 1 and tensor.data_location != TensorProto.EXTERNAL:
                tensor.CopyFrom(twin.constant(tensor))
            else:
                narrow[tensor.name] = tensor
    del graph.value_info[:]  # a runtime infers them again
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type in _HALF:
            raise NotComparable(f"its {value.name} is float16")
        if value.name not in narrow:
            kind.elem_type = _WIDE.get(kind.elem_type, kind.elem_type)
    if returned := [v.name for v in graph.output if v.name in narrow]:
        raise NotComparable(f"it returns a weight as it is, {returned[0]}")
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        graph.node.extend(_nodes(node, twin, narrow, half))


def _nodes(
    node: NodeProto, twin: _Twin, narrow: dict[str, TensorProto], half: dict[str, TensorProto]
) -> Iterator[NodeProto]:
    """What becomes of one node, in order."""
    _refuse(node, half)
    if node.op_type != "Cast" and (used := [name for name in node.input if name in half]):
        half.update(dict.fromkeys(node.output, half[used[0]]))
    for attribute in node.attribute:
        _widen_attribute(attribute, node, twin, narrow, half)
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = from_array(np.zeros(1), "value")
        node.attribute.append(onnx.helper.make_attribute("value", zero))
    if node.op_type == "Gather" and node.input[0] in narrow:  # only the rows are widened
        rows = twin.name(node.output[0])
        yield make_node("Gather", list(node.input), [rows], axis=_attribute(node, "axis", 0))
        yield make_node("Cast", [rows], [node.output[0]], to=TensorProto.DOUBLE)
        return
    data = next((name for name in node.input if name and name not in narrow), None)
    for place, name in enumerate(node.input):
        if name in narrow:
            node.input[place] = twin.name(name)
            if data is not None and math.prod(narrow[name].dims) > _LATE:
                yield from _after(data, narrow[name], twin, stored := twin.name(name))
                name = stored
            yield make_node("Cast", [name], [node.input[place]], to=TensorProto.DOUBLE)
    spell = _SPELLED.get((node.domain, node.op_type))
    if spell is None:
        yield node
        return
    spelled = _Spelled(node, twin)
    spell(spelled, node)
    yield from spelled.nodes


def _after(data: str, weight: TensorProto, twin: _Twin, output: str) -> Iterator[NodeProto]:
    """The weight, not before `data` is there: onnxruntime would cast all weights at the start, and
    hold them all. Its own shape, to which it is reshaped, is told late."""
    dims, zero, size, none, late = (twin.name(output) for _ in range(5))
    for name, value in ((dims, list(weight.dims)), (zero, 0)):
        yield make_node("Constant", [], [name], value=from_array(np.asarray(value, np.int64)))
    yield make_node("Size", [data], [size])
    yield make_node("Mul", [size, zero], [none])
    yield make_node("Add", [dims, none], [late])
    yield make_node("Reshape", [weight.name, late], [output])


def _refuse(node: NodeProto, half: Collection[str]) -> None:
    if node.op_type.startswith(_RANDOM):
        raise NotComparable(f"it draws random numbers ({node.op_type} {node.name})")
    if any(word in node.op_type for word in _QUANTISED):
        raise NotComparable(f"its weights are quantised ({node.op_type} {node.name})")
    if node.op_type not in _MOVES and (used := [name for name in node.input if name in half]):
        raise NotComparable(
            f"it computes in 16 bits ({node.op_type} {node.name} takes {used[0]} as it is stored)"
        )


def _widen_attribute(
    attribute: AttributeProto,
    node: NodeProto,
    twin: _Twin,
    narrow: dict[str, TensorProto],
    half: dict[str, TensorProto],
) -> None:
    if attribute.name in _TYPES and attribute.type == AttributeProto.INT:
        attribute.i = _WIDE.get(attribute.i, attribute.i)
    for tensor in [attribute.t] if attribute.HasField("t") else attribute.tensors:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(twin.constant(tensor))
    if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
        single = attribute.name == "value_float"
        values = twin.number(attribute.f) if single else list(map(twin.number, attribute.floats))
        made = onnx.helper.make_attribute("value", from_array(np.asarray(values, np.float64)))
        attribute.CopyFrom(made)
    for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
        _widen(graph, twin, narrow, half)


def _attribute(node: NodeProto, name: str, default: int | float | str) -> int | float | str:
    for attribute in node.attribute:
        if attribute.name == name:
            value: int | float | bytes = onnx.helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default


@dataclass
class _Spelled:
    """Nodes that stand for one: `op` appends them."""

    of: NodeProto
    twin: _Twin
    nodes: list[NodeProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str | float, axes: Sequence[int] = ()) -> str:
        """A node; the name of its output. Numbers become constants."""
        named = [
            i if isinstance(i, str) else self._constant(np.asarray(i, np.float64)) for i in inputs
        ]
        extra: dict[str, Any] = {}
        if axes and self.twin.opset >= 18:
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
        return self.twin.name(self.of.output[0])


def _layer_norm(s: _Spelled, node: NodeProto) -> None:
    """x' = x - mean x;   y = x' / sqrt(mean x'² + eps) · w + b"""
    if _attribute(node, "axis", -1) != -1 or _attribute(node, "stash_type", 1) != 1:
        raise NotComparable(f"LayerNormalization {node.name} has an axis or a type of its own")
    x, scale, *bias = (name for name in node.input if name)
    mean = s.op("ReduceMean", x, axes=[-1])
    centred = s.op("Sub", x, mean)
    variance = s.op("ReduceMean", s.op("Mul", centred, centred), axes=[-1])
    eps = s.twin.number(float(_attribute(node, "epsilon", 1e-5)))
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
        cube = s.op("Mul", s.op("Mul", s.op("Mul", x, x), x), _BEND)
        root = s.twin.number(_ROOT)
        inner = s.op("Tanh", s.op("Mul", s.op("Add", x, cube), root))
    else:
        inner = _erf(s, s.op("Mul", x, math.sqrt(0.5)))
    return s.op("Mul", s.op("Mul", x, 0.5), s.op("Add", inner, 1.0))


def _gelu(s: _Spelled, node: NodeProto) -> None:
    s.end(_gelu_of(s, node.input[0], str(_attribute(node, "approximate", "none"))))


def _biased_gelu(s: _Spelled, node: NodeProto) -> None:
    x, *bias = (name for name in node.input if name)
    x = s.op("Add", x, bias[0]) if bias else x
    s.end(_gelu_of(s, x, _GELUS[node.op_type]))


_SPELLED: dict[tuple[str, str], Callable[[_Spelled, NodeProto], None]] = {
    ("", "LayerNormalization"): _layer_norm,
    ("", "Gelu"): _gelu,
    ("", "Erf"): lambda s, node: s.end(_erf(s, node.input[0])),
    **dict.fromkeys((("com.microsoft", kind) for kind in _GELUS), _biased_gelu),
}
