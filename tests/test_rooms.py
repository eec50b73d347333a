"""The rooms of the package stand in an order, and each imports only what stands before it, also
where an import is lazy or for types alone. What is left of circles is listed, with its reason."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import converter

HERE = Path(converter.__file__).parent
ROOMS = [
    "errors", "progress", "parallel", "dtypes", "piecewise", "background", "interrupts", "output",
    "strict_json", "choices", "environment", "layout", "processing", "checkpoint", "html",
    "route", "streaming", "routing", "adapter", "onnx", "opening", "wording", "explaining",
    "verification", "recorded", "request", "exporting", "model_card", "inspection", "pipeline",
    "convert", "models", "pushing", "batch", "schema", "display", "demo", "cli",
]  # fmt: skip
UPWARD = {
    ("checkpoint", "adapter"): "the type of what is merged into a checkpoint",
    ("checkpoint", "route"): "types: plans, configs and provenance are made of a route",
    ("environment", "onnx"): "onnxruntime's devices, for `neoconvert env`",
    ("environment", "verification"): "TransformerLens's classes, for `neoconvert env`",
    ("request", "exporting"): "the type of a graph that is asked for",
    ("verification", "recorded"): "an original may be the file that stands for one",
    ("wording", "verification"): "the type of a runtime that is described",
}
PURE = ("layout", "processing", "piecewise", "dtypes")
"""Arithmetic, which opens no file."""
LISTED = ("__init__", "__main__")
"""They name what the package offers, and are imported by no other for it."""


def room(module: str) -> str:
    first = module.split(".")[1]
    return next((name for name in ("cli", "display") if first.startswith(f"{name}_")), first)


def modules() -> dict[str, Path]:
    found = {}
    for path in HERE.rglob("*.py"):
        parts = path.relative_to(HERE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return {
        name: path for name, path in found.items() if path.parent != HERE or path.stem not in LISTED
    }


def imported(path: Path) -> Iterator[str]:
    """Names of all modules, or of what is in them, that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> set[tuple[str, str]]:
    """Which room imports which."""
    return {
        (room(name), room(other))
        for name, path in modules().items()
        for other in imported(path)
        if other.startswith("converter.") and not other.startswith("converter.__")
    }


def test_every_room_is_listed() -> None:
    assert {room(name) for name in modules()} == set(ROOMS)


def test_arrows_lead_down() -> None:
    up = {(a, b) for a, b in arrows() if ROOMS.index(b) > ROOMS.index(a)}
    assert up == set(UPWARD)


@pytest.mark.parametrize("name", PURE)
def test_arithmetic_opens_no_file(name: str) -> None:
    used = {
        other.split(".")[0]
        for m, p in modules().items()
        if room(m) == name
        for other in imported(p)
    }
    assert not used & {"io", "json", "os", "pathlib", "shutil", "tempfile", "safetensors", "torch"}


def test_the_command_line_computes_nothing() -> None:
    """And what is imported for --help is light."""
    used = {
        other.split(".")[0]
        for m, p in modules().items() if room(m) in ("cli", "display") for other in imported(p)
    }  # fmt: skip
    assert not used & {"math", "numpy", "torch", "safetensors", "onnx"}
    assert used - set(sys.stdlib_module_names) <= {"click", "converter", "rich", "tomli"}
