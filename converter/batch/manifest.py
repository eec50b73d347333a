"""A manifest: one line for each thing to do, as CSV or JSON, and what a line's source stands for."""

from __future__ import annotations

import csv
import glob
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from converter import strict_json
from converter.checkpoint import hub
from converter.choices import meant
from converter.errors import BadInput, UsageError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_MOST = 64 * 2**20
_GLOB = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Line:
    """What one line of a manifest says."""

    number: int
    cells: Mapping[str, Any]
    """By column, as they are written; without those that are empty."""


def read(path: Path) -> list[Line]:
    """The lines of a CSV file with a header, or of JSON objects, whatever the file is called.

    Raises:
        UsageError: it is neither; the message names the line. BadInput: it cannot be read.
    """
    try:
        with open(path, "rb") as file:  # also a pipe
            content = file.read(_MOST + 1)
        if len(content) > _MOST:
            raise BadInput(
                f"The manifest is over {_MOST >> 20} MiB.",
                where=str(path),
                do="Split it into several.",
            )
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"The manifest cannot be read: {getattr(error, 'strerror', None) or error}.",
            where=str(path),
            do="Give a CSV file with a header, or one JSON object in each line, in UTF-8.",
        ) from error
    lines = list(_json(text, path) if text.lstrip().startswith(("{", "[")) else _csv(text, path))
    if not lines:
        raise UsageError(
            "There is nothing to do in the manifest.",
            where=str(path),
            do="Give a CSV file with a header, or one JSON object in each line.",
        )
    return lines


def _json(text: str, path: Path) -> Iterator[Line]:
    # Not splitlines(): in a JSON string, U+2028 and its like end no line.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            cells = strict_json.loads(line)
        except ValueError as error:
            raise _malformed(path, number, f"is no JSON: {error}") from error
        if not isinstance(cells, dict):
            raise _malformed(path, number, "is no JSON object")
        yield Line(number, {k: v for k, v in cells.items() if v is not None and v != ""})


def _csv(text: str, path: Path) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(text), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not header:
                header = cells
                if "command" not in [name.lstrip("-").lower() for name in header]:
                    raise _malformed(path, reader.line_num, "is no header: no column is command")
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    raise _malformed(path, reader.line_num, f"names the column {twice[0]!r} twice")
                continue
            if len(cells) > len(header):
                raise _malformed(
                    path, reader.line_num, f"has {len(cells)} cells, the header {len(header)}"
                )
            named = zip(header, cells, strict=False)
            yield Line(reader.line_num, {name: cell for name, cell in named if cell})
    except csv.Error as error:
        raise _malformed(path, reader.line_num, f"is no CSV: {error}") from error


def _malformed(path: Path, line: int, what: str) -> UsageError:
    return UsageError(
        f"Line {line} of the manifest {what}.",
        where=f"{path}, line {line}",
        do="Write a CSV file with a header, or one JSON object in each line.",
    )


@dataclass(frozen=True)
class Named:
    """One checkpoint that a line's source stands for."""

    source: str
    revision: str | None
    names: Mapping[str, str]
    """What {name}, {parent} and {revision} stand for."""

    def fill(self, template: str) -> str:
        """
        Raises:
            UsageError: there is no such name in braces.
        """

        def value(found: re.Match[str]) -> str:
            if found[1] in self.names:
                return self.names[found[1]]
            there = ", ".join(f"{{{name}}}" for name in self.names)
            raise UsageError(
                f"{found[0]} stands for nothing here.",
                where=template,
                do=f"{meant(found[1], self.names, written='{{{}}}'.format)}There are {there}.",
            )  # fmt: skip

        return re.sub(r"\{(\w*)\}", value, template)


AS_WRITTEN = {name: f"{{{name}}}" for name in ("name", "parent", "revision")}
"""The names where it is not known what a source stands for."""


def named_by(source: str) -> list[Named]:
    """What a source stands for: itself, the checkpoints that match a pattern, or with
    `owner/name@pattern` the revisions that do.

    Raises:
        UsageError: a pattern that nothing matches. SourceNotFound, HubUnreachable: see `hub`.
    """
    if os.path.exists(os.path.expanduser(source)):
        return [_local(source)]
    if (meant := hub.named(source)) is not None:
        repository, revision = meant
        if revision is None or not _GLOB.search(revision):
            return [_hub(repository, revision)]
        names = [name for name in hub.revisions(repository) if fnmatchcase(name, revision)]
        found = [_hub(repository, name) for name in sorted(set(names), key=_natural)]
    elif _GLOB.search(source):
        paths = glob.glob(os.path.expanduser(source), recursive=True)
        paths = [path for path in paths if os.path.isdir(path) or path.endswith(_WEIGHTS)]
        found = [_local(path) for path in sorted(paths, key=_natural)]
    else:
        return [_local(source)]
    if not found:
        raise UsageError(
            "Nothing matches the source.",
            where=source,
            do="Check the pattern: a directory, a weight file, or with @ a branch or tag must match.",
        )
    return found


def _local(source: str) -> Named:
    path = Path(os.path.abspath(os.path.expanduser(source)))
    name = path.stem if path.suffix in _WEIGHTS and not path.is_dir() else path.name
    return Named(source, None, {"name": name, "parent": path.parent.name})


def _hub(repository: str, revision: str | None) -> Named:
    owner, _, name = repository.rpartition("/")
    flat = (revision or "main").replace("/", "-")
    return Named(repository, revision, {"name": name, "parent": owner, "revision": flat})


def _natural(text: str) -> list[tuple[int, str]]:
    """checkpoint-9 before checkpoint-10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", str(text))]
