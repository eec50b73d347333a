"""One small model with sharp attention, whose window is well within its context."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from converter.checkpoint import Checkpoint, open_checkpoint
from tests.models import random_hf
from tests.onnx_.running import Judge, probes_of


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF directory: tied, four layers, window 7, context 96."""
    return random_hf(
        tmp_path_factory.mktemp("hf") / "m", seed=1, scale=1.5,
        num_layers=4, window_size=7, max_position_embeddings=96, hidden_size=32, vocab_size=61,
    )  # fmt: skip


@pytest.fixture
def tiny(master: Path, tmp_path: Path) -> Checkpoint:
    """A copy of `master`, to export beside."""
    return open_checkpoint(shutil.copytree(master, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def judge(master: Path) -> Judge:
    checkpoint = open_checkpoint(master)
    return Judge(checkpoint, probes_of(checkpoint))
