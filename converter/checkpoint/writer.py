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
        self._running: dict[str, Any] = {}
        self._hashed: dict[str, int] = {}
        """How far into each shard its running digest has come."""
        self._files: dict[str, BinaryIO] = {}
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
        offset = 0
        tensors = self.plan.in_shard(shard)
        for tensor in tensors:
            end = offset + tensor.nbytes
            header[tensor.name] = {
                "dtype": tensor.code,
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        start = 8 + len(text)
        file = held.enter_context(open(self.directory / shard, "xb"))  # noqa: SIM115
        self._files[shard] = file
        head = len(text).to_bytes(8, "little") + text
        file.write(head)
        file.flush()
        self._running[shard], self._hashed[shard] = hashlib.sha256(head), start
        if hasattr(os, "posix_fallocate"):  # a full disk shows now, not after an hour
            os.posix_fallocate(file.fileno(), 0, start + offset)
        for tensor in tensors:
            begin, _ = header[tensor.name]["data_offsets"]  # type: ignore[index]
            self._offsets[tensor.name] = start + begin

    def write(self, tensor: Planned, array: np.ndarray) -> None:
        """Put a tensor where the header says it is. `array` has the planned dtype and shape; it may
        be computed piece by piece (`converter.piecewise`)."""
        if array.shape != tensor.shape or tensor.name in self._started:
            raise AssertionError(f"{tensor.name}: {array.shape}, planned {tensor.shape}, once")
        file, digest = self._files[tensor.shard], hashlib.sha256()
        offset = self._offsets[tensor.name]
        following = self._hashed[tensor.shard] == offset  # what the file's digest has come to
        if following:
            self._hashed[tensor.shard] += tensor.nbytes

        def done() -> None:
            self.sha256[tensor.name] = digest.hexdigest()

        self._started.add(tensor.name)
        self._writing.do(file.seek, offset)
        for chunk in chunks(array):
            raw = chunk.reshape(-1).view(np.uint8).data
            self._writing.do(self._put, file, raw)
            if following:
                self._whole.do(self._running[tensor.shard].update, raw)
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
        for shard, digest in self._running.items():
            path = self.directory / shard
            whole = self._hashed[shard] == path.stat().st_size
            self.files[shard] = digest.hexdigest() if whole else sha256_of(path)

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_parameters": self.plan.n_params, "total_size": self.plan.nbytes},
            "weight_map": {
                t.name: t.shard for t in sorted(self.plan.tensors, key=lambda t: t.name)
            },
        }
        path = self.directory / f"{WEIGHTS}{INDEX}"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
