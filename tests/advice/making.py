"""What rows are made of: small sound models in the current directory, and damage to them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.advice.row import Asked, run, write
from tests.models import random_hf

CONVERT = ["hf-to-tl", "m", "out", "--layout", "bridge", "--no-verify"]
"""The sound model `m`, or what was made of it."""


def hf(name: str = "m", **config: Any) -> Path:
    return random_hf(Path(name), **config)


def convert(*options: str, source: str = "m", out: str = "out") -> list[str]:
    return ["hf-to-tl", source, out, "--layout", "bridge", "--no-verify", *options]


def changed(path: str, **fields: Any) -> None:
    """Fields of a JSON file; `...` takes one out."""
    file = Path(path)
    document = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in document.items() if v is not ...}))


def edited(path: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """A safetensors file's tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def tl(name: str = "tl", *options: str, source: str = "m") -> None:
    """The model in HookedTransformer's layout."""
    hf(source)
    run(["hf-to-tl", source, name, "--no-verify", *options])


def prepared(request: Asked, *steps: Callable[[], object]) -> Callable[[], Asked]:
    """The sound model, these steps, and a request."""

    def ask() -> Asked:
        hf()
        for step in steps:
            step()
        return request

    return ask


def wrong(
    change: Callable[[], object], request: list[str] | None = None
) -> Callable[[], list[str]]:
    """The sound model with something wrong, and a request."""

    def ask() -> list[str]:
        hf()
        change()
        return request or CONVERT

    return ask


PREFIX = "base_model.model."
Q = "transformer.h.0.attn.attention.q_proj"


def lora(name: str = "adapter", **config: Any) -> Path:
    """An adapter of the sound model's first query projection."""
    rng = np.random.default_rng(1)
    full = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [Q],
        "base_model_name_or_path": "m", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    write(f"{name}/adapter_config.json", json.dumps(full | config))
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((4, 16), (16, 4)))
    tensors = {f"{PREFIX}{Q}.lora_A.weight": a, f"{PREFIX}{Q}.lora_B.weight": b}
    save_file(tensors, Path(name) / "adapter_model.safetensors", metadata={"format": "pt"})
    return Path(name)


def run_command(do: str, made: Callable[[], object] | None = None) -> None:
    """The neoconvert command at the advice's end, as it is written; `made`: what its words in
    capitals stand for."""
    if made:
        made()
    words = shlex.split(do.rpartition(": ")[2])
    assert words[0] == "neoconvert", do
    run([*words[1:], "--no-verify"])
