"""Reading tensors from weight files, one at a time, without mapping the whole file.

The safetensors library validates every file (its header, offsets and sizes). The bytes are
then read with plain reads: memory that is mapped counts as resident, and the point is to
stay within one unit.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from converter.dtypes import CODES, NAMES, code_named, code_of, nbytes
from converter.errors import CorruptFile, TensorMismatch, passing
from converter.strict_json import Json

if TYPE_CHECKING:
    import torch

_CHUNK = 2**22


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header describes it."""

    name: str
    code: str
    """safetensors dtype code."""
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.code)


def recorded(code: str, shape: tuple[int, ...], sha256: str) -> Json:
    """What a record keeps of a tensor."""
    return {"dtype": NAMES[code], "shape": list(shape), "sha256": sha256}


Entry = tuple[str, ...]
"""The keys that lead to something in nested dicts and lists."""


class Reader(ABC):
    """The tensors of one weight file."""

    tensors: dict[str, Stored]
    other: dict[str, str]
    """Tensors that are no plain floats: name -> dtype, or what else they are. Only known buffers
    may be."""
    aliases: Mapping[str, str] = {}
    """Names that the file lacks -> the tensor that it says they are another name of."""
    entries: Mapping[str, Entry] = {}
    """For a bundle: by tensor, the entry that holds it."""
    configs: Sequence[tuple[Entry, dict[str, Any]]] = ()
    """For a bundle: what looks like a model's config, and where."""
    beside: tuple[str, ...] = ()
    """For a bundle: its keys."""
    seeks = False
    """Whether rows can be had without the rest of their tensor."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in its stored dtype and shape. KeyError if there is none."""

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Part of a tensor, along its first axis. KeyError if there is no such tensor."""
        return self.read(name)[start:stop]


class SafetensorsReader(Reader):
    """A `.safetensors` file.

    Raises:
        CorruptFile: the safetensors library refuses the file.
    """

    seeks = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {}
        self.other = {}
        self.places: dict[str, tuple[int, int]] = {}
        """Each tensor's offset from the beginning of the file, and its bytes."""
        try:
            with open_safetensors(path) as file:
                # safetensors.torch.save_model notes the names of shared tensors that it drops.
                self.aliases: dict[str, str] = file.metadata() or {}
                offset = 8 + int.from_bytes(_head(path, 8), "little")
                # The library has checked that tensors follow one another without a gap.
                for name in file.offset_keys():
                    piece = file.get_slice(name)
                    code, shape = str(piece.get_dtype()), tuple(piece.get_shape())
                    if len(shape) > 32 or math.prod(size or 1 for size in shape) > 2**48:
                        raise ValueError(f"tensor {name} has the shape {list(shape)}")
                    if code in CODES:
                        self.tensors[name] = Stored(name, code, shape, path)
                        size = self.tensors[name].nbytes
                    else:
                        self.other[name] = code
                        size = _bytes_of(code, shape, path, name)
                    self.places[name] = offset, size
                    offset += size
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, OSError) and passing(error):
                raise
            raise CorruptFile(
                f"The file is not a sound safetensors file: {error}.",
                where=str(path),
                do="Download or save it again; compare its size and checksum with the original's.",
            ) from error

    def read(self, name: str) -> np.ndarray:
        return read_at(self.tensors[name], self.places[name][0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        stored, offset = self.tensors[name], self.places[name][0]
        length, *rest = stored.shape
        start, stop, _ = slice(start, stop).indices(length)
        part = replace(stored, shape=(max(0, stop - start), *rest))
        return read_at(part, offset + start * (stored.nbytes // max(1, length)))

    def rest_sha256(self, but: Collection[str]) -> str:
        """One SHA-256 of the file's header and of its tensors but these."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            left = (place for name, place in self.places.items() if name not in but)
            for start, size in [(0, header), *left]:
                feed(digest, file, start, size)
        return digest.hexdigest()


def feed(digest: Any, file: BinaryIO, start: int, size: int) -> None:
    """Give a digest a part of an open file: as much of it as is there."""
    file.seek(start)
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)


def read_at(stored: Stored, offset: int) -> np.ndarray:
    """A tensor's bytes from its file.

    Raises:
        CorruptFile: the file is shorter than it was.
    """
    result = np.empty(stored.shape, CODES[stored.code])
    rest = result.reshape(-1).view(np.uint8).data
    with open(stored.file, "rb", buffering=0) as file:  # np.fromfile takes several times as long
        file.seek(offset)
        while rest and (count := file.readinto(rest)):
            rest = rest[count:]
    if rest:
        raise CorruptFile(
            f"The file ended inside tensor {stored.name}.",
            where=str(stored.file),
            do="The file changed while it was being read; run again when nothing writes to it.",
        )
    return result


_MOST_TENSORS, _LONGEST_HEADER = 100_000, 16 * 2**20


def open_safetensors(path: Path) -> Any:
    """What the safetensors library makes of a file, to be used as a context manager.

    Raises:
        SafetensorError: it refuses the file; or the header is longer than any GPT-Neo's, which would
            take many times its length in memory.
        OSError: the file cannot be read.
    """
    if (length := int.from_bytes(_head(path, 8), "little")) > _LONGEST_HEADER:
        raise SafetensorError(f"its header is {length:,} bytes long")
    file: Any = safe_open(path, framework="numpy")
    if (count := len(file.keys())) > _MOST_TENSORS:
        raise SafetensorError(f"it names {count:,} tensors")
    return file


def _head(path: Path, n: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(n)


def _bytes_of(code: str, shape: tuple[int, ...], path: Path, name: str) -> int:
    bits = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64,
            "I64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "C64": 64}.get(code)  # fmt: skip
    if bits is None:
        raise TensorMismatch(
            f"Tensor {name} has dtype {code}; weights are float64, float32, float16 or bfloat16.",
            where=str(path),
            do="Save the checkpoint in one of these dtypes.",
        )
    return math.prod(shape) * bits // 8


class TorchReader(Reader):
    """Tensors that are in memory already, of one state dict. What is read of a tensor on the CPU
    is a view, and cannot be written to.

    Args:
        place: what messages call the place where they are.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], place: Path) -> None:
        import torch

        self.tensors, self.other = {}, {}
        self._state: dict[str, torch.Tensor] = {}
        codes = {getattr(torch, name): code for code, name in NAMES.items()}
        for name, tensor in state.items():
            if odd := odd_kind(tensor):
                self.other[name] = odd
            elif code := codes.get(tensor.dtype):
                self.tensors[name] = Stored(name, code, tuple(tensor.shape), place)
                self._state[name] = tensor
            else:
                self.other[name] = str(tensor.dtype)

    def read(self, name: str) -> np.ndarray:
        array = as_numpy(self._state[name])
        array.flags.writeable = False
        return array


def odd_kind(tensor: torch.Tensor) -> str | None:
    """What a tensor is that has no plain bytes of its own."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return type(tensor).__name__
    if tensor.is_nested:
        return "nested"
    if tensor.device.type == "meta":
        return "meta"
    kind = str(tensor.layout).removeprefix("torch.")
    return None if kind == "strided" else kind


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bits as an array, without a copy where it is on the CPU and contiguous."""
    import torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    dtype = CODES[code_named(str(tensor.dtype).removeprefix("torch."))]
    return cast(
        np.ndarray,
        tensor.detach().cpu().resolve_neg().contiguous().view(integers).numpy().view(dtype),
    )


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor with memory of its own. The inverse of `as_numpy`."""
    import torch

    integers = np.dtype(f"i{array.dtype.itemsize}")
    own = np.array(array, order="C", copy=True).view(integers)
    return torch.from_numpy(own).view(getattr(torch, NAMES[code_of(array)]))


def plain_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """A cfg dict as JSON would hold it: `torch.float32` becomes "float32"."""
    import torch

    def simple(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, np.generic):
            return value.item()
        try:
            return json.loads(json.dumps(value))
        except (TypeError, ValueError):
            return str(value)

    return {str(key): simple(value) for key, value in cfg.items()}
