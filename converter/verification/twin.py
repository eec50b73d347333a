"""The twin of an ONNX graph: the same nodes on the same weights, in float64.

Float32 becomes float64 wherever a graph says it: inputs, outputs, constants, casts. The weights
stay float32 where they are, mapped from their file, and are cast at each use. Gelu, Erf and
LayerNormalization are spelled out in simpler operators (`spelling`).

A float32 constant stands for the number whose rounding it is, if that number is one that GPT-Neo
has: epsilon, the divisor of the scores, √(2/π). The graph cannot say it more exactly. Any other
constant is taken as it is.

Float16 stays float16: a cast to it in the midst of a graph rounds in the twin as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import make_node
from onnx.inliner import inline_local_functions
from onnx.numpy_helper import from_array

from converter.checkpoint import NeoConfig
from converter.onnx.reading import is_quantised
from converter.verification.evidence import NotComparable
from converter.verification.spelling import BEND, ROOT, Doubles, attribute_of, spelled

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
    root = _ROOT_IN_TEN_DIGITS if config.act_fn == "gelu_fast" else ROOT
    roots = (root, math.sqrt(2), math.sqrt(0.5))
    numbers = (config.eps, *config.score_divisors, BEND, *roots)
    exact = {np.float32(number): number for number in numbers}
    _widen(made.graph, Doubles(opset, exact), {}, {})
    return made


def _widen(
    graph: GraphProto,
    doubles: Doubles,
    narrow: dict[str, TensorProto],
    half: dict[str, TensorProto],
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
                tensor.CopyFrom(doubles.constant(tensor))
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
        graph.node.extend(_nodes(node, doubles, narrow, half))


def _nodes(
    node: NodeProto, doubles: Doubles, narrow: dict[str, TensorProto], half: dict[str, TensorProto]
) -> Iterator[NodeProto]:
    """What becomes of one node, in order."""
    _refuse(node, half)
    if node.op_type != "Cast" and (used := [name for name in node.input if name in half]):
        half.update(dict.fromkeys(node.output, half[used[0]]))
    for attribute in node.attribute:
        _widen_attribute(attribute, node, doubles, narrow, half)
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = from_array(np.zeros(1), "value")
        node.attribute.append(onnx.helper.make_attribute("value", zero))
    if node.op_type == "Gather" and node.input[0] in narrow:  # only the rows are widened
        rows = doubles.name(node.output[0])
        yield make_node("Gather", list(node.input), [rows], axis=attribute_of(node, "axis", 0))
        yield make_node("Cast", [rows], [node.output[0]], to=TensorProto.DOUBLE)
        return
    data = next((name for name in node.input if name and name not in narrow), None)
    for place, name in enumerate(node.input):
        if name in narrow:
            node.input[place] = doubles.name(name)
            if data is not None and math.prod(narrow[name].dims) > _LATE:
                yield from _after(data, narrow[name], doubles, stored := doubles.name(name))
                name = stored
            yield make_node("Cast", [name], [node.input[place]], to=TensorProto.DOUBLE)
    yield from spelled(node, doubles)


def _after(data: str, weight: TensorProto, doubles: Doubles, output: str) -> Iterator[NodeProto]:
    """The weight, not before `data` is there: onnxruntime would cast all weights at the start, and
    hold them all. It is reshaped to its own shape, which comes late."""
    dims, zero, size, none, late = (doubles.name(output) for _ in range(5))
    for name, value in ((dims, list(weight.dims)), (zero, 0)):
        yield make_node("Constant", [], [name], value=from_array(np.asarray(value, np.int64)))
    yield make_node("Size", [data], [size])
    yield make_node("Mul", [size, zero], [none])
    yield make_node("Add", [dims, none], [late])
    yield make_node("Reshape", [weight.name, late], [output])


def _refuse(node: NodeProto, half: Collection[str]) -> None:
    if node.op_type.startswith(_RANDOM):
        raise NotComparable(f"it draws random numbers ({node.op_type} {node.name})")
    if is_quantised(node):
        raise NotComparable(f"its weights are quantised ({node.op_type} {node.name})")
    if node.op_type not in _MOVES and (used := [name for name in node.input if name in half]):
        raise NotComparable(
            f"it computes in 16 bits ({node.op_type} {node.name} takes {used[0]} as it is stored)"
        )


def _widen_attribute(
    attribute: AttributeProto,
    node: NodeProto,
    doubles: Doubles,
    narrow: dict[str, TensorProto],
    half: dict[str, TensorProto],
) -> None:
    if attribute.name in _TYPES and attribute.type == AttributeProto.INT:
        attribute.i = _WIDE.get(attribute.i, attribute.i)
    for tensor in [attribute.t] if attribute.HasField("t") else attribute.tensors:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(doubles.constant(tensor))
    if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
        single = attribute.name == "value_float"
        number = doubles.number
        values = number(attribute.f) if single else list(map(number, attribute.floats))
        made = onnx.helper.make_attribute("value", from_array(np.asarray(values, np.float64)))
        attribute.CopyFrom(made)
    for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
        _widen(graph, doubles, narrow, half)
