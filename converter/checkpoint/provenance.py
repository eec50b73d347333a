"""`neoconvert.json`: where an artifact comes from and what was done to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from converter.checkpoint import attestation
from converter.checkpoint.plan import Plan
from converter.checkpoint.reader import SafetensorsReader, recorded
from converter.checkpoint.record import inventory, sha256_of, write_record
from converter.checkpoint.source import ATTESTATION
from converter.dtypes import sha256
from converter.environment import versions

if TYPE_CHECKING:
    from converter.checkpoint.checkpoint import Checkpoint
    from converter.route import Route

SCHEMA_VERSION = 1
_SMALL = 2**18
"""Bytes: biases and LayerNorms of any model, and the matrices of small ones."""


def digest(sha256: Mapping[str, str]) -> str:
    """One SHA-256 for a checkpoint, of its tensors' own: what an artifact was made from."""
    lines = "".join(f"{name} {sha256[name]}\n" for name in sorted(sha256))
    return hashlib.sha256(lines.encode()).hexdigest()


def source_tensors(source: Checkpoint, sha256: Mapping[str, str]) -> dict[str, Any]:
    """A record of a source's tensors, by their own names. `sha256`: of what is read of each."""
    return {
        stored.name: recorded(stored.code, stored.shape, sha256[stored.name])
        for stored in source.stored.values()
        if stored.name in sha256
    }


def source_files(source: Checkpoint) -> dict[str, dict[str, str | int]]:
    """A record of what was read of a source beside the tensors whose digests are kept: together they
    cover every byte of its files.

    `rest_sha256`: of a safetensors file's header, and of the tensors in it that are left out. Weight
    files of another format are recorded whole, and so are those that an adapter is merged into.
    """
    files = source.source if source.merged is None else source.merged.base.source
    if files.live:
        return {}
    kept = {stored.name for stored in source.stored.values()}
    readers = {r.path: r for r in files.readers if isinstance(r, SafetensorsReader)}
    record: dict[str, dict[str, str | int]] = {}
    for path in sorted(files.opened):
        here = path.parent == files.directory
        entry = record[path.name if here else f"../{path.name}"] = {"bytes": path.stat().st_size}
        if path in readers and not source.merged:
            entry["rest_sha256"] = readers[path].rest_sha256(but=kept)
        else:
            entry["sha256"] = sha256_of(path)
    return record


def placeless(value: Any) -> Any:
    """Plain JSON with every absolute path shortened to its last part: a config may hold one of the
    machine it was written on."""
    if isinstance(value, dict):
        return {name: placeless(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [placeless(item) for item in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if (path := kind(value)).is_absolute() and path.name:
                return path.name
    return value


def describes(checkpoint: Checkpoint) -> bool:
    """Whether neoconvert.json is of the weights that lie beside it, and not of what was there
    before they were trained or processed in place: most of its digests are theirs.

    Only small tensors are read: what changes a model changes most of them.
    """
    output = (checkpoint.source.provenance or {}).get("output")
    known = output.get("tensors") if isinstance(output, dict) else None
    if not isinstance(known, dict):
        return True
    same = []
    for key, stored in checkpoint.stored.items():
        said = known.get(stored.name)
        if isinstance(said, dict) and "sha256" in said and stored.nbytes <= _SMALL:
            hub = checkpoint.slots[key].to_hub.inverse
            found = hub.apply(checkpoint.tensor(key), checkpoint.config.sizes)
            same.append(sha256(found) == said["sha256"])
    return bool(2 * sum(same) >= len(same))


def write(
    directory: Path,
    route: Route,
    plan: Plan,
    *,
    source_sha256: dict[str, str],
    output_sha256: dict[str, str],
    file_sha256: Mapping[str, str],
    options: dict[str, Any],
    verification: dict[str, Any] | None,
) -> None:
    """Write the provenance of an artifact beside it, and its statements. Same input, same bytes,
    anywhere: no date, and no place of this machine.

    Args:
        file_sha256: of files that were hashed as they were written, by name.
        options: what was asked for (`Request.to_json`).
    """
    source = route.source
    kept = {
        "config": source.original_hf_config,
        "generation_config": source.original_generation_config,
        "cfg": source.original_tl_config,
    }
    files = inventory(directory, file_sha256)
    document = {
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "source": {
            "given": source.source.name,
            "revision": source.source.revision,
            "layout": source.layout,
            "tensors": source_tensors(source, source_sha256),
            "files": source_files(source),
            **({"adapter": source.merged.adapter.to_json()} if source.merged else {}),
        },
        "output": {
            "layout": plan.layout,
            "tensors": {
                t.name: recorded(t.code, t.shape, output_sha256[t.name]) | {"from": t.source}
                for t in plan.tensors
            },
        },
        "source_sha256": digest(source_sha256),
        "route": route.name,
        "steps": list(plan.steps),
        "reverse": route.reverse,
        "notes": list(source.notes),
        "dropped": plan.dropped,
        "invented": list(plan.invented),
        "tied": route.tied,
        "options": options,
        "kept": placeless({name: value for name, value in kept.items() if value is not None}),
        "verification": verification,
        "files": files,
    }
    (directory / ATTESTATION).write_bytes(attestation.lines(document))
    known = {name: str(entry["sha256"]) for name, entry in files.items()}
    write_record(directory, document | {"files": inventory(directory, known)})
