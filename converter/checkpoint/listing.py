"""What a directory holds, and the folders in it, by their names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DEPTH, _FOLDERS = 4, 2000


@dataclass(frozen=True)
class Listing:
    """A directory's entries, folders with a slash."""

    directory: Path
    names: tuple[str, ...]

    def matching(self, pattern: str) -> list[str]:
        """The names that are, from end to end, of a pattern."""
        return [name for name in self.names if re.fullmatch(pattern, name)]

    def below(self, pattern: str) -> list[Path]:
        return sorted(self.directory.glob(pattern))

    def command(self, name: str = "") -> str:
        """The directory, or what is in it, as a shell takes it."""
        return shlex.quote(str(self.directory / name))


def listed(directory: Path) -> Listing:
    try:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in directory.iterdir())
    except OSError:
        entries = []
    return Listing(directory, tuple(entries))


def walked(directory: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Folders below, as far as a run has them; none hidden, none by a link, not too many."""
    seen = 0
    level = [directory]
    for _ in range(depth):
        inner: list[Path] = []
        for folder in level:
            for entry in listed(folder).names:
                path = folder / entry.rstrip("/")
                if entry.endswith("/") and not (entry.startswith(".") or path.is_symlink()):
                    inner.append(path)
                    seen += 1
            if seen > _FOLDERS:
                return
        yield from inner
        level = inner


def natural(path: Path) -> list[tuple[int, str]]:
    """checkpoint-500 before checkpoint-1500."""
    pieces = re.findall(r"\d+|\D+", str(path))
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
