"""What a directory holds, and the folders in it, by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.recipes import quoted
from converter.checkpoint.standard import PICKLES
from converter.choices import meant

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
        return quoted(self.directory / name)


def listed(directory: Path) -> Listing:
    try:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in directory.iterdir())
    except (OSError, ValueError):  # a name that holds a zero byte
        entries = []
    return Listing(directory, tuple(entries))


def few(names: Sequence[str], most: int) -> str:
    """The first names, and a sign where there are more."""
    return ", ".join(names[:most]) + " …" * (len(names) > most)


def walked(directory: Path) -> Iterator[Path]:
    """Folders below, as far as a run has them; none hidden, none by a link, not too many."""
    seen = 0
    level = [directory]
    for _ in range(_DEPTH):
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


def meant_beside(given: str) -> str:
    """What a place where nothing is may mean, of the models that lie beside it: a question, and a
    space. "": none has a name like it."""
    path = Path(os.path.expanduser(given))
    suffixes = (".safetensors", ".onnx", *PICKLES)
    models = [name for name in listed(path.parent).names if name.endswith(("/", *suffixes))]
    models = [name.rstrip("/") for name in models[:_FOLDERS]]

    def written(name: str) -> str:
        return quoted(path.with_name(name))

    return meant(path.name, models, written=written, alike=0.75)
