"""Whose files they are: digests show what neoconvert wrote, and what it did not.

A directory's neoconvert.json lists its files. A file that may stand alone (that one, a graph beside
someone's weights, a report) bears a seal: the SHA-256 of its bytes, the seal's own digits as zeros.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from converter import strict_json
from converter.checkpoint.files import read_json
from converter.checkpoint.reader import feed
from converter.checkpoint.signature import Identity, Signature, identity, signature
from converter.checkpoint.source import ATTESTATION, PROVENANCE
from converter.errors import BadInput

SEAL = "neoconvert-seal:"
UNSEALED = SEAL + "0" * 64
"""What a file holds, near its end, where `sealed` is to put the seal."""
_HEAD, _TAIL = 2**7, 2**16


def sealed(content: bytes) -> bytes:
    """The content with its last `UNSEALED` filled in; of the same length.

    Raises:
        ValueError: there is none.
    """
    start = content.rindex(UNSEALED.encode()) + len(SEAL)
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:start] + digest + content[start + 64 :]


def bears_seal(path: Path, mark: bytes = b"") -> bool:
    """Whether a regular file is, byte for byte, one that neoconvert sealed.

    Args:
        mark: what is near the beginning of those of its kind, and of no other that is sealed.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open(path, "rb") as file:
            if mark not in file.read(_HEAD):
                return False
            size = file.seek(0, os.SEEK_END)
            first = file.seek(max(0, size - _TAIL))
            tail = file.read()
            place = tail.rfind(SEAL.encode())
            if place < 0:
                return False
            place += len(SEAL)
            digest = hashlib.sha256()
            feed(digest, file, 0, first)
            digest.update(tail[:place] + b"0" * 64 + tail[place + 64 :])
            return bool(digest.hexdigest().encode() == tail[place : place + 64])
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        feed(digest, file, 0, os.fstat(file.fileno()).st_size)
    return digest.hexdigest()


def inventory(
    directory: Path, known: Mapping[str, str] | None = None
) -> dict[str, dict[str, str | int]]:
    """The record of a directory's files, by path: their bytes and SHA-256.

    Args:
        known: digests that were taken while files were written, by name: these are not read again.
    """
    record: dict[str, dict[str, str | int]] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            digest = (known or {}).get(name) or sha256_of(path)
            record[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return record


def rerecord(directory: Path) -> None:
    """Record a directory's files as they are now: what was done to them since is ours too, and what
    was attested of them is no more."""
    (directory / ATTESTATION).unlink(missing_ok=True)
    document = read_json(directory / PROVENANCE)
    files = inventory(directory)
    files.pop(PROVENANCE)
    write_record(directory, document | {"files": files})


def write_record(directory: Path, document: dict[str, Any]) -> None:
    """Write a directory's neoconvert.json, under a seal of its own."""
    content = strict_json.file_of(document | {"seal": UNSEALED}, indent=1)
    (directory / PROVENANCE).write_bytes(sealed(content))


@dataclass
class Survey:
    """What is in a directory."""

    where: Identity | None
    ours: dict[str, Signature] = field(default_factory=dict)
    """What neoconvert wrote, by path."""
    foreign: list[str] = field(default_factory=list)
    """Everything else, a file that was changed since among it."""
    folders: set[str] = field(default_factory=set)
    """Those that neoconvert made."""

    @property
    def empty(self) -> bool:
        return not self.ours and not self.foreign


def survey(directory: Path, *, deep: bool) -> Survey:
    """Which files are neoconvert's and which are not. Empty where there is no such directory.

    Args:
        deep: compare digests; else names and sizes, which is quick.
    """
    found = Survey(identity(directory))
    record = _recorded(directory / PROVENANCE)
    made = {str(parent) for name in record for parent in PurePosixPath(name).parents}

    def walk(folder: Path, prefix: str) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name, path = prefix + entry.name, Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                if name in made:
                    found.folders.add(name)
                    walk(path, f"{name}/")
                else:
                    found.foreign.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False) and (now := signature(path)):
                if not (_is(path, now, record.get(name), deep) or bears_seal(path)):
                    changed = name in record or name == PROVENANCE
                    found.foreign.append(f"{name} (changed since)" if changed else name)
                else:
                    found.ours[name] = now
            else:
                found.foreign.append(name)

    if found.where is not None:
        walk(directory, "")
    return found


def changes(directory: Path, *, largest: float = math.inf) -> dict[str, str]:
    """What is no longer as a directory's neoconvert.json recorded it: by file, "changed" or
    "missing". Nothing where there is no such record.

    Args:
        largest: bytes of a file that is still read; of a larger one only the size is compared.
    """
    path = directory / PROVENANCE
    if path.is_file() and not bears_seal(path):
        return {PROVENANCE: "changed"}
    found = {}
    for name, entry in _recorded(path).items():
        file = directory / name
        inside = not {"..", ""} & set(name.split("/"))
        now = signature(file) if inside and file.is_file() else None
        if now is None:
            found[name] = "missing"
        elif not _is(file, now, entry, now.size <= largest):
            found[name] = "changed"
    return found


def _recorded(path: Path) -> Mapping[str, Any]:
    """The files that a neoconvert.json lists; none where it is not ours."""
    if not bears_seal(path):
        return {}
    try:
        files = read_json(path).get("files")
    except BadInput:
        return {}
    return files if isinstance(files, dict) else {}


def _is(path: Path, now: Signature, entry: Any, deep: bool) -> bool:
    """Whether a file is the recorded one."""
    if not isinstance(entry, dict) or entry.get("bytes") != now.size:
        return False
    try:
        return not deep or sha256_of(path) == entry.get("sha256")
    except OSError:
        return False


def remove(directory: Path, found: Survey) -> bool:
    """Remove what is ours from a directory, and the directory if nothing else is in it.

    Returns: whether it is gone. What was changed or put there since the survey stays.
    """
    for name in sorted(found.ours, key=lambda name: name == PROVENANCE):  # the record last
        path, was = directory / name, found.ours[name]
        if signature(path) == was:
            path.unlink(missing_ok=True)
    for name in sorted(found.folders, key=len, reverse=True):
        _rmdir(directory / name)
    return _rmdir(directory)


def _rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
