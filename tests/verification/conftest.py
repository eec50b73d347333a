"""Fixtures: tiny models on which every mechanism matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.checkpoint import Checkpoint, open_checkpoint
from tests.models import random_hf


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An HF checkpoint: two layers, global and local, sharp attention, a head of its own."""
    return open_checkpoint(
        random_hf(tmp_path_factory.mktemp("hf") / "m", seed=1, scale=1.5, tied=False)
    )


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Where an artifact is written."""
    return tmp_path / "artifact"
