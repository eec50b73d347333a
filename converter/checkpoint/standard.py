"""The names under which transformers looks for weights."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = "model.safetensors"
PICKLE_WEIGHTS = "pytorch_model.bin"
INDEX = ".index.json"
"""After either name: of shards."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of what torch.save wrote."""


def holds_weights(directory: Path) -> bool:
    """Whether a directory has a file of weights under the name that transformers looks for, or an
    index of several."""
    names = [f"{name}{suffix}" for name in (WEIGHTS, PICKLE_WEIGHTS) for suffix in ("", INDEX)]
    return any((directory / name).is_file() for name in names)
