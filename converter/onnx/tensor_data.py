"""The data of a graph's tensors: where it is, and whether it is as long as the tensor's shape says."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx

from converter.checkpoint.reader import SafetensorsReader
from converter.errors import CorruptFile, MissingShard, TensorMismatch, UnsafeReference

_HALVES = tuple(
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1")
    if hasattr(onnx.TensorProto, name)
)
"""Dtypes of which a byte holds two."""
_MAX_DIMS = 32
Places = dict[Path, dict[str, tuple[int, int]] | None]
"""For each file seen, where its tensors are if it is a safetensors file."""

AGAIN = "Download it again; or remove it, and export it again: neoconvert export-onnx CHECKPOINT"
"""What to do about a graph that is damaged, or not of the weights beside it."""


def corrupt(what: str, path: Path) -> CorruptFile:
    return CorruptFile(f"{what}.", where=str(path), do=AGAIN)


def check_reference(tensor: onnx.TensorProto, path: Path, places: Places) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"{path}: {tensor.name}"
    if len(entries) != len(tensor.external_data):
        raise corrupt(f"Tensor {tensor.name} says twice where its data is", path)
    if not _plain(location):
        raise UnsafeReference(
            f"The graph takes weights from {location!r}, which is not a plain file name.",
            where=where,
            do="Do not use this file: it tries to leave its directory.",
        )
    file = path.parent / location
    if not os.path.exists(file):  # Path.exists raises where a name is too long
        raise MissingShard(
            f"The graph takes weights from {location}, which is not there.",
            where=where,
            do="Put the file of weights beside the graph, under that name.",
        )
    if file.samefile(path):
        raise corrupt(
            f"Tensor {tensor.name} has its data in the graph itself, as if beside it", path
        )
    if not file.is_file() or file.resolve().parent != path.parent.resolve():
        raise UnsafeReference(
            f"{location} is no file of this directory: a link out of it, or no regular file.",
            where=where,
            do="Copy the file itself beside the graph.",
        )
    expected, size = data_size(tensor, path), file.stat().st_size
    offset = _integer(entries.get("offset", "0"), tensor, path)
    length = _integer(entries.get("length", str(expected)), tensor, path)
    if length != expected or offset + length > size:
        raise CorruptFile(
            f"Tensor {tensor.name} takes {expected} bytes; the graph gives it {length} at {offset}"
            f" of the {size} in {location}, which is truncated or another model's.",
            where=where,
            do=AGAIN,
        )
    if file not in places:
        places[file] = SafetensorsReader(file).places if file.suffix == ".safetensors" else None
    known = places[file]
    if known is not None and known.get(tensor.name) != (offset, length):
        raise TensorMismatch(
            f"{location} does not hold {tensor.name} where the graph expects it: it was changed since.",
            where=where,
            do=AGAIN,
        )


def check_inline(tensor: onnx.TensorProto, path: Path) -> None:
    """What the file holds of a tensor must be what its dtype and dimensions say."""
    count = elements(tensor)
    if tensor.HasField("raw_data"):
        expected, found = data_size(tensor, path), len(tensor.raw_data)
        if tensor.data_type in _HALVES:
            expected = (count + 1) // 2
        sound = expected == found and tensor.data_type != onnx.TensorProto.STRING
    else:
        field = "float_data"
        with suppress(KeyError):
            field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        expected, found = count, len(getattr(tensor, field))
        sound = found in (expected, 2 * expected, (expected + 1) // 2)  # complex; of four bits
    if not sound or len(tensor.dims) > _MAX_DIMS or min(tensor.dims, default=0) < 0:
        raise corrupt(
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
        raise corrupt(f"Tensor {tensor.name}: {text!r} is not an offset or a length", path)
    return int(text)


def data_size(tensor: onnx.TensorProto, path: Path) -> int:
    """Bytes that the tensor takes by its dtype and dimensions."""
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, ValueError) as error:
        raise corrupt(f"Tensor {tensor.name} has no known dtype", path) from error
    if any(size < 0 for size in tensor.dims):
        raise corrupt(f"Tensor {tensor.name} has a negative dimension", path)
    return elements(tensor) * int(dtype.itemsize)


def elements(tensor: onnx.TensorProto) -> int:
    return math.prod(map(int, tensor.dims))
