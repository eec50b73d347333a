"""Checkpoints to start from: trained, random, random with TransformerLens's own biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.demo import MODEL
from tests.explaining.artifacts import read, write
from tests.models import random_hf

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_heads": 4,
    "vocab_size": 61,
    "intermediate_size": 48,
}


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    return open_checkpoint(MODEL)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(random_hf(tmp_path_factory.mktemp("random") / "hf", **SIZES))


@pytest.fixture(scope="session")
def biased_model(random_model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As trained in TransformerLens: every bias is there."""
    weights, rng = read(random_model), np.random.default_rng(5)
    for key in weights:
        if key.endswith((".b_Q", ".b_K", ".b_V", ".b_U")):
            weights[key] = 0.5 * rng.standard_normal(weights[key].shape)
    directory: Path = tmp_path_factory.mktemp("biased") / "hooked"
    return write(directory, weights, random_model, "hooked")


@pytest.fixture(scope="session")
def models(
    demo: Checkpoint, random_model: Checkpoint, biased_model: Checkpoint
) -> dict[str, Checkpoint]:
    return {"demo": demo, "random": random_model, "biased": biased_model}
