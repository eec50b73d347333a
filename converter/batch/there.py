"""Whether what is at OUTPUT is what would be made: by digests, never by names or dates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.checkpoint import Checkpoint, provenance
from converter.checkpoint.files import read_json
from converter.checkpoint.record import bears_seal, changes
from converter.checkpoint.source import PROVENANCE
from converter.checkpoint.workspace import is_workspace
from converter.dtypes import sha256
from converter.environment import versions
from converter.errors import BadInput
from converter.request import Request


def occupied(output: Path) -> bool:
    """Whether there is anything at OUTPUT but what a killed run left."""
    if not output.is_dir():
        return output.is_symlink() or output.exists()
    return not all(is_workspace(entry) for entry in output.iterdir())


def record_at(output: Path) -> dict[str, Any] | None:
    """OUTPUT's neoconvert.json, if neoconvert wrote it as it is."""
    path = output / PROVENANCE
    if not bears_seal(path):
        return None
    try:
        return read_json(path)
    except BadInput:
        return None


def other_request(record: Mapping[str, Any], request: Request) -> str | None:
    """How what was made differs from what is asked for, short of its source: a sentence."""
    was = record.get("versions", {}).get("neoconvert")
    now = versions().get("neoconvert")
    if was != now:
        return f"neoconvert {was} made it, and this is {now}"
    options, asked = record.get("options") or {}, request.to_json()
    for name in (*asked, *options):
        if options.get(name) != asked.get(name):
            return (
                f"{name} was {_said(options.get(name))}, and {_said(asked.get(name))} is asked for"
            )
    return None


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{name} {_said(item)}" for name, item in value.items())
    return "none" if value is None else str(value)


def damage(output: Path) -> str | None:
    """What became of the files since: a sentence. What others put beside them is no damage."""
    for name, how in changes(output).items():
        return f"{name} is missing" if how == "missing" else f"{name} was changed since"
    return None


def other_source(record: Mapping[str, Any], source: Checkpoint) -> str | None:
    """How the source that is now differs from the one that was read: a sentence.

    All of it is read and hashed again: a size and a date can be those of other bytes.
    """
    was = record["source"]
    files = provenance.source_files(source)
    if name := _differing(was.get("files", {}), files):
        return f"the source's {name} is another now"
    if source.merged:
        before, now = was.get("adapter", {}), source.merged.adapter.to_json()
        if name := _differing(before | {"given": ""}, now | {"given": ""}):
            return f"the adapter's {name} is another now"
    digests = {
        stored.name: sha256(reader.read(stored.name))
        for stored in source.stored.values()
        for reader in source.source.readers
        if stored.name in reader.tensors
    }
    if name := _differing(was["tensors"], provenance.source_tensors(source, digests)):
        return f"the source's {name} is another now"
    return None


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    return next((n for n in (*now, *before) if before.get(n) != now.get(n)), None)
