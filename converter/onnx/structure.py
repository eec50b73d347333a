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
from converter.onnx.reading import read_onnx
from converter.onnx.weights import Place, Weights

_BLOCK = re.compile(r"blocks\.(\d+)\b")


def written_here(checkpoint: Checkpoint) -> bool:
    """Whether the graph says that this version of neoconvert wrote it: others build others."""
    assert checkpoint.graph is not None
    return read_onnx(checkpoint.graph).producer == f"{PRODUCER} {__version__}"


def differing_nodes(checkpoint: Checkpoint) -> list[str]:
    """Names of nodes, outputs and constants that are not as the checkpoint's config makes them,
    in the order of the forward pass.

    Args:
        checkpoint: what `open_graph` made of a graph that this version wrote.
    """
    assert checkpoint.graph is not None
    found = onnx.load_model(str(checkpoint.graph), load_external_data=False)
    file = read_onnx(checkpoint.graph)
    hooked = checkpoint.layout == "hooked"
    places = {
        key: Place(key, t.name, t.code, t.shape, checkpoint.slots[key], t.file.name)
        for key, t in checkpoint.stored.items()
    }
    weights = Weights(checkpoint, "shared", hooked, places)
    model = build(weights, checkpoint.directory, with_past=file.with_past, hooks=file.hooks)
    made = ir.to_proto(model)
    known = {place.name for place in places.values()}
    return list(_differing(_parts(made.graph, known), _parts(found.graph, known)))


Parts = dict[str, bytes]


def _parts(graph: onnx.GraphProto, weights: set[str]) -> Parts:
    """Everything but the weights, by name."""
    parts: Parts = {}
    for node in graph.node:
        parts[node.name] = node.SerializeToString(deterministic=True)
    for value in (*graph.input, *graph.output):
        parts[value.name] = value.SerializeToString(deterministic=True)
    for tensor in graph.initializer:
        if tensor.name not in weights:
            parts[tensor.name] = onnx.numpy_helper.to_array(tensor).tobytes()
    return parts


def _differing(expected: Parts, found: Parts) -> Iterator[str]:
    yield from (name for name, part in expected.items() if found.get(name) != part)
    yield from (name for name in found if name not in expected)


def unit_of(name: str) -> str | None:
    """The unit that a node is in, by its name: "block 3", "embed" or "final"; None: masks,
    shapes and constants serve several."""
    if inside := _BLOCK.match(name):
        return f"block {inside.group(1)}"
    if name.startswith("embed/"):
        return "embed"
    return "final" if name.startswith(("ln_final/", "unembed/", "logits")) else None
