"""Is a graph's structure the one that its config makes? Built again, and compared node by node.

The weights alone do not tell: a graph with the right weights may use them wrongly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from converter.checkpoint import Checkpoint
from converter.layout import HEAD, LAYOUTS
from converter.onnx.dialect import DIALECT
from converter.onnx.graph import PRODUCER, build
from converter.onnx.opening import GraphReader, reader_of
from converter.onnx.weights import Form, GraphWeights, Placed
from converter.output import inert

_BLOCK = re.compile(r"blocks\.(\d+)\b")
_EMBED = ("embed/", "hook_embed", "hook_pos_embed")
_FINAL = ("ln_final/", "ln_final.", "unembed/", "logits")

_FUSED = "/MatMulAddFusion"
_ALIKE = 0.5
"""The share of its nodes that makes a graph ours, whoever it says has written it. Those of other
exporters have other names, and none in common."""


@dataclass(frozen=True)
class Nodes:
    """A graph beside the one that its config makes."""

    ours: bool
    """Whether it says that neoconvert wrote it, or looks as if."""
    differing: tuple[str, ...] = ()
    """Names of nodes, inputs, outputs and constants that are not as they must be, in the order of
    the forward pass."""
    unknown: str | None = None
    """Why they cannot be compared, as a clause."""


def compare_nodes(checkpoint: Checkpoint) -> Nodes:
    """
    Args:
        checkpoint: what `open_graph` made.
    """
    reader = reader_of(checkpoint)
    producer = reader.model.producer_name
    operators = {node.domain for node in reader.model.graph.node}
    operators -= {function.domain for function in reader.model.functions}  # of its own
    if foreign := sorted(operators - {"", "ai.onnx"}):
        who = (
            "another tool worked it over"
            if producer == PRODUCER
            else f"{_named(producer)} wrote it"
        )
        return Nodes(ours=False, unknown=f"{who}, with operators of {', '.join(foreign)}")
    dialect = reader.metadata.get("neoconvert.dialect", DIALECT)  # the first had no number
    if producer == PRODUCER and dialect != DIALECT:
        why = f"it is of neoconvert's dialect {inert(dialect)}; this version knows {DIALECT}"
        return Nodes(ours=True, unknown=why)
    known, model = _expected(checkpoint)
    fused = _optimised_as(reader.model, model)  # which its optimiser has sorted anew, too
    expected, found = _parts(fused or model, known), _parts(reader.model, known)
    nodes = [key for key in found if key[0] == "node"]
    alike = sum(expected.get(key) == found[key] for key in nodes)
    if producer != PRODUCER and alike < _ALIKE * len(nodes):
        return Nodes(ours=False, unknown=f"{_named(producer)} wrote it")
    names = list(_differing(expected, found))
    order = [name for kind, name, _ in found if kind == "node" and name not in names]
    made = [name for kind, name, _ in expected if kind == "node" and name not in names]
    moved = [] if fused else [a for a, b in zip(order, made, strict=True) if a != b][:1]
    return Nodes(ours=True, differing=_by_outputs(names or moved, reader, fused or model))


def _by_outputs(
    names: Sequence[str], reader: GraphReader, expected: onnx.ModelProto
) -> tuple[str, ...]:
    """For nodes that differ where a hook point is given out, and nowhere else: its name."""
    if not names:
        return ()
    nodes = reader.model.graph.node
    read = {name for node in nodes for name in node.input}
    found, made = (_makers(graph.node) for graph in (reader.model.graph, expected.graph))
    wrong = [
        name
        for name in reader.file.hooks
        if found.get(name) != made.get(name) or (name not in read and made.get(name) in names)
    ]
    gone = {maker.get(name) for name in wrong for maker in (found, made)}
    return (*wrong, *(name for name in names if name not in (*wrong, *gone)))


def _makers(nodes: Iterable[onnx.NodeProto]) -> dict[str, str]:
    """The node that gives each value, by name."""
    return {name: node.name for node in nodes for name in node.output}


def _named(producer: str) -> str:
    return inert(producer) or "an unknown program"


def _expected(checkpoint: Checkpoint) -> tuple[set[str], onnx.ModelProto]:
    """The names of the weights, and what the config makes of them. A weight that the graph has not
    by name is expected all the same, unless it may be left out."""
    reader = reader_of(checkpoint)
    turned = reader.turned
    places = {}
    for key, slot in checkpoint.slots.items():
        if (t := checkpoint.stored.get(key)) is not None:
            shape = t.shape[::-1] if t.name in turned else t.shape
            places[key] = Placed(key, t.name, t.code, shape, slot, t.file.name)
        elif slot.absence is None and slot.name is not None and key != HEAD:
            places[key] = Placed(key, slot.name, "F32", slot.shape, slot, file="nowhere")
    form: Form = "heads" if LAYOUTS[checkpoint.layout].by_head else "in_out" if turned else "out_in"
    weights = GraphWeights(checkpoint, "shared", form, places)
    assert checkpoint.graph is not None
    file = reader.file
    model = build(weights, checkpoint.graph.parent, with_past=file.with_past, hooks=file.hooks)
    return {place.name for place in places.values()}, ir.to_proto(model)


def _optimised_as(found: onnx.ModelProto, expected: onnx.ModelProto) -> onnx.ModelProto | None:
    """`expected` as onnxruntime's optimiser ("basic") makes it, which has gone over `found` where
    a product and the sum after it are one Gemm. None: it has not."""
    names = {node.name for node in found.graph.node}
    fused = {name.removesuffix(_FUSED) for name in names if name.endswith(_FUSED)}
    nodes = list(_with_gemms(expected.graph.node, fused))
    if len(nodes) == len(expected.graph.node):
        return None
    nodes = list(_without_pairs(_without_repeats(nodes, names), names))
    whole = onnx.ModelProto()
    whole.CopyFrom(expected)
    del whole.graph.node[:]
    whole.graph.node.extend(nodes)
    return whole


def _with_gemms(nodes: Iterable[onnx.NodeProto], fused: set[str]) -> Iterator[onnx.NodeProto]:
    """Each of the products `fused` with the sum after it as one node."""
    products = {}
    for node in nodes:
        if node.name in fused and node.op_type == "MatMul":
            products[node.output[0]] = node
        elif node.op_type == "Add" and node.input[0] in products:
            product, bias = products[node.input[0]], node.input[1]
            name = product.name + _FUSED
            yield onnx.helper.make_node("Gemm", [*product.input, bias], [node.output[0]], name=name)
        else:
            yield node


def _without_repeats(nodes: list[onnx.NodeProto], names: set[str]) -> list[onnx.NodeProto]:
    """Of nodes that compute the same of the same, one: that of `names`."""
    first: dict[bytes, onnx.NodeProto] = {}
    same: dict[str, str] = {}  # an output: that of the first that computes it
    chosen: dict[str, str] = {}  # the first's output: that of the one that stays
    for node in nodes:
        alike = _renamed(node, same)
        alike.ClearField("name")
        del alike.output[:]
        other = first.setdefault(alike.SerializeToString(deterministic=True), node)
        if other is not node:
            same[node.output[0]] = other.output[0]
            if other.name not in names:
                chosen[other.output[0]] = node.output[0]
    final = {output: chosen.get(one, one) for output, one in same.items()} | chosen
    stay = (node for node in nodes if final.get(node.output[0], node.output[0]) == node.output[0])
    return [_renamed(node, final) for node in stay]


def _without_pairs(nodes: list[onnx.NodeProto], names: set[str]) -> Iterator[onnx.NodeProto]:
    """A transpose that only another one reads is part of that, as it is in `names`."""
    gone = {
        node.output[0]: node
        for node in nodes
        if node.op_type == "Transpose" and node.name not in names
    }
    for node in nodes:
        before = gone.get(node.input[0]) if node.op_type == "Transpose" else None
        if before is not None:
            inner, outer = (_perm(each) for each in (before, node))
            perm = [inner[axis] for axis in outer]
            yield onnx.helper.make_node(
                "Transpose", [before.input[0]], [node.output[0]], name=node.name, perm=perm
            )
        elif node.output[0] not in gone:
            yield node


def _perm(node: onnx.NodeProto) -> Sequence[int]:
    return next(a.ints for a in node.attribute if a.name == "perm")


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """With other inputs."""
    result = onnx.NodeProto()
    result.CopyFrom(node)
    for i, name in enumerate(node.input):
        result.input[i] = names.get(name, name)
    return result


Parts = dict[tuple[str, str, int], bytes]
"""By kind, name and, since a name may be there twice, occurrence."""


def _parts(model: onnx.ModelProto, weights: set[str]) -> Parts:
    """All that a runtime reads, but the values of the weights. In the order of the file."""
    parts: Parts = {}
    counts: Counter[tuple[str, str]] = Counter()

    def add(kind: str, name: str, value: bytes) -> None:
        parts[kind, name, counts[kind, name]] = value
        counts[kind, name] += 1

    graph = model.graph
    newest = onnx.defs.onnx_opset_version()
    version = next((o.version for o in model.opset_import if not o.domain), newest)
    version = min(max(version, 1), newest)  # else no such number can be asked for
    for node in graph.node:
        bare = onnx.NodeProto()
        bare.CopyFrom(node)
        bare.ClearField("doc_string")  # a comment
        del bare.attribute[:]
        bare.attribute.extend(_attributes(node, version))
        add("node", node.name, bare.SerializeToString(deterministic=True))
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            add(kind, value.name, value.SerializeToString(deterministic=True))
    for tensor in graph.initializer:
        shape = f"{tensor.data_type} {list(tensor.dims)} ".encode()
        known = tensor.name in weights
        value = b"" if known else _value_of(tensor)
        add("weight" if known else "constant", tensor.name, shape + value)
    rest = onnx.ModelProto()
    rest.functions.extend(model.functions)
    rest.graph.sparse_initializer.extend(graph.sparse_initializer)
    used = {"", *(node.domain for node in graph.node)}  # onnxruntime imports all it knows
    rest.opset_import.extend(o for o in model.opset_import if o.domain in used)
    rest.ir_version = model.ir_version
    add("model", "versions and functions", rest.SerializeToString(deterministic=True))
    return parts


def _value_of(tensor: onnx.TensorProto) -> bytes:
    """A constant's value; of one in another file, where it is, which no constant of ours has."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return bytes(tensor.SerializeToString(deterministic=True))
    return onnx.numpy_helper.to_array(tensor).tobytes()


def _attributes(node: onnx.NodeProto, version: int) -> list[onnx.AttributeProto]:
    """In order, without those that say what holds without them."""
    try:
        known = onnx.defs.get_schema(node.op_type, version, node.domain).attributes
    except onnx.defs.SchemaError:  # of the graph's own functions
        known = {}
    said = [a for a in node.attribute if a.name not in known or a != known[a.name].default_value]
    return sorted(said, key=lambda attribute: attribute.name)


def _differing(expected: Parts, found: Parts) -> Iterator[str]:
    keys = [key for key, part in expected.items() if found.get(key) != part]
    yield from dict.fromkeys(key[1] for key in keys)
    yield from dict.fromkeys(key[1] for key in found if key not in expected)


def unit_of(name: str) -> str | None:
    """The unit that a node or an output is in, by its name: "block 3", "embed" or "final"; None:
    masks, shapes and constants serve several."""
    if inside := _BLOCK.match(name):
        return f"block {inside.group(1)}"
    if name.startswith(_EMBED):
        return "embed"
    return "final" if name.startswith(_FINAL) else None
