"""`ledger.safetensors`: what processing took away, beside the processed weights.

One safetensors file for all units; the JSON that describes them is its metadata. The
arithmetic is in `converter.processing.ledger`; here is only the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from converter import strict_json
from converter.checkpoint.reader import open_safetensors
from converter.checkpoint.source import LEDGER
from converter.choices import LedgerKind
from converter.dtypes import contiguous, sha256
from converter.errors import CorruptFile
from converter.layout import Slot
from converter.processing.unit_ledger import WITHOUT, UnitLedger, corrupt_ledger, expect
from converter.strict_json import Json

SCHEMA_VERSION = 1


_SMALL = 2**14
"""Bytes of an array that may wait in memory."""


class LedgerWriter:
    """Collects the units' ledgers while weights stream by; the file is one write.

    Arrays wait in a file without a name: of a large model, an exact ledger's take hundreds of megabytes.
    """

    def __init__(self, kind: LedgerKind, directory: Path) -> None:
        self.kind = kind
        self.directory = directory
        """Where the ledger will be, and where there is room for it."""
        self._arrays: dict[str, np.ndarray] = {}
        self._aside: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
        """By name, where in the file an array begins, its dtype and shape."""
        self._file: IO[bytes] | None = None
        self._units: Json = {}

    def add(self, unit: UnitLedger) -> None:
        """Keep a unit's ledger."""
        for name, array in unit.arrays.items():
            if array.nbytes <= _SMALL:
                self._arrays[name] = array
            else:
                self._put_aside(name, array)
        self._units[unit.prefix] = {
            "kind": self.kind,
            **unit.to_json(),
            "processed": {},
            "arrays": {name: sha256(array) for name, array in unit.arrays.items()},
        }

    def made_for(self, slot: Slot, sha256: str) -> None:
        """Note the digest of a processed tensor, in `hooked` axes, that a unit's ledger is for."""
        self._units[slot.prefix]["processed"][slot.local] = sha256

    def _put_aside(self, name: str, array: np.ndarray) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115 - `close`
        self._aside[name] = self._file.tell(), array.dtype, array.shape
        self._file.write(contiguous(array).reshape(-1).view(np.uint8).data)

    def _all(self) -> dict[str, np.ndarray]:
        # np.ascontiguousarray would give a number an axis.
        arrays = {name: np.require(array, requirements="C") for name, array in self._arrays.items()}
        if self._file is not None:
            self._file.flush()
            for name, (start, dtype, shape) in self._aside.items():
                arrays[name] = np.memmap(self._file, dtype, "r", start, shape)
        return dict(sorted(arrays.items()))

    def save(self, *, tied: bool, original_sha256: Mapping[str, str]) -> int:
        """Write the file; returns its size in bytes. `original_sha256` is by HF name."""
        meta = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "tied": tied,
            "original": dict(original_sha256),
            "units": self._units,
        }
        path = self.directory / LEDGER
        try:
            save_file(self._all(), path, metadata={"ledger": json.dumps(meta)})
        except SafetensorError as error:  # what the system said is in its text alone
            found = re.search(r"os error (\d+)", str(error))
            code = int(found[1]) if found else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error
        return path.stat().st_size

    def close(self) -> None:
        """Let go of the file without a name."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class LedgerFile:
    """An open ledger, its JSON parsed; `unit` reads one unit's arrays."""

    path: Path
    kind: LedgerKind
    tied: bool
    original_sha256: Mapping[str, str]
    """Digest of each original HF tensor's bytes, by HF name."""
    units: Mapping[str, UnitLedger]
    """By prefix, without their arrays."""
    processed_sha256: Mapping[str, Mapping[str, str]]
    """By prefix: digests of the processed tensors the ledger was made for, in `hooked` axes."""
    array_sha256: Mapping[str, str]
    """Digests of the file's own arrays. The first ledgers have none."""

    def code(self, slot: Slot) -> str | None:
        """The storage dtype of an original tensor, where the ledger knows it."""
        unit = self.units.get(slot.prefix)
        kept = unit.tensors.get(slot.local) if unit else None
        return kept.code if kept else None

    def unit(self, prefix: str) -> UnitLedger:
        """A unit's ledger with its arrays.

        Raises:
            CorruptFile: there is none, or an array is not the one that was written.
        """
        if prefix not in self.units:
            raise self._strange(f"it has no unit {prefix!r}")
        try:
            with open_safetensors(self.path) as file:
                names = [n for n in file.keys() if n.startswith(prefix)]  # noqa: SIM118
                arrays = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            # The last two: a dtype that NumPy lacks.
            raise self._strange(str(error)) from error
        for name, array in arrays.items():
            if sha256(array) != self.array_sha256.get(name, sha256(array)):
                raise self._strange(f"{name} is not what was written")
        unit = self.units[prefix]
        return UnitLedger(prefix, unit.tensors, unit.steps, unit.rounding, arrays)

    def require_fits(self, slots: Mapping[str, Slot]) -> None:
        """
        Raises:
            CorruptFile: the ledger is of a model with other units, tensors or shapes.
        """
        known = {(slot.prefix, slot.local): slot.hub_shape for slot in slots.values()}
        for prefix in {prefix for prefix, _ in known} - set(self.units):
            raise self._strange(f"it has no unit {prefix!r}")
        for prefix, unit in self.units.items():
            for name, kept in unit.tensors.items():
                if known.get((prefix, name)) != kept.shape:
                    raise self._strange(f"it is for {prefix}{name} {list(kept.shape)}")

    def _strange(self, why: str) -> CorruptFile:
        return CorruptFile(
            f"The ledger does not fit the weights: {why}.",
            where=str(self.path),
            do=WITHOUT,
        )


def open_ledger(directory: Path) -> LedgerFile | None:
    """The ledger beside a checkpoint, or None. CorruptFile if it cannot be read."""
    path = directory / LEDGER
    if not path.is_file():
        return None
    try:
        with open_safetensors(path) as file:
            return _parsed(strict_json.loads((file.metadata() or {})["ledger"]), path)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise _unreadable(reason, path) from error
    except CorruptFile as error:
        raise _unreadable(f"{error.where}: {error.what}", path) from error


def _unreadable(why: str, path: Path) -> CorruptFile:
    return CorruptFile(
        f"The ledger cannot be read: {why.rstrip('.')[:300]}.",
        where=str(path),
        do=WITHOUT,
    )


def _parsed(document: Any, path: Path) -> LedgerFile:
    meta = expect(document, dict, "metadata")
    if meta["schema_version"] != SCHEMA_VERSION:
        raise corrupt_ledger("schema_version", f"it is {meta['schema_version']!r:.40}")
    if meta["kind"] not in get_args(LedgerKind):
        raise corrupt_ledger("kind", f"it is {meta['kind']!r:.40}")
    units = expect(meta["units"], dict, "units")
    arrays: dict[str, str] = {}
    for prefix, unit in units.items():
        arrays |= _digests(expect(unit, dict, f"unit {prefix!r}").get("arrays", {}), prefix)
    return LedgerFile(
        path=path,
        kind=meta["kind"],
        tied=expect(meta["tied"], bool, "tied"),
        original_sha256=_digests(meta["original"], "original"),
        units={prefix: UnitLedger.of_json(unit, prefix, {}) for prefix, unit in units.items()},
        processed_sha256={
            prefix: _digests(unit.get("processed"), f"{prefix} processed")
            for prefix, unit in units.items()
        },
        array_sha256=arrays,
    )


def _digests(document: Any, where: str) -> dict[str, str]:
    return {
        name: expect(digest, str, f"{where}: {name}")
        for name, digest in expect(document, dict, where).items()
    }
