"""Telling whether a file is still the one it was, short of reading it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Signature(NamedTuple):
    """A file as it is now, short of reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class Identity(NamedTuple):
    """A file or directory, under whatever name."""

    device: int
    inode: int


def signature(path: Path) -> Signature | None:
    """None where there is nothing. A link's is its target's."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Signature(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def identity(path: Path) -> Identity | None:
    """None where there is nothing. A link is itself."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Identity(found.st_dev, found.st_ino)
