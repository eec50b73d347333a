"""Live models with strong random weights, and what they compute."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.models import random_hf

Bits = dict[str, tuple[str, torch.Size, bytes]]


def neo(dtype: torch.dtype = torch.float32, **recipe: Any) -> Any:
    """A GPTNeoForCausalLM whose window, gains and biases matter; see `random_hf`."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        random_hf(Path(folder), **recipe)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        return model.to(dtype).eval()


def log_probs(model: Any, seed: int = 0) -> torch.Tensor:
    """Of two sequences over the whole context, far beyond the window."""
    cfg = getattr(model, "cfg", None)
    n_ctx = cfg.n_ctx if cfg is not None else model.config.max_position_embeddings
    d_vocab = cfg.d_vocab if cfg is not None else model.config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, d_vocab, (2, n_ctx), generator=generator)
    with torch.no_grad():
        out = model(tokens)
    logits: torch.Tensor = getattr(out, "logits", out)
    return logits.double().log_softmax(-1)


def distance(a: Any, b: Any) -> float:
    """Max |Δ log p| of two models."""
    return float((log_probs(a) - log_probs(b)).abs().max())


def bits(state: dict[str, torch.Tensor]) -> Bits:
    """Name, dtype, shape and bytes of every tensor."""
    return {
        name: (
            str(t.dtype),
            t.shape,
            t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, t in state.items()
    }


def hooked(model: Any, **cfg: Any) -> Any:
    """A HookedTransformer of a live GPTNeoForCausalLM's weights, by TransformerLens alone."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_neo_weights

    hf = model.config
    config = HookedTransformerConfig(
        **{
            "n_layers": hf.num_layers, "d_model": hf.hidden_size, "n_heads": hf.num_heads,
            "d_head": hf.hidden_size // hf.num_heads, "d_mlp": hf.intermediate_size,
            "n_ctx": hf.max_position_embeddings, "d_vocab": hf.vocab_size,
            "act_fn": hf.activation_function, "eps": hf.layer_norm_epsilon,
            "attn_types": hf.attention_layers, "use_local_attn": True,
            "window_size": hf.window_size, "use_attn_scale": False, "normalization_type": "LN",
            "dtype": model.dtype, "device": "cpu", "init_weights": False,
        } | cfg
    )  # fmt: skip
    result: Any = HookedTransformer(config)
    result.load_state_dict(convert_neo_weights(model, config), strict=False)
    return result.eval()


def bridge(model: Any) -> Any:
    """A raw TransformerBridge around a live model."""
    from transformer_lens.model_bridge import TransformerBridge

    from converter.verification.quiet import quiet
    from converter.verification.tokenizer import placeholder_tokenizer

    with quiet():
        return TransformerBridge.boot_transformers(
            "neo",
            hf_model=model,
            tokenizer=placeholder_tokenizer(),
            dtype=model.dtype,
            device="cpu",
        ).eval()
