"""Processed weights may be edited or trained, and then brought back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from safetensors.numpy import load_file

import converter
from converter.checkpoint import open_checkpoint
from converter.errors import VerificationFailed
from converter.processing.ledger import decode_unit
from tests.edits import MAX_RATIO, SUBSETS, Edit, edit_file, edits, run
from tests.models import random_hf


def check(trial: Edit) -> None:
    with tempfile.TemporaryDirectory() as directory:
        outcome = run(trial, Path(directory))
    assert outcome.ratio <= MAX_RATIO, outcome
    assert not outcome.moved, outcome
    if outcome.refused:
        assert "float16" in outcome.refused


@given(edits("hooked"))
@example(Edit(steps=SUBSETS[-1], tensor=None))
@example(Edit("zero gain", tensor=6, kind="zero"))
@settings(max_examples=70, deadline=None)
def test_hooked(trial: Edit) -> None:
    check(trial)


@given(edits("bridge"))
@example(Edit(layout="bridge", tensor=None))
@settings(max_examples=70, deadline=None)
def test_bridge(trial: Edit) -> None:
    check(trial)


@given(edits("baked"))
@example(Edit(layout="baked", tensor=None))
@settings(max_examples=70, deadline=None)
def test_baked(trial: Edit) -> None:
    check(trial)


@pytest.mark.parametrize("kind", ["noise", "element"])
def test_a_lost_edit_would_be_seen(kind: str, tmp_path: Path) -> None:
    """The limit is sharp enough: what the edits change is far above it."""
    for tensor in range(0, 24, 5):
        outcome = run(Edit(tensor=tensor, kind=kind), tmp_path / str(tensor))
        assert outcome.effect > 100 * MAX_RATIO or not outcome.names, outcome


@pytest.mark.parametrize("kind", ["compact", "exact"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_route_that_drops_an_edit_fails_verification(
    dtype: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is held to what the edited file computes, not to what the route makes of it."""
    random_hf(tmp_path / "hf", dtype=dtype)
    path = tmp_path / "tl"
    converter.hf_to_tl(
        tmp_path / "hf", path, layout="hooked", process="default", ledger=kind, check=False
    )
    before = open_checkpoint(path).tensor("blocks.1.mlp.W_in")
    file = path / "model.safetensors"
    index = sorted(load_file(file)).index("blocks.1.mlp.W_in")
    assert edit_file(file, Edit(tensor=index)) == ("blocks.1.mlp.W_in",)
    real = decode_unit

    def forgetful(ledger: Any, processed: Any, **options: Any) -> Any:
        if ledger.prefix == "blocks.1.":
            processed = {**processed, "mlp.W_in": before}
        return real(ledger, processed, **options)

    monkeypatch.setattr("converter.route.decode_unit", forgetful)
    with pytest.raises(VerificationFailed):
        converter.tl_to_hf(path, tmp_path / "back", effort="quick")
    assert not (tmp_path / "back").exists()
    monkeypatch.undo()
    done = converter.tl_to_hf(path, tmp_path / "back", effort="quick")
    assert done.verification is not None
    assert done.verification.passed
