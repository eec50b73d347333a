"""The names under which transformers looks for weights."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = "model.safetensors"
PICKLE_WEIGHTS = "pytorch_model.bin"
INDEX = ".index.json"
"""After either name: of shards."""
NAMED = "transformers_weights"
"""The field of config.json that names other weights: for transformers 5, not for those before it."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of what torch.save wrote."""
STANDARD = tuple(f"{name}{suffix}" for name in (WEIGHTS, PICKLE_WEIGHTS) for suffix in ("", INDEX))
"""What transformers loads of a directory, where its config names nothing else: the first that is
there; safetensors before pickles, one file before several."""


def weights_name(directory: Path) -> str | None:
    """The file of a directory that transformers loads: weights, or an index of several files."""
    return next((name for name in STANDARD if (directory / name).is_file()), None)


def holds_weights(directory: Path) -> bool:
    """Whether a directory has weights under a name that transformers looks for."""
    return weights_name(directory) is not None
