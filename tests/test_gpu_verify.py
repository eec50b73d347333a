"""scripts/gpu_verify on a tiny model, on CPU: every artifact, and without TransformerLens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import gpu_verify
from tests.models import random_hf

NAMES = {a.name for a in gpu_verify.artifacts()}


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(gpu_verify, "make_model", lambda path, *_: random_hf(path, scale=1.5))
    monkeypatch.setattr(gpu_verify, "ROUNDS", 1)
    out = tmp_path / "table.json"
    arguments = ["--sizes", "125m", "--device", "cpu", "--effort", "quick", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_verify", *arguments, "--work", str(tmp_path / "work")])
    assert gpu_verify.main() == 0
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def test_every_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = run(tmp_path, monkeypatch)
    assert {row["artifact"] for row in document["rows"]} == NAMES
    ran = [row for row in document["rows"] if "skipped" not in row]
    assert {"transformers", "onnxruntime"} <= set(document["versions"])
    assert {row["artifact"] for row in ran} >= {"hf", "baked", "onnx", "bridge"}
    assert all(row["passed"] and row["ratio"] < 8 and row["tokens_per_second"] > 0 for row in ran)


def test_without_transformer_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("has_bridge", "has_hooked_transformer"):
        monkeypatch.setattr(gpu_verify, name, lambda: False)
    monkeypatch.setitem(sys.modules, "transformer_lens", None)  # importing it fails
    document = run(tmp_path, monkeypatch)
    ran = {row["artifact"] for row in document["rows"] if "skipped" not in row}
    assert ran == {"hf", "baked", "onnx"}


def test_no_gpu_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_verify"])
    assert gpu_verify.main() == 4
    assert "no GPU" in capsys.readouterr().out
