"""Where the bytes of the graph's weights live.

shared    in the checkpoint's own safetensors files: the graph says at which offset
external  in one file beside the graph, written tensor by tensor
inline    in the graph's file itself, which protobuf limits to 2 GB

Shared weights are multiplied as they are stored, and none is transposed at run time: `out_in` is
HF's and the bridge's form, Gemm(transB=1); `heads` is HookedTransformer's, with an axis for the
heads. A graph with weights of its own has them `in_out`, MatMul and Add: onnxruntime makes one Gemm
of these, as fast as the other, and they are what quantisers look for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from converter.checkpoint import Checkpoint
from converter.checkpoint.reader import SafetensorsReader
from converter.dtypes import chunks, nbytes
from converter.errors import UsageError
from converter.layout import EMBEDDING, HEAD, LAYOUTS, Slot, expand

Mode = Literal["shared", "external", "inline"]
Form = Literal["out_in", "in_out", "heads"]
DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
"""ONNX's dtypes by safetensors code."""
INLINE_LIMIT = 2**31 - 2**22
"""Bytes of weights beyond which a protobuf file would pass 2 GB; 4 MiB are left for the graph."""
_LARGE, _PAGE, _SMALL_ALIGNMENT = 2**20, 4096, 64


@dataclass(frozen=True)
class Placed:
    """Where a weight is, and what it is there."""

    key: str
    """Its `hooked` name."""
    name: str
    """The initializer's: for `shared`, the tensor's in the file."""
    code: str
    """safetensors dtype code."""
    shape: tuple[int, ...]
    slot: Slot
    """Its row of the layout table, in the layout of the bytes but for `turned`."""
    file: str | None = None
    """A plain name beside the graph; None: inline."""
    offset: int = 0
    turned: bool = False
    """[in, out], which is the layout's matrix transposed."""

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.code)


@dataclass(frozen=True)
class GraphWeights:
    """The places of a model's weights, by `hooked` name. A key that is absent is neutral."""

    checkpoint: Checkpoint
    mode: Mode
    form: Form
    places: Mapping[str, Placed]

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.places.values())

    def tensor(self, key: str, shape: tuple[int, ...], directory: Path) -> ir.TensorProtocol:
        """The weight as an initializer. `shape`: the stored one, or another with the same order."""
        place = self.places[key]
        dtype = DTYPES[place.code]
        if place.file is None:
            array = np.ascontiguousarray(self.array(place)).reshape(shape)
            return ir.Tensor(array, dtype=dtype, name=place.name)
        return ir.ExternalTensor(
            place.file, place.offset, place.nbytes, dtype,
            shape=ir.Shape(shape), name=place.name, base_dir=directory,
        )  # fmt: skip

    def array(self, place: Placed) -> np.ndarray:
        """The weight itself, read now, as `place` describes it."""
        tensor = self.checkpoint.tensor(place.key, place.code)
        stored = place.slot.to_hub.inverse.apply(tensor, self.checkpoint.config.sizes)
        return np.ascontiguousarray(stored.T) if place.turned else stored

    def write(self, path: Path) -> None:
        """Write the file of `external` weights, one tensor in memory at a time."""
        with open(path, "xb") as file:
            for place in self.places.values():
                file.write(b"\0" * (place.offset - file.tell()))
                for chunk in chunks(self.array(place)):
                    file.write(chunk.reshape(-1).view(np.uint8).data)


def place_weights(checkpoint: Checkpoint, mode: Mode, data_file: str) -> GraphWeights:
    """Decide where each weight is. `data_file`: the name of `external`'s file.

    A head that is the embedding again is left out of what is written. What is shared is in the
    files already, so there nothing but headers is read.

    Raises:
        UsageError: the weights cannot be shared (pickle files), or are too large for inline.
    """
    if mode == "shared":
        form: Form = "heads" if LAYOUTS[checkpoint.layout].by_head else "out_in"
        return GraphWeights(checkpoint, mode, form, _shared(checkpoint))
    places: dict[str, Placed] = {}
    end = 0
    for place in _own(checkpoint):
        alignment = _PAGE if place.nbytes >= _LARGE else _SMALL_ALIGNMENT
        start = end + -end % alignment
        places[place.key] = place
        if mode == "external":
            places[place.key] = replace(place, file=data_file, offset=start)
        end = start + place.nbytes
    weights = GraphWeights(checkpoint, mode, "in_out", places)
    if mode == "inline":
        require_inline(weights.nbytes)
    return weights


def require_inline(nbytes: int) -> None:
    """
    Raises:
        UsageError: so many bytes of weights do not fit into a graph's own file.
    """
    if nbytes > INLINE_LIMIT:
        raise UsageError(
            f"The weights take {nbytes:,} bytes; an ONNX file with inline weights ends at 2 GB.",
            where="--weights inline",
            do="Leave --weights out, or use --weights external with an OUTPUT directory.",
        )


def shareable(checkpoint: Checkpoint) -> bool:
    """Whether the weights are in safetensors files, which a graph can point into."""
    return all(stored.file.suffix == ".safetensors" for stored in checkpoint.stored.values())


def _shared(checkpoint: Checkpoint) -> dict[str, Placed]:
    if not shareable(checkpoint):
        raise UsageError(
            "The weights are in a pickle file, which a graph cannot point into.",
            where=str(checkpoint.source.path),
            do="Name an OUTPUT directory: the weights are written there as safetensors, with the graph.",
        )
    offsets = {file: SafetensorsReader(file).places for file in shared_files(checkpoint)}
    places: dict[str, Placed] = {}
    for key, slot in checkpoint.slots.items():
        if stored := checkpoint.stored.get(key):
            file, (offset, _) = stored.file, offsets[stored.file][stored.name]
            places[key] = Placed(
                key, stored.name, stored.code, stored.shape, slot, file.name, offset
            )
    return places


def _own(checkpoint: Checkpoint) -> Iterator[Placed]:
    """Every weight, matrices [in, out], under the layout's own names (hooked: the bridge's)."""
    layout = "bridge" if LAYOUTS[checkpoint.layout].by_head else checkpoint.layout
    slots = expand(layout, checkpoint.config.sizes, checkpoint.config.n_layers)
    for key, slot in slots.items():
        stored = checkpoint.stored.get(key)
        if stored and not (key == HEAD and checkpoint.tied):
            turned = multiplies(key)
            shape = slot.shape[::-1] if turned else slot.shape
            yield Placed(key, str(slot.name), stored.code, shape, slot, turned=turned)


def multiplies(key: str) -> bool:
    """Whether this is a matrix that multiplies, and no table of rows or vector."""
    return ".W_" in key and key not in (EMBEDDING, "pos_embed.W_pos")


def shared_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold the weights, in the order in which they are first needed."""
    return list(dict.fromkeys(stored.file for stored in checkpoint.stored.values()))
