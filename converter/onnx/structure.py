"""Is a graph's structure the one that its config makes? Built again, and compared node by node.

The weights alone do not tell: a graph with the right weights may use them wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from converter import __version__
from converter.checkpoint import Checkpoint
from converter.onnx.graph import PRODUCER, build
from converter.onnx.opening import reader_of
from converter.onnx.weights import Form, Place, Weights

_BLOCK = re.compile(r"blocks\.(\d+)\b")


def written_here(checkpoint: Checkpoint) -> bool:
    """Whether the graph says that this version of neoconvert wrote it: others build others. Tools
    that work a graph over keep that name, but bring their own operators."""
    file = reader_of(checkpoint).file
    return file.producer == f"{PRODUCER} {__version__}" and file.domains <= {""}


def differing_nodes(checkpoint: Checkpoint) -> list[str]:
    """Names of nodes, inputs, outputs and constants that are not as the checkpoint's config makes
    them, in the order of the forward pass.

    Args:
        checkpoint: what `open_graph` made of a graph that this version wrote.
    """
    file, found = reader_of(checkpoint).file, reader_of(checkpoint).model
    turned = reader_of(checkpoint).turned
    places = {
        key: Place(
            key, t.name, t.code, t.shape[::-1] if t.name in turned else t.shape,
            checkpoint.slots[key], t.file.name,
        )
        for key, t in checkpoint.stored.items()
    }  # fmt: skip
    form: Form = "heads" if checkpoint.layout == "hooked" else "in_out" if turned else "out_in"
    weights = Weights(checkpoint, "shared", form, places)
    assert checkpoint.graph is not None
    model = build(weights, checkpoint.graph.parent, with_past=file.with_past, hooks=file.hooks)
    made = ir.to_proto(model)
    known = {place.name for place in places.values()}
    names = list(_differing(_parts(made, known), _parts(found, known)))
    order = [node.name for node in found.graph.node if node.name not in names]
    expected = [node.name for node in made.graph.node if node.name not in names]
    return names or [a for a, b in zip(order, expected, strict=True) if a != b][:1]


Parts = dict[tuple[str, str, int], bytes]
"""By kind, name and, since a name may be there twice, occurrence."""


def _parts(model: onnx.ModelProto, weights: set[str]) -> Parts:
    """All that a runtime reads, but the values of the weights. In the order of the file."""
    parts: Parts = {}

    def add(kind: str, name: str, value: bytes) -> None:
        count = sum(1 for known in parts if known[:2] == (kind, name))
        parts[kind, name, count] = value

    graph = model.graph
    for node in graph.node:
        bare = onnx.NodeProto()
        bare.CopyFrom(node)
        bare.ClearField("doc_string")  # a comment
        add("node", node.name, bare.SerializeToString(deterministic=True))
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            add(kind, value.name, value.SerializeToString(deterministic=True))
    for tensor in graph.initializer:
        shape = f"{tensor.data_type} {list(tensor.dims)} ".encode()
        known = tensor.name in weights
        value = b"" if known else onnx.numpy_helper.to_array(tensor).tobytes()
        add("weight" if known else "constant", tensor.name, shape + value)
    rest = onnx.ModelProto()
    rest.functions.extend(model.functions)
    rest.graph.sparse_initializer.extend(graph.sparse_initializer)
    rest.opset_import.extend(model.opset_import)
    rest.ir_version = model.ir_version
    add("model", "versions and functions", rest.SerializeToString(deterministic=True))
    return parts


def _differing(expected: Parts, found: Parts) -> Iterator[str]:
    keys = [key for key, part in expected.items() if found.get(key) != part]
    yield from dict.fromkeys(key[1] for key in keys)
    yield from dict.fromkeys(key[1] for key in found if key not in expected)


def unit_of(name: str) -> str | None:
    """The unit that a node is in, by its name: "block 3", "embed" or "final"; None: masks,
    shapes and constants serve several."""
    if inside := _BLOCK.match(name):
        return f"block {inside.group(1)}"
    if name.startswith("embed/"):
        return "embed"
    return "final" if name.startswith(("ln_final/", "unembed/", "logits")) else None
