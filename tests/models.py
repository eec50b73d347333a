"""Small GPT-Neo models with strong random weights, on which every mechanism matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from converter.checkpoint import Checkpoint, NeoConfig
from converter.checkpoint.hf_config import from_hf, to_hf
from converter.checkpoint.tl_config import to_tl
from converter.dtypes import NAMES, cast, code_named
from converter.layout import HEAD, LAYOUTS, Layout, expand

TINY: dict[str, Any] = {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 5,
    "max_position_embeddings": 32,
    "intermediate_size": 24,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

Edit = Callable[[str, np.ndarray], np.ndarray]


def random_hf(
    directory: Path,
    *,
    seed: int = 0,
    tied: bool = True,
    dtype: str = "float32",
    scale: float = 1.0,
    gain_decades: float = 0.5,
    **config: Any,
) -> Path:
    """Write an HF directory whose weights make a wrong conversion visible.

    Gains are far from one, biases far from zero, and attention is sharp (scores of some units),
    growing with `scale`. `gain_decades`: the spread of LayerNorm gains, in powers of ten.
    `config`: fields of HF's config.json; `num_layers` alone gives alternating attention.
    Needs no torch.
    """
    full = TINY | config | {"tie_word_embeddings": tied, "dtype": dtype}
    if "attention_types" not in config:
        layers = full["num_layers"]
        full["attention_types"] = [[[("global", "local")[i % 2] for i in range(layers)], 1]]
    neo = from_hf(full)
    rng = np.random.default_rng(seed)
    tensors = {}
    for key, slot in expand("hf", neo.sizes, neo.n_layers).items():
        if slot.name is None or (tied and key == "unembed.W_U"):
            continue
        values = rng.standard_normal(slot.shape)
        if key.endswith((".ln1.w", ".ln2.w", "ln_final.w")):
            values = np.sign(values) * 10 ** (gain_decades * rng.uniform(-1, 1, slot.shape))
        elif values.ndim == 2 and not key.startswith(("embed", "pos_embed")):
            # fan-in scaling: outputs of the inputs' size, times `scale`
            values *= scale / np.sqrt(slot.shape[-1])
        else:
            values *= 0.5
        tensors[slot.name] = np.ascontiguousarray(cast(values, code_named(dtype)))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(full), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_as(
    checkpoint: Checkpoint,
    directory: Path,
    layout: Layout,
    *,
    dtype: str | None = None,
    edit: Edit | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write an unprocessed checkpoint in another layout, by the table alone: an artifact made
    without the pipeline. `edit(hooked name, tensor in hooked axes)` and `config` spoil it."""
    sizes = checkpoint.config.sizes
    code = code_named(dtype) if dtype else None
    tensors = {}
    for key, slot in expand(layout, sizes, checkpoint.config.n_layers).items():
        stored = slot.in_file(folded=False)
        if stored and not (layout == "hf" and key == HEAD and checkpoint.tied):
            value = unscaled_tensor(checkpoint, key, code)
            value = edit(key, value) if edit else value
            tensors[str(slot.name)] = np.ascontiguousarray(slot.to_hub.inverse.apply(value, sizes))
    return save_as(
        directory, layout, tensors, checkpoint.config, checkpoint,
        dtype=NAMES[code or checkpoint.dtype], tied=checkpoint.tied, more=config or {},
    )  # fmt: skip


def save_as(
    directory: Path,
    layout: Layout,
    tensors: dict[str, np.ndarray],
    config: NeoConfig,
    like: Checkpoint,
    *,
    dtype: str,
    tied: bool,
    more: dict[str, Any],
) -> Path:
    """Write tensors under their names in a layout, with its config, which `more` goes into."""
    document = (
        to_tl(config, None, dtype=dtype, model_name="tiny")
        if layout == "hooked"
        else to_hf(config, like.original_hf_config, tied=tied, dtype=dtype)
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LAYOUTS[layout].config
    path.write_text(json.dumps(document | more), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def unscaled_tensor(checkpoint: Checkpoint, key: str, code: str | None = None) -> np.ndarray:
    """A weight as a model without score divisors must store it, in `hooked` axes.

    W_Q and b_Q of a scaled layer are divided in float64 and rounded once. Written here a
    second time on purpose: a test that shares the converter's arithmetic shares its faults.
    """
    code = code or checkpoint.code(key)
    layer, divisors = checkpoint.slots[key].layer, checkpoint.config.score_divisors
    if layer is None or not divisors or not key.endswith((".W_Q", ".b_Q")):
        return checkpoint.tensor(key, code)
    exact: np.ndarray = checkpoint.tensor(key).astype(np.float64) / divisors[layer]
    return cast(exact, code)
