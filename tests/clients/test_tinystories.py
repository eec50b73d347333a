"""The real TinyStories-1M, where the hub or its cache has it: what is published of it comes out."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import converter
from converter.errors import SourceNotFound

NAME = "roneneldan/TinyStories-1M"
REVISION = "77f1b168e219585646439073245fe87e56b3023e"
PICKLE = "07f9609ea882b8163ff3b23d40e2b82cb715d409631beb15c84b164f3877dae7"
PROMPT = (7454, 2402, 257, 640, 612, 373)
""" "Once upon a time there was"."""
GREEDY = (257, 1310, 2576, 3706, 20037, 13, 1375, 6151)


def greedy(model: Any) -> tuple[int, ...]:
    tokens = torch.tensor([PROMPT])
    for _ in GREEDY:
        with torch.no_grad():
            answer = model(tokens)
        logits = getattr(answer, "logits", answer)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tuple(tokens[0, len(PROMPT) :].tolist())


@pytest.fixture(scope="module")
def original() -> converter.Checkpoint:
    try:
        found = converter.open_checkpoint(NAME, revision=REVISION, allow_pickle=True)
    except SourceNotFound as error:
        pytest.skip(f"{NAME} cannot be had here: {error.what}")
    assert found.config.n_layers == 8
    digest = sha256((found.source.directory / "pytorch_model.bin").read_bytes()).hexdigest()
    assert digest == PICKLE
    return found


@pytest.mark.parametrize("process", ["none", "default"])
def test_writes_what_is_published(
    original: converter.Checkpoint, process: str, tmp_path: Path
) -> None:
    converter.hf_to_tl(original, tmp_path / "tl", layout="bridge", process=process, effort="quick")
    assert greedy(converter.load_bridge(tmp_path / "tl")) == GREEDY
    converter.tl_to_hf(tmp_path / "tl", tmp_path / "hf", effort="quick")
    assert greedy(converter.to_hf_model(tmp_path / "hf")) == GREEDY
