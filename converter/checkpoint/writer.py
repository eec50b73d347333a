"""Writing safetensors header first: all shapes are known from the plan.

The safetensors library writes a file from tensors that are all in memory. Here each piece of a
tensor goes to its place as soon as it is made, hashed and written while the next is made. What is written is
what the library would accept; it reads every file back before it is published.

A file has a digest too, taken on the way: tensors come in the order of the file, unless dtypes are mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from converter.background import Background
from converter.checkpoint.plan import Plan, Planned
from converter.checkpoint.record import sha256_of
from converter.checkpoint.renaming import begin_sync
from converter.checkpoint.standard import INDEX, WEIGHTS
from converter.dtypes import chunks

ALIGNMENT = 8
_ENOUGH = 2**25
"""Bytes after which the disk is set to work."""


@dataclass
class _Shard:
    """A file that is being written."""

    file: BinaryIO
    digest: Any
    hashed: int
    """How far into the file its digest has come."""


class Writer:
    """A context manager that writes a plan's shards and their index into a directory.

    Every tensor of the plan is written once, in any order. Leaving the context without an
    exception checks that all were, writes the index and syncs the files.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory, self.plan = directory, plan
        self.sha256: dict[str, str] = {}
        """Digest of each tensor's bytes as written, by name; complete when the context is left."""
        self.files: dict[str, str] = {}
        """That of each shard, by name; likewise."""
        self._started: set[str] = set()
        # A file's digest is taken beside those of its tensors: on one core both take twice as long.
        self._writing, self._hashing, self._whole = Background(), Background(), Background()
        self._held = ExitStack()
        self._waiting = 0
        """Bytes that the disk may not have begun to write."""
        self._shards: dict[str, _Shard] = {}
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> Writer:
        with ExitStack() as held:  # a shard that cannot be started leaves none open
            for shard in self.plan.shards:
                self._start(shard, held)
            for each in (self._writing, self._hashing, self._whole):
                held.enter_context(each)
            self._held = held.pop_all()
        return self

    def _start(self, shard: str, held: ExitStack) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, begins = 0, {}
        for tensor in self.plan.in_shard(shard):
            begins[tensor.name] = offset
            offset += tensor.nbytes
            header[tensor.name] = {
                "dtype": tensor.code,
                "shape": list(tensor.shape),
                "data_offsets": [begins[tensor.name], offset],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        start = 8 + len(text)
        file = held.enter_context(open(self.directory / shard, "xb"))  # noqa: SIM115
        head = len(text).to_bytes(8, "little") + text
        file.write(head)
        file.flush()
        self._shards[shard] = _Shard(file, hashlib.sha256(head), start)
        if hasattr(os, "posix_fallocate"):  # a full disk shows now, not after an hour
            os.posix_fallocate(file.fileno(), 0, start + offset)
        self._offsets |= {name: start + begin for name, begin in begins.items()}

    def write(self, tensor: Planned, array: np.ndarray) -> None:
        """Put a tensor where the header says it is. `array` has the planned dtype and shape; it may
        be computed piece by piece (`converter.piecewise`)."""
        if array.shape != tensor.shape or tensor.name in self._started:
            raise AssertionError(f"{tensor.name}: {array.shape}, planned {tensor.shape}, once")
        shard, digest = self._shards[tensor.shard], hashlib.sha256()
        offset = self._offsets[tensor.name]
        following = shard.hashed == offset
        if following:
            shard.hashed += tensor.nbytes

        def done() -> None:
            self.sha256[tensor.name] = digest.hexdigest()

        self._started.add(tensor.name)
        self._writing.do(shard.file.seek, offset)
        for chunk in chunks(array):
            raw = chunk.reshape(-1).view(np.uint8).data
            self._writing.do(self._put, shard.file, raw)
            if following:
                self._whole.do(shard.digest.update, raw)
            self._hashing.do(digest.update, raw)
        self._hashing.do(done)

    def _put(self, file: BinaryIO, raw: memoryview) -> None:
        file.write(raw)
        self._waiting += raw.nbytes
        if self._waiting >= _ENOUGH:
            self._waiting = 0
            begin_sync(file.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)  # waits for what is still to be done
        if error is not None:
            return
        missing = {t.name for t in self.plan.tensors} - set(self.sha256)
        if missing:
            raise AssertionError(f"planned but never written: {sorted(missing)[:4]}")
        if len(self.plan.shards) > 1:
            self._write_index()
        for name, shard in self._shards.items():
            path = self.directory / name
            whole = shard.hashed == path.stat().st_size
            self.files[name] = shard.digest.hexdigest() if whole else sha256_of(path)

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_parameters": self.plan.n_params, "total_size": self.plan.nbytes},
            "weight_map": {
                t.name: t.shard for t in sorted(self.plan.tensors, key=lambda t: t.name)
            },
        }
        path = self.directory / f"{WEIGHTS}{INDEX}"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
