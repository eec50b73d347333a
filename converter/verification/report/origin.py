"""What a report shows of `neoconvert.json`. The file may be anyone's: what has not the form that
neoconvert gives it is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorTable:
    """The tensors of one side, with their hashes."""

    caption: str
    rows: list[tuple[str, str, str, str]]
    """Name, dtype, shape, SHA-256."""


@dataclass(frozen=True)
class Origin:
    """Where the artifact comes from."""

    facts: list[tuple[str, str]]
    versions: list[tuple[str, str]]
    changes: list[tuple[str, str]]
    """Tensors that have no counterpart on the other side, and why."""
    tensors: list[TensorTable]


def read(provenance: Any) -> Origin:
    known = _mapping(provenance)
    source, output = _mapping(known.get("source")), _mapping(known.get("output"))
    tables = [
        TensorTable("Read from the source", list(_tensors(source))),
        TensorTable("Written to the output", list(_tensors(output))),
    ]
    return Origin(
        facts=[
            (name, value)
            for name, value in [
                ("source", _text(source.get("given"))),
                ("revision", _text(source.get("revision"))),
                ("layouts", " → ".join(_texts([source.get("layout"), output.get("layout")]))),
                ("steps", ", ".join(_texts(known.get("steps"))) or "none"),
                ("undone", _text(known.get("reverse"))),
            ]
            if value and value != "none"
        ]
        if known
        else [],
        versions=_pairs(known.get("versions")),
        changes=[
            *_pairs(known.get("dropped")),
            *((name, "added") for name in _texts(known.get("invented"))),
        ],
        tensors=[table for table in tables if table.rows],
    )


def _tensors(side: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for name, tensor in _mapping(side.get("tensors")).items():
        facts = _mapping(tensor)
        shape = facts.get("shape")
        sizes = " × ".join(map(str, shape)) if isinstance(shape, list) else ""
        yield name, _text(facts.get("dtype")), sizes, _text(facts.get("sha256"))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _pairs(value: Any) -> list[tuple[str, str]]:
    return [(name, _text(text)) for name, text in _mapping(value).items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
