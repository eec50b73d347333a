"""Reading an ONNX file before a runtime does: what it points at, and whether it is a GPT-Neo graph.

A graph names files and offsets, and a runtime maps whatever it names. So each reference must be
a plain name beside the graph, within the file, and as long as the tensor is; where it points into
a safetensors file, exactly at a tensor of that name, or the weights have changed since.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from converter.errors import BadInput
from converter.onnx.dialect import LOGITS, MASK, POSITIONS, TOKENS
from converter.onnx.functions import Call, expanded
from converter.onnx.tensor_data import (
    Places,
    check_inline,
    check_reference,
    corrupt,
    data_size,
    elements,
)

_LIMIT = 2**31
_DOMAINS = {
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.training", "ai.onnx.preview.training",
    "com.microsoft", "com.microsoft.nchwc", "com.microsoft.experimental",
    "com.ms.internal.nhwc", "org.pytorch.aten",
}  # fmt: skip
"""onnxruntime's own, which its optimiser names in all that it saves. An operator of any other,
unless the file defines it, would need a library of code to be loaded."""
_QUANTISED = re.compile("Quant|Integer|NBits|Bnb4|QLinear|QGemm|QAttention|QMoE")
_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")
_MAX_DEPTH, _MOST_NODES = 16, 1_000_000


def is_quantised(node: onnx.NodeProto) -> bool:
    """Whether it quantises, or computes with what is."""
    return bool(_QUANTISED.search(node.op_type))


class ForeignGraph(BadInput):
    """An ONNX file that is not a language model with HF's inputs and outputs."""


@dataclass(frozen=True)
class OnnxFile:
    """A sound ONNX file, as its own header and graph describe it."""

    path: Path
    producer: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    hooks: tuple[str, ...]
    """Outputs beyond logits and cache."""
    data_files: tuple[Path, ...]
    """Files of external data, beside the graph."""
    n_weights: int
    weight_bytes: int
    layout: str | None
    """That of the checkpoint it was exported from, where it says so."""
    nodes: int
    domains: frozenset[str] = frozenset()
    """Of its operators."""
    quantised: int = 0
    """Nodes that work on integers of few bits."""
    elements: int = 0
    """Of all its tensors, whose data is there."""
    widest: int = 1
    """The largest dimension of one that is not empty."""

    @property
    def with_past(self) -> bool:
        return any(name.startswith("past_key_values.") for name in self.inputs)


def read_onnx(path: Path) -> OnnxFile:
    """Check an ONNX file and every file it points into.

    Raises:
        CorruptFile: not an ONNX file; external data that is too short, or not as long as it says.
        UnsafeReference: external data outside the graph's directory.
        MissingShard: external data that is not there.
        TensorMismatch: a safetensors file that has changed since the graph was written.
        ForeignGraph: sound, but no language model that neoconvert could run.
    """
    model = _parse(path)
    graph = model.graph
    graphs = list(_graphs(graph, path))
    bodies = {
        (function.domain, function.name): list(_of_nodes(function.node, path, 1))
        for function in model.functions
    }
    _check_functions(path, _nodes(graphs), {call: _nodes(body) for call, body in bodies.items()})
    for body in bodies.values():
        graphs.extend(body)
    tensors = [t for _, found in graphs for t in found]
    _check_texts(model, path, tensors, _nodes(graphs))
    external = [t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL]
    places: Places = {}
    for tensor in external:
        check_reference(tensor, path, places)
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            check_inline(tensor, path)
    inputs = tuple(value.name for value in graph.input)
    outputs = tuple(value.name for value in graph.output)
    nodes = _nodes(graphs)
    domains = {opset.domain: opset.version for opset in model.opset_import}
    defined = {function.domain for function in model.functions}
    needed = {*domains, *(node.domain for node in nodes)}
    _check_dialect(path, inputs, outputs, needed - defined)
    props = {p.key: p.value for p in model.metadata_props}
    return OnnxFile(
        path=path,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opset=domains.get("", domains.get("ai.onnx", 0)),
        inputs=inputs,
        outputs=outputs,
        hooks=tuple(n for n in outputs if n != LOGITS and not _CACHE.fullmatch(n)),
        data_files=tuple(places),
        n_weights=len(graph.initializer),
        weight_bytes=sum(data_size(t, path) for t in graph.initializer),
        layout=props.get("neoconvert.layout"),
        nodes=len(graph.node),
        domains=frozenset(needed),
        quantised=sum(is_quantised(node) for node in nodes),
        elements=sum(map(elements, tensors)),
        widest=max((size for t in tensors if elements(t) for size in t.dims), default=1),
    )


def _parse(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size >= _LIMIT:
            raise corrupt("The file is 2 GB or more, which no ONNX file can be", path)
        model = onnx.load_model_from_string(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise corrupt(f"The file cannot be read as ONNX: {error}", path) from error
    if not model.HasField("graph") or not model.opset_import or not model.graph.node:
        raise corrupt("The file holds no ONNX graph", path)
    return model


_Found = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


def _graphs(graph: onnx.GraphProto, path: Path, depth: int = 0) -> Iterator[_Found]:
    """Nodes and tensors of the graph and of the graphs in its nodes' attributes."""
    tensors = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        tensors += [sparse.values, sparse.indices]
    yield [], tensors
    yield from _of_nodes(graph.node, path, depth)


def _of_nodes(found: object, path: Path, depth: int) -> Iterator[_Found]:
    if depth > _MAX_DEPTH:
        raise corrupt(f"Graphs within graphs are more than {_MAX_DEPTH} deep", path)
    nodes: list[onnx.NodeProto] = list(found)  # type: ignore[call-overload]
    tensors: list[onnx.TensorProto] = []
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                tensors.append(attribute.t)
            tensors.extend(attribute.tensors)
            sparse = list(attribute.sparse_tensors)
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
            tensors += [t for s in sparse for t in (s.values, s.indices)]
            inner = list(attribute.graphs)
            if attribute.HasField("g"):
                inner.append(attribute.g)
            for graph in inner:
                yield from _graphs(graph, path, depth + 1)
    yield nodes, tensors


def _nodes(graphs: list[_Found]) -> list[onnx.NodeProto]:
    return [node for found, _ in graphs for node in found]


def _check_texts(
    model: onnx.ModelProto,
    path: Path,
    tensors: list[onnx.TensorProto],
    nodes: list[onnx.NodeProto],
) -> None:
    """What is no UTF-8, protobuf gives as bytes."""
    values = [*model.graph.input, *model.graph.output]
    pairs = [*model.metadata_props, *(e for t in tensors for e in t.external_data)]
    texts = [model.producer_name, model.producer_version, *(v.name for v in values)]
    texts += [text for pair in pairs for text in (pair.key, pair.value)]
    texts += [t.name for t in tensors] + [o.domain for o in model.opset_import]
    for node in nodes:
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
    if not all(isinstance(text, str) for text in texts):
        raise corrupt("The file has names that are no text", path)


def _check_functions(
    path: Path, nodes: list[onnx.NodeProto], functions: dict[Call, list[onnx.NodeProto]]
) -> None:
    count = expanded(nodes, functions)
    if count is None:
        raise corrupt("A function that the file defines calls itself", path)
    if count > _MOST_NODES:
        raise corrupt(f"With its functions in place the graph has {count:,} nodes", path)


def _check_dialect(
    path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...], domains: set[str]
) -> None:
    known = {TOKENS, MASK, POSITIONS}
    strange = [n for n in inputs if n not in known and not _CACHE.fullmatch(n)]
    if foreign := sorted(domains - _DOMAINS):
        what = f"Its operators need the library {foreign[0]!r}"
    elif TOKENS not in inputs:
        what = f"It has no input {TOKENS}"
    elif LOGITS not in outputs:
        what = f"It has no output {LOGITS}, but {', '.join(outputs[:2])}"
    elif strange:
        what = f"It has an input {strange[0]!r}"
    else:
        return
    raise ForeignGraph(
        f"This is not a graph of a GPT-Neo model. {what}.",
        where=str(path),
        do="Give a model.onnx that neoconvert or optimum wrote from a GPT-Neo checkpoint.",
    )
