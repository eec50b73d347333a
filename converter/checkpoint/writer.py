"""Writing safetensors header first: all shapes are known from the plan.

The safetensors library writes a file from tensors that are all in memory. Here each tensor
goes to its place as soon as it is made, so memory holds one at a time. What is written is
what the library would accept; it reads every file back before it is published.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from converter.checkpoint.files import WEIGHTS
from converter.checkpoint.plan import Plan, Planned
from converter.dtypes import chunks

ALIGNMENT = 8


class Writer:
    """A context manager that writes a plan's shards and their index into a directory.

    Every tensor of the plan is written once, in any order. Leaving the context without an
    exception checks that all were, writes the index and syncs the files.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory, self.plan = directory, plan
        self.sha256: dict[str, str] = {}
        """Digest of each tensor's bytes as written, by name."""
        self._files: dict[str, BinaryIO] = {}
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> Writer:
        for shard in self.plan.shards:
            self._start(shard)
        return self

    def _start(self, shard: str) -> None:
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
        file = open(self.directory / shard, "xb")  # noqa: SIM115 - closed in __exit__
        self._files[shard] = file
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if hasattr(os, "posix_fallocate"):  # a full disk shows now, not after an hour
            os.posix_fallocate(file.fileno(), 0, start + offset)
        for tensor in tensors:
            begin, _ = header[tensor.name]["data_offsets"]  # type: ignore[index]
            self._offsets[tensor.name] = start + begin

    def write(self, tensor: Planned, array: np.ndarray) -> None:
        """Put a tensor where the header says it is. `array` has the planned dtype and shape."""
        if array.shape != tensor.shape or tensor.name in self.sha256:
            raise AssertionError(f"{tensor.name}: {array.shape}, planned {tensor.shape}, once")
        file = self._files[tensor.shard]
        file.seek(self._offsets[tensor.name])
        digest = hashlib.sha256()
        for chunk in chunks(array):
            raw = chunk.reshape(-1).view(np.uint8)
            digest.update(raw.data)
            file.write(raw.data)
        self.sha256[tensor.name] = digest.hexdigest()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                missing = {t.name for t in self.plan.tensors} - set(self.sha256)
                if missing:
                    raise AssertionError(f"planned but never written: {sorted(missing)[:4]}")
                if len(self.plan.shards) > 1:
                    self._write_index()
        finally:
            for file in self._files.values():
                file.close()

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_parameters": self.plan.n_params, "total_size": self.plan.nbytes},
            "weight_map": {
                t.name: t.shard for t in sorted(self.plan.tensors, key=lambda t: t.name)
            },
        }
        path = self.directory / f"{WEIGHTS}.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
