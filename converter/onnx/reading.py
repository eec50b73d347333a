"""Reading an ONNX file before a runtime does: what it points at, and whether it is a GPT-Neo graph.

A graph names files and offsets, and a runtime maps what it is told to. So each reference must be
a plain name beside the graph, within the file, and as long as the tensor is; where it points into
a safetensors file, exactly at a tensor of that name, or the weights have changed since.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from converter.checkpoint.reader import SafetensorsReader
from converter.errors import BadInput, CorruptFile, MissingShard, TensorMismatch, UnsafeReference
from converter.onnx.dialect import LOGITS, MASK, POSITIONS, TOKENS

_LIMIT = 2**31
_DOMAINS = {
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.training", "ai.onnx.preview.training",
    "com.microsoft", "com.microsoft.nchwc", "com.microsoft.experimental",
    "com.ms.internal.nhwc", "org.pytorch.aten",
}  # fmt: skip
"""onnxruntime's own, which its optimiser names in all that it saves. An operator of any other,
unless the file defines it, would need a library of code to be loaded."""
_QUANTISED = re.compile(
    r"MatMulInteger|ConvInteger|MatMulNBits|MatMulBnb4|QLinear|QGemm|QAttention|QMoE|.*Quant"
)
_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")
_MAX_DEPTH = 16


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
    for function in model.functions:
        graphs.extend(_of_nodes(function.node, path, 1))
    tensors = [t for _, found in graphs for t in found]
    external = [t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL]
    places: dict[Path, dict[str, tuple[int, int]] | None] = {}
    for tensor in external:
        _check_reference(tensor, path, places)
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(tensor, path)
    inputs = tuple(value.name for value in graph.input)
    outputs = tuple(value.name for value in graph.output)
    nodes = [n for found, _ in graphs for n in found]
    nodes += [n for function in model.functions for n in function.node]
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
        weight_bytes=sum(_nbytes(t, path) for t in graph.initializer),
        layout=props.get("neoconvert.layout"),
        nodes=len(graph.node),
        domains=frozenset(needed),
        quantised=sum(bool(_QUANTISED.match(node.op_type)) for node in nodes),
        elements=sum(map(_elements, tensors)),
        widest=max((size for t in tensors if _elements(t) for size in t.dims), default=1),
    )


def _parse(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size >= _LIMIT:
            raise _corrupt("The file is 2 GB or more, which no ONNX file can be", path)
        model = onnx.load_model_from_string(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise _corrupt(f"The file cannot be read as ONNX: {error}", path) from error
    if not model.HasField("graph") or not model.opset_import or not model.graph.node:
        raise _corrupt("The file holds no ONNX graph", path)
    return model


def _corrupt(what: str, path: Path) -> CorruptFile:
    return CorruptFile(f"{what}.", where=str(path), do="Export or download it again.")


_HALVES = tuple(
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1")
    if hasattr(onnx.TensorProto, name)
)
"""Dtypes of which a byte holds two."""
_MAX_DIMS = 32
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
        raise _corrupt(f"Graphs within graphs are more than {_MAX_DEPTH} deep", path)
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


def _check_reference(
    tensor: onnx.TensorProto, path: Path, places: dict[Path, dict[str, tuple[int, int]] | None]
) -> None:
    """`places`: for each file seen, where its tensors are if it is a safetensors file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"{path}: {tensor.name}"
    if len(entries) != len(tensor.external_data):
        raise _corrupt(f"Tensor {tensor.name} says twice where its data is", path)
    if not _plain(location):
        raise UnsafeReference(
            f"The graph takes weights from {location!r}, which is not a plain file name.",
            where=where,
            do="Do not use this file: it tries to leave its directory.",
        )
    file = path.parent / location
    if not file.exists():
        raise MissingShard(
            f"The graph takes weights from {location}, which is not there.",
            where=where,
            do="Put the file of weights beside the graph, under that name.",
        )
    if not file.is_file() or file.resolve().parent != path.parent.resolve():
        raise UnsafeReference(
            f"{location} is no file of this directory: a link out of it, or no regular file.",
            where=where,
            do="Copy the file itself beside the graph.",
        )
    expected, size = _nbytes(tensor, path), file.stat().st_size
    offset = _integer(entries.get("offset", "0"), tensor, path)
    length = _integer(entries.get("length", str(expected)), tensor, path)
    if length != expected or offset + length > size:
        raise CorruptFile(
            f"Tensor {tensor.name} takes {expected} bytes; the graph gives it {length} at {offset}"
            f" of the {size} in {location}.",
            where=where,
            do="The weights are truncated, or of another model; export again.",
        )
    if file not in places:
        places[file] = SafetensorsReader(file).places if file.suffix == ".safetensors" else None
    known = places[file]
    if known is not None and known.get(tensor.name) != (offset, length):
        raise TensorMismatch(
            f"{location} does not hold {tensor.name} where the graph expects it.",
            where=where,
            do="The weights have changed since the graph was written; export it again.",
        )


def _check_inline(tensor: onnx.TensorProto, path: Path) -> None:
    """What the file holds of a tensor must be what its dtype and dimensions say."""
    elements = _elements(tensor)
    if tensor.HasField("raw_data"):
        expected, found = _nbytes(tensor, path), len(tensor.raw_data)
        if tensor.data_type in _HALVES:
            expected = (elements + 1) // 2
        sound = expected == found and tensor.data_type != onnx.TensorProto.STRING
    else:
        field = "float_data"
        with suppress(KeyError):
            field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        expected, found = elements, len(getattr(tensor, field))
        sound = found in (expected, 2 * expected, (expected + 1) // 2)  # complex; of four bits
    if not sound or len(tensor.dims) > _MAX_DIMS or min(tensor.dims, default=0) < 0:
        raise _corrupt(
            f"Tensor {tensor.name} is not what its dimensions say: {expected} expected, {found} found",
            path,
        )


def _plain(name: str) -> bool:
    """Whether this is a file's name and nothing more, on any system."""
    return (
        name not in ("", ".", "..")
        and not set(name) & {"\0", "/", "\\", ":"}
        and PurePosixPath(name).name == PureWindowsPath(name).name == name
    )


def _integer(text: str, tensor: onnx.TensorProto, path: Path) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise _corrupt(f"Tensor {tensor.name}: {text!r} is not an offset or a length", path)
    return int(text)


def _nbytes(tensor: onnx.TensorProto, path: Path) -> int:
    """Bytes that the tensor takes by its dtype and dimensions."""
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, ValueError) as error:
        raise _corrupt(f"Tensor {tensor.name} has no known dtype", path) from error
    if any(size < 0 for size in tensor.dims):
        raise _corrupt(f"Tensor {tensor.name} has a negative dimension", path)
    return _elements(tensor) * int(dtype.itemsize)


def _elements(tensor: onnx.TensorProto) -> int:
    return math.prod(map(int, tensor.dims))


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
