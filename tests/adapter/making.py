"""Adapters made and merged by peft itself: what ours are held to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from converter.checkpoint import Checkpoint
from converter.layout import HEAD, expand
from tests.models import random_hf

NAMES = [
    "q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj", "wte", "wpe", "lm_head",
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A base and an adapter of it."""

    config: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["q_proj", "c_fc"]})
    """Of LoraConfig; r is 4 and lora_alpha 12 unless it says otherwise."""
    tied: bool = True
    dtype: str = "float32"
    seed: int = 0


def write(root: Path, recipe: Recipe, change: Callable[[Any], None] | None = None) -> None:
    """The base at root/base and an adapter, as if trained, at root/adapter. `change`: of the model
    before its adapter is saved."""
    base = random_hf(
        root / "base", seed=recipe.seed, tied=recipe.tied, dtype=recipe.dtype, gain_decades=0.2
    )
    model = GPTNeoForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | recipe.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of tied weights
        adapted: Any = get_peft_model(model, LoraConfig(**options))
        generator = torch.Generator().manual_seed(recipe.seed)
        with torch.no_grad():
            for tensor in adapted.parameters():
                if tensor.requires_grad:
                    tensor += torch.randn(tensor.shape, generator=generator) * 0.15
        if change:
            change(adapted)
        adapted.save_pretrained(root / "adapter")


def by_peft(root: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The base with the adapter in peft, in evaluation, all in one dtype. A tied head is a matrix of
    its own, so that merging changes what the adapter changes and nothing else."""
    model: Any = AutoModelForCausalLM.from_pretrained(root / "base", dtype=dtype)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return PeftModel.from_pretrained(
        model, root / "adapter", autocast_adapter_dtype=dtype != torch.float64
    ).eval()


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """A GPTNeoForCausalLM's weights by `hooked` name, in HF's axes, float64."""
    slots = expand("hf", _sizes(model), model.config.num_layers).values()
    state = model.state_dict()
    return {s.key: state[s.name].double().numpy() for s in slots if s.name is not None}


def _sizes(model: Any) -> Any:
    from converter.checkpoint.hf_config import from_hf

    return from_hf(model.config.to_dict()).sizes


def in_hf(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """A checkpoint's weights by `hooked` name, in HF's axes, as they are read."""
    slots = expand("hf", checkpoint.config.sizes, checkpoint.config.n_layers).items()
    return {
        key: slot.to_hub.inverse.apply(checkpoint.tensor(key), checkpoint.config.sizes)
        for key, slot in slots
        if slot.name is not None
    }


def model_of(checkpoint: Checkpoint) -> Any:
    """GPTNeoForCausalLM with these weights, in float64."""
    slots = expand("hf", checkpoint.config.sizes, checkpoint.config.n_layers)
    config = (checkpoint.original_hf_config or {}) | {"tie_word_embeddings": False}
    model: Any = GPTNeoForCausalLM(GPTNeoConfig(**config)).double()
    state = {
        str(slots[key].name): torch.from_numpy(np.array(array, np.float64))
        for key, array in in_hf(checkpoint).items()
    }
    model.load_state_dict(state, strict=True)
    assert HEAD in slots
    return model.eval()


def logits(model: Any) -> np.ndarray:
    """On tokens that go beyond the window."""
    tokens = torch.arange(28)[None] * 5 % 37
    with torch.inference_mode():
        found: np.ndarray = model(tokens).logits.double().numpy()
    return found
