"""Which units are at fault: each by itself, whatever those before it do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.verification import passes, standard_probes, verify
from converter.verification.library_runtime import Library
from tests.models import random_hf, write_as

Edits = dict[str, Callable[[np.ndarray], np.ndarray]]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Four blocks, sharp attention, gains and biases that matter."""
    directory = tmp_path_factory.mktemp("deep") / "m"
    return open_checkpoint(random_hf(directory, seed=2, scale=1.5, num_layers=4))


def spoilt(deep: Checkpoint, there: Path, edits: Edits) -> Checkpoint:
    def edit(key: str, array: np.ndarray) -> np.ndarray:
        return edits[key](array) if key in edits else array

    return open_checkpoint(write_as(deep, there, "hf", edit=edit))


def last_bit(array: np.ndarray) -> np.ndarray:
    array = np.array(array, order="C")
    array.view(np.uint32).flat[5] ^= 1
    return array


def test_two_faults_are_two(deep: Checkpoint, tmp_path: Path) -> None:
    """The first one needs two tokens to show, the second none."""
    edits: Edits = {"blocks.1.attn.W_Q": np.negative, "blocks.3.mlp.b_in": lambda b: b + 0.3}
    found = verify(
        deep, spoilt(deep, tmp_path / "a", edits), checks=["function"], effort="quick"
    ).divergences
    assert [(d.unit, d.tensor) for d in found] == [
        ("block 1", deep.slots["blocks.1.attn.W_Q"].name),
        ("block 3", deep.slots["blocks.3.mlp.b_in"].name),
    ]


@pytest.mark.parametrize("checks", [["weights", "function"], ["function"]])
def test_what_does_no_harm_is_not_where_they_part(
    deep: Checkpoint, tmp_path: Path, checks: list[str]
) -> None:
    edits: Edits = {"blocks.0.mlp.W_in": last_bit, "blocks.2.attn.W_V": np.negative}
    result = verify(deep, spoilt(deep, tmp_path / "a", edits), checks=checks, effort="quick")
    assert [d.unit for d in result.divergences] == ["block 2"]
    assert len(result.to_json()["divergences"]) == 1


def test_bad_luck_in_float32_is_no_strange_original(
    deep: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where float64 says that its software runs it as its file says, the original is sound."""
    honest = Library.logits

    def unlucky(self: Library, probe: Any) -> torch.Tensor:
        logits = honest(self, probe)
        return logits + 1e-3 * torch.sin(torch.arange(logits.shape[-1]) * 1.0)

    probes = standard_probes(deep.config, effort="quick")
    sound = passes.run_original(deep, probes, "cpu", 0, lambda *_: None)
    monkeypatch.setattr(Library, "logits", unlucky)
    unlucky_one = passes.run_original(deep, probes, "cpu", 0, lambda *_: None)
    assert unlucky_one.own[0].max_abs > 50 * sound.own[0].max_abs  # type: ignore[union-attr]
    assert sound.strange is None
    assert unlucky_one.strange is None
    monkeypatch.setattr(Library, "exact_logits", lambda self, probe: honest(self, probe).double())
    assert passes.run_original(deep, probes, "cpu", 0, lambda *_: None).strange is not None
