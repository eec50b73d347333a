"""HF checkpoints of random bits, written without transformers: fast, and with every oddity."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from converter.checkpoint.hf_config import from_hf
from converter.dtypes import CODES
from converter.layout import expand

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    """What a random HF checkpoint is to be like."""

    d_head: int = 2
    n_heads: int = 2
    attention: tuple[str, ...] = ("global", "local")
    d_mlp: int | None = None
    n_ctx: int = 9
    d_vocab: int = 7
    window: int = 3
    tied: bool = True
    dtype: str = "F32"
    buffers: bool = False
    shards: int = 1
    headless: bool = False
    seed: int = 0
    finite: bool = False

    @property
    def config(self) -> dict[str, Any]:
        layers = list(self.attention)
        return {
            "model_type": "gpt_neo",
            "architectures": ["GPTNeoModel" if self.headless else "GPTNeoForCausalLM"],
            "hidden_size": self.d_head * self.n_heads,
            "num_heads": self.n_heads,
            "num_layers": len(layers),
            "attention_types": [[layers, 1]],
            "attention_layers": layers,
            "intermediate_size": self.d_mlp,
            "max_position_embeddings": self.n_ctx,
            "vocab_size": self.d_vocab,
            "window_size": self.window,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-05,
            "tie_word_embeddings": self.tied,
            "attention_dropout": 0.125,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "made_up_field": {"kept": [1, None, "é"]},
        }


recipes = st.builds(
    Recipe,
    d_head=st.integers(1, 4),
    n_heads=st.integers(1, 3),
    attention=st.lists(st.sampled_from(["global", "local"]), min_size=1, max_size=4).map(tuple),
    d_mlp=st.none() | st.integers(1, 9),
    n_ctx=st.integers(1, 9),
    d_vocab=st.sampled_from([1, 2, 5, 7]),
    window=st.sampled_from([1, 2, 3, 9, 64]),
    tied=st.booleans(),
    dtype=st.sampled_from(["F32", "F16", "BF16", "F64"]),
    buffers=st.booleans(),
    shards=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], code: str) -> np.ndarray:
    """Any bit pattern: NaN payloads, infinities, denormals, negative zeros."""
    dtype = CODES[code]
    raw = rng.integers(0, 256, size=int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    array = raw.view(dtype).reshape(shape)
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf]).astype(dtype)
    where = rng.random(shape) < 0.2
    return np.where(where, special[rng.integers(0, 5, size=shape)], array).astype(dtype)


def finite(rng: np.random.Generator, name: str, shape: tuple[int, ...], code: str) -> np.ndarray:
    """Weights as of a trained model, with LayerNorm gains that are hard to undo."""
    array = rng.normal(0, 0.3, shape)
    if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
        tiny = float(ml_dtypes.finfo(CODES[code]).smallest_subnormal)
        hard = np.array([0.0, -1.5, tiny, 300.0, 1e-3, 1.0])
        array = np.where(rng.random(shape) < 0.4, rng.choice(hard, shape), 1 + array)
    array[rng.random(shape) < 0.05] = -0.0
    return array.astype(CODES[code])


def tensors_of(recipe: Recipe) -> Tensors:
    """The checkpoint's tensors, by HF name."""
    rng = np.random.default_rng(recipe.seed)
    config = from_hf(recipe.config)
    slots = expand("hf", config.sizes, config.n_layers).values()
    tensors = {
        s.name: finite(rng, s.name, s.shape, recipe.dtype)
        if recipe.finite
        else random_bits(rng, s.shape, recipe.dtype)
        for s in slots
        if s.name
    }
    if recipe.tied or recipe.headless:
        del tensors["lm_head.weight"]
    if recipe.headless:
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    return tensors


def write_hf(directory: Path, recipe: Recipe) -> Tensors:
    """Write the checkpoint as the hub has them; returns its weights without the buffers."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(recipe)
    stored: dict[str, Any] = dict(tensors)
    if recipe.buffers:
        for i in range(len(recipe.attention)):
            prefix = f"transformer.h.{i}.attn.attention"
            stored[f"{prefix}.bias"] = np.ones((1, 1, recipe.n_ctx, recipe.n_ctx), np.uint8)
            stored[f"{prefix}.masked_bias"] = np.array(-1e9, np.float32)
    names = list(stored)
    np.random.default_rng(recipe.seed).shuffle(names)
    if recipe.shards == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for i in range(recipe.shards):
            file = f"model-{i + 1:05}-of-{recipe.shards:05}.safetensors"
            mine = names[i :: recipe.shards]
            save_file({n: stored[n] for n in mine}, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(mine, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(recipe.config))
    return tensors


def read_all(directory: Path) -> Tensors:
    """Every tensor of a directory's safetensors files, through the safetensors library."""
    from safetensors import safe_open

    found: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same(a: Tensors, b: Tensors) -> bool:
    """The same names, dtypes, shapes and bytes."""
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )
