"""GPT-Neo models of published sizes with seeded weights, for measurements."""

from __future__ import annotations

import json
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from converter.checkpoint.hf_config import from_hf
from converter.layout import Slot, expand

MODELS = Path(__file__).resolve().parent.parent / "models"
"""Ignored by git."""


SIZES = {"125m": (12, 768, 12), "1.3b": (24, 2048, 16), "2.7b": (32, 2560, 20)}
"""Layers, width and heads of the published models."""


def _described(layers: int, width: int, heads: int) -> tuple[dict[str, Any], list[Slot]]:
    """The config of a published shape, and its tensors."""
    config = {
        "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "num_layers": layers,
        "hidden_size": width, "num_heads": heads, "vocab_size": 50257, "max_position_embeddings": 2048,
        "attention_types": [[["global", "local"], layers // 2]], "window_size": 256,
        "activation_function": "gelu_new", "tie_word_embeddings": True,
    }  # fmt: skip
    slots = expand("hf", from_hf(config).sizes, layers).values()
    return config, [slot for slot in slots if slot.name and slot.name != "lm_head.weight"]


def weight_bytes(layers: int, width: int, heads: int) -> int:
    """Of the model's float32 weights."""
    return 4 * sum(math.prod(slot.shape) for slot in _described(layers, width, heads)[1])


def make_model(directory: Path, layers: int, width: int = 768, heads: int = 12) -> None:
    """A GPT-Neo of a published shape with seeded weights, written once."""
    if (directory / "config.json").exists():
        return
    config, slots = _described(layers, width, heads)
    rng = np.random.default_rng(0)
    tensors = {}
    for slot in slots:
        name = str(slot.name)
        centre = 1.0 if name.endswith((".ln_1.weight", ".ln_2.weight", ".ln_f.weight")) else 0
        noise = rng.standard_normal(slot.shape, dtype=np.float32)
        tensors[name] = np.float32(centre) + np.float32(0.05) * noise
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))


def make_model_apart(directory: Path, layers: int, width: int = 768, heads: int = 12) -> None:
    """The same in a process of its own, for parents that measure: a child's peak memory includes
    its parent's size when it was started."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(make_model, directory, layers, width, heads).result()
