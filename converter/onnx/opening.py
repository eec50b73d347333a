"""An ONNX file as a checkpoint: its initializers are weights again, by their layout's names."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from converter import strict_json
from converter.checkpoint import Checkpoint, NeoConfig
from converter.checkpoint.config import checked, integers
from converter.checkpoint.files import read_json
from converter.checkpoint.hf_config import from_hf
from converter.checkpoint.names import read_names
from converter.checkpoint.reader import Reader, Stored, read_at
from converter.checkpoint.record import UNSEALED
from converter.checkpoint.source import PROVENANCE, Source
from converter.checkpoint.tl_config import from_tl
from converter.dtypes import CODES
from converter.errors import ConfigError
from converter.layout import LAYOUTS, Layout, expand
from converter.onnx.reading import read_onnx
from converter.onnx.tensor_data import AGAIN
from converter.onnx.weights import DTYPES, multiplies
from converter.strict_json import Json

CONFIG, MADE = "neoconvert.config", "neoconvert.provenance"
"""Metadata of our graphs: the architecture, and how the weights were made from their original."""
_CODES = {dtype.value: code for code, dtype in DTYPES.items()}
_EMBEDDINGS: dict[str, Layout] = {"embed.W_E": "hooked", "embed.weight": "bridge"}
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


class GraphReader(Reader):
    """The float initializers of an ONNX file that `read_onnx` has found sound.

    `turned`: names of those that the graph has as [in, out] where the layout has [out, in].

    Raises: see `read_onnx`.
    """

    def __init__(self, path: Path) -> None:
        self.file = read_onnx(path)
        self.model = onnx.load_model(str(path), load_external_data=False)
        self.path = path
        self.metadata = {entry.key: entry.value for entry in self.model.metadata_props}
        self._protos = {t.name: t for t in self.model.graph.initializer if t.data_type in _CODES}
        self.turned: set[str] = set()
        self.tensors = {}
        self.other = {}
        for name, tensor in self._protos.items():
            location = _external(tensor).get("location")
            file = path.parent / location if location else path
            self.tensors[name] = Stored(name, _CODES[tensor.data_type], tuple(tensor.dims), file)

    def read(self, name: str) -> np.ndarray:
        stored, tensor = self.tensors[name], self._protos[name]
        shape = stored.shape[::-1] if name in self.turned else stored.shape
        if stored.file != self.path:
            held = replace(stored, shape=shape)
            array = read_at(held, int(_external(tensor).get("offset", 0)))
        else:
            array = onnx.numpy_helper.to_array(tensor).view(CODES[stored.code]).reshape(shape)
        return array.T if name in self.turned else array

    def multiplied(self) -> set[str]:
        """Names of the matrices by which the graph multiplies as they are, [in, out]."""
        found, widened = set(), {}
        for node in self.model.graph.node:
            if node.op_type == "Cast" and node.input and node.output:
                widened[node.output[0]] = node.input[0]
            if (
                node.op_type in _PRODUCTS
                and len(node.input) > 1
                and not any(a.name == "transB" and a.i for a in node.attribute)
            ):
                found.add(widened.get(node.input[1], node.input[1]))
        return found


def reader_of(checkpoint: Checkpoint) -> GraphReader:
    """The reader of a checkpoint that `open_graph` made."""
    (reader,) = checkpoint.source.readers
    assert isinstance(reader, GraphReader)
    return reader


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def open_graph(
    path: Path, given: str | None = None, *, directory: Path | None = None
) -> Checkpoint:
    """Open an ONNX file as an artifact. Nothing but the graph is read; no runtime opens it.

    Graphs that neoconvert wrote say what they are. For others, config.json must be beside;
    those of their weights that do not have HF's names and shapes stay unknown (`complete`).

    Args:
        directory: the model's, if that is what was opened, and not the file alone.

    Raises:
        BadInput: see `read_onnx`; or no config says what the model is.
    """
    reader = GraphReader(path)
    beside = {
        name: read_json(path.parent / name)
        for name in ("config.json", "cfg.json", PROVENANCE)
        if (path.parent / name).is_file()
    }
    for name in ("config.json", PROVENANCE):  # of onnx/model.onnx
        if name not in beside and (path.parent.parent / name).is_file():
            beside[name] = read_json(path.parent.parent / name)
    made = _embedded(reader, MADE)
    source = Source(
        given=given or str(path),
        path=directory or path,
        readers=(reader,),
        hf_config=beside.get("config.json"),
        tl_config=beside.get("cfg.json"),
        generation_config=None,
        provenance=_provenance(made, beside.get(PROVENANCE)),
        config_path=path,
    )
    layout: Layout = "hf"
    for name, named in _EMBEDDINGS.items():  # quantised, it has a suffix
        known = any(t.name.startswith(name) for t in reader.model.graph.initializer)
        layout = named if known else layout
    config = _config(reader, source, layout)
    if config.n_layers > len(reader.tensors):  # before a table of that size is built
        raise ConfigError(
            f"The config says {config.n_layers} layers; the graph holds {len(reader.tensors)} tensors.",
            where=str(path),
            do="Put the config.json that belongs to this graph beside it.",
        )
    slots = expand(layout, config.sizes, config.n_layers)
    stored = {}
    names = _names(reader, layout)
    multiplied = reader.multiplied() if not LAYOUTS[layout].by_head else set()
    for key, slot in slots.items():
        tensor = reader.tensors.get(names.get(str(slot.name), str(slot.name)))
        if tensor and tensor.name in multiplied and multiplies(key) and len(tensor.shape) == 2:
            reader.turned.add(tensor.name)
            tensor = replace(tensor, shape=tensor.shape[::-1])
        # The graph may see the same bytes in another shape: heads and their width as one axis.
        if tensor and math.prod(tensor.shape) == math.prod(slot.shape):
            stored[key] = reader.tensors[tensor.name] = replace(tensor, shape=slot.shape)
    return Checkpoint(source, layout, config, slots, stored, {}, graph=path)


def _names(reader: GraphReader, layout: Layout) -> dict[str, str]:
    """A weight's name in the layout -> in the graph, whose weights may be shared with a file in
    which they have a prefix. Where two could be meant, neither is."""
    readings = [r for r in read_names(reader.tensors) if r.layout == layout]
    reads = readings[0].reads if readings else {}
    return {name: found[0].name for name, found in reads.items() if len(found) == 1}


def metadata(config: NeoConfig, made: Json) -> dict[str, str]:
    """What `open_graph` reads back. `made`: the part of neoconvert.json that says the route."""
    return {CONFIG: json.dumps(asdict(config)), MADE: json.dumps(made), "neoconvert.seal": UNSEALED}


def _provenance(made: Json | None, beside: Json | None) -> Json | None:
    """What the graph says of itself, before a file that may be of other weights; the source's name,
    which only the file has, where both are of one source."""
    if made is None or beside is None:
        return beside if made is None else made
    digests = made.get("source_sha256"), beside.get("source_sha256")
    same = digests[0] is not None and digests[0] == digests[1]
    return made | {"source": beside.get("source")} if same else made


def _embedded(reader: GraphReader, name: str) -> Json | None:
    try:
        value: Any = strict_json.loads(reader.metadata.get(name, "null"))
    except ValueError as error:
        raise ConfigError(
            f"The graph's metadata {name} is no JSON.",
            where=str(reader.path),
            do=AGAIN,
        ) from error
    return value if isinstance(value, dict) else None


def _config(reader: GraphReader, source: Source, layout: Layout) -> NeoConfig:
    where = str(reader.path)
    if fields := _embedded(reader, CONFIG):
        return _stated(fields, where)
    if LAYOUTS[layout].has_cfg and source.tl_config is not None:
        return from_tl(source.tl_config, where)
    if source.hf_config is not None:
        return from_hf(source.hf_config, where)
    raise ConfigError(
        "The graph does not say what model it is, and there is no config.json beside it.",
        where=where,
        do="Put the model's config.json beside the graph.",
    )


def _stated(fields: Json, where: str) -> NeoConfig:
    found = integers(fields, where)
    types, divisors = fields.get("attn_types"), fields.get("score_divisors", [])
    if (
        not isinstance(types, list)
        or not isinstance(divisors, list)
        or len(divisors) not in (0, found["n_layers"])
        or not all(isinstance(d, float) and math.isfinite(d) and d for d in divisors)
    ):
        raise ConfigError("The graph's config is malformed.", where=where, do=AGAIN)
    found |= {
        "attn_types": tuple(map(str, types)),
        "score_divisors": tuple(divisors),
        "act_fn": str(fields.get("act_fn")),
        "eps": fields.get("eps"),
        "folded": fields.get("folded") is True,
    }
    return checked(found, where)
