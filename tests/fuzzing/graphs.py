"""Targets whose file is an ONNX graph: read and compared by us, and opened and run by onnxruntime
within our bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from converter.dtypes import sha256
from converter.errors import CorruptFile
from converter.onnx import Session
from converter.onnx.opening import open_graph, reader_of
from converter.onnx.reading import OnnxFile, read_onnx
from converter.onnx.structure import compare_nodes, unit_of
from tests.fuzzing import protos, values
from tests.fuzzing.target import Target, require
from tests.hostile import sound

_FILE = "model.onnx"


def _read_graph(data: bytes, place: Path) -> object:
    path = place / "src" / _FILE
    path.write_bytes(data)
    reader = reader_of(open_graph(path))
    found = reader.file
    for file in found.data_files:
        require(file.resolve().parent == path.resolve().parent, f"{file} is no file beside it")
    digests = {}
    for name, stored in reader.tensors.items():
        array = reader.read(name)
        require(array.shape == stored.shape, f"{name} is {array.shape}, and said to be {stored.shape}")  # fmt: skip
        digests[name] = sha256(np.ascontiguousarray(array))
    path.write_bytes(reader.model.SerializeToString())
    again: OnnxFile = read_onnx(path)
    require(again == found, f"written again, it is {again}")
    return found, digests


def _compare_graph(data: bytes, place: Path) -> object:
    path = place / "src" / _FILE
    path.write_bytes(data)
    nodes = compare_nodes(open_graph(path))
    return nodes, [unit_of(name) for name in nodes.differing]


def _run_graph(data: bytes, place: Path) -> object:
    path = place / "src" / _FILE
    path.write_bytes(data)
    session = Session(path, threads=1)
    tokens = np.arange(6).reshape(2, 3)
    try:
        found = session(tokens)
    except Exception as error:  # its exceptions have no base of their own
        theirs = type(error).__module__.startswith("onnxruntime")
        if not (theirs or isinstance(error, UnicodeDecodeError)):  # a message that is no text
            raise
        raise CorruptFile(str(error), where=str(path), do="Export it again.") from error
    return {name: (value.dtype, value.shape) for name, value in found.items()}


def _mutated(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.9:
        try:
            model = onnx.load_model_from_string(data)
            protos.mutated(model, rng)
            return bytes(model.SerializeToString())
        except Exception:  # it is no graph any more
            pass
    return values.text_mutated(data, rng)


def _seeds(*folders: Callable[[], Path]) -> Callable[[], list[bytes]]:
    return lambda: [(of() / _FILE).read_bytes() for of in folders]


def _beside(place: Path) -> None:
    """The files that either seed has its data in."""
    sound.copied(sound.beside, place / "src")
    (place / "src/model.onnx_data").write_bytes((sound.graph() / "model.onnx_data").read_bytes())


_BOTH = _seeds(sound.graph, sound.beside)
TARGETS = [
    Target("ONNX graph", _BOTH, _mutated, _read_graph, prepare=_beside),
    Target("ONNX graph, compared", _BOTH, _mutated, _compare_graph, prepare=_beside),
    Target("ONNX graph, run", _BOTH, _mutated, _run_graph, prepare=_beside),
]
