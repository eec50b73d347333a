"""`ledger.safetensors`: what processing took away, beside the processed weights.

One safetensors file for all units; the JSON that describes them is its metadata. The
arithmetic is in `converter.processing.ledger`; here is only the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from converter.checkpoint.source import LEDGER
from converter.errors import CorruptFile
from converter.processing.ledger import UnitLedger

SCHEMA_VERSION = 1
Json = dict[str, Any]


class LedgerWriter:
    """Collects the units' ledgers while weights stream by. They are small; the file is one write."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._arrays: dict[str, np.ndarray] = {}
        self._units: Json = {}

    def add(self, prefix: str, unit: UnitLedger, processed_sha256: Mapping[str, str]) -> None:
        """Keep a unit's ledger, and the digest of each processed tensor it was made for."""
        self._arrays |= unit.arrays
        self._units[prefix] = {**unit.meta, "processed": dict(processed_sha256)}

    def save(self, directory: Path, *, tied: bool, original_sha256: Mapping[str, str]) -> int:
        """Write the file; returns its size in bytes. `original_sha256` is by HF name."""
        meta = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "tied": tied,
            "original": dict(original_sha256),
            "units": self._units,
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays.items()}
        path = directory / LEDGER
        save_file(arrays, path, metadata={"ledger": json.dumps(meta)})
        return path.stat().st_size


@dataclass(frozen=True)
class LedgerFile:
    """An open ledger; `unit` reads one unit's arrays."""

    path: Path
    meta: Json

    @property
    def kind(self) -> str:
        return str(self.meta["kind"])

    @property
    def tied(self) -> bool:
        return bool(self.meta["tied"])

    @property
    def original_sha256(self) -> dict[str, str]:
        """Digest of each original HF tensor's bytes, by HF name."""
        return dict(self.meta["original"])

    def tensor(self, prefix: str, name: str) -> Json:
        """What the ledger knows of an original tensor: dtype, shape, how it is kept."""
        found = self.meta["units"].get(prefix, {}).get("tensors", {}).get(name)
        if not isinstance(found, dict):
            raise self._corrupt(f"it knows nothing of {prefix}{name}")
        return found

    def processed_sha256(self, prefix: str) -> dict[str, str]:
        """Digests of the processed tensors the ledger was made for, in `hooked` axes."""
        return dict(self.meta["units"].get(prefix, {}).get("processed", {}))

    def unit(self, prefix: str) -> UnitLedger:
        if prefix not in self.meta["units"]:
            raise self._corrupt(f"it has no unit {prefix!r}")
        with safe_open(self.path, framework="numpy") as file:
            names = [n for n in file.keys() if n.startswith(prefix)]  # noqa: SIM118
            return UnitLedger({n: file.get_tensor(n) for n in names}, self.meta["units"][prefix])

    def _corrupt(self, why: str) -> CorruptFile:
        return CorruptFile(
            f"The ledger does not fit the weights: {why}.",
            where=str(self.path),
            do="Use the ledger that was written beside these weights, or --reverse functional.",
        )


def open_ledger(directory: Path) -> LedgerFile | None:
    """The ledger beside a checkpoint, or None. CorruptFile if it cannot be read."""
    path = directory / LEDGER
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            meta = json.loads((file.metadata() or {})["ledger"])
        if meta["schema_version"] != SCHEMA_VERSION or not isinstance(meta["units"], dict):
            raise ValueError(f"schema version {meta['schema_version']}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"The ledger cannot be read: {error}.",
            where=str(path),
            do="Restore it from a copy, or use --reverse functional, which needs none.",
        ) from error
    return LedgerFile(path, meta)
