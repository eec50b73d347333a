"""Fixtures: tiny models on which every mechanism matters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.verification.loading import has_hooked_transformer
from tests.models import random_hf

needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: threads that wait for one another cost more than the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
