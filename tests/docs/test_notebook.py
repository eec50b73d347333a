"""The notebook runs from its first cell to its last, offline, and prints what is kept in it."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT
from tests.docs.test_commands import answers
from tests.marks import needs_hooked

NOTEBOOK = ROOT / "docs/why-do-my-weights-differ.ipynb"

pytestmark = [
    needs_hooked,
    pytest.mark.skipif(
        find_spec("nbclient") is None or find_spec("ipykernel") is None,
        reason="needs nbclient and ipykernel (the docs extra)",
    ),
]


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    kept = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for before, after in zip(kept, notebook.cells, strict=True):
        assert answers(printed(after), printed(before)), after["source"]
    named = "transformer.h.1.attn.attention.out_proj.weight: head 3"
    assert named in [line for cell in notebook.cells for line in printed(cell)]


def printed(cell: dict[str, Any]) -> list[str]:
    """The lines that a cell prints, kept or new."""
    texts = [o["text"] for o in cell.get("outputs", []) if o.get("name") == "stdout"]
    return "".join(part for text in texts for part in text).splitlines()
