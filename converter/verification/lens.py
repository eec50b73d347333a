"""A checkpoint as a model of TransformerLens: HookedTransformer or TransformerBridge.

From local files, or from memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from converter.checkpoint import Checkpoint
from converter.checkpoint.tl_config import to_tl
from converter.dtypes import NAMES
from converter.errors import TensorMismatch
from converter.layout import buffers, expand
from converter.verification.libraries import (
    hf_config,
    local_tokenizer,
    quiet,
    require_all,
    state_dict,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    State = dict[str, Tensor]


def hooked_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: bool = False,
    state: State | None = None,
) -> Any:
    """HookedTransformer(cfg) with the file's weights, in `dtype` or the dtype that cfg states.
    `state`: see `hf_model`."""
    import torch

    with quiet():
        from dataclasses import fields

        from transformer_lens import HookedTransformer, HookedTransformerConfig

        stored = NAMES[checkpoint.dtype]
        cfg = checkpoint.source.tl_config or to_tl(
            checkpoint.config, None, dtype=stored, model_name="gpt-neo"
        )
        stated = str(cfg.get("dtype") or stored).removeprefix("torch.")
        cfg = dict(cfg) | {
            "dtype": dtype or getattr(torch, stated),
            "device": str(device),
            "n_devices": 1,
            "init_weights": False,  # all weights are loaded: checked below
            "seed": None,  # would seed the process's random number generators
            "tokenizer_name": None,  # would be looked up on the hub
            "normalization_type": "LNPre" if checkpoint.config.folded else "LN",
        }
        known_here = {field.name for field in fields(HookedTransformerConfig)}
        cfg = {name: value for name, value in cfg.items() if name in known_here}
        words = lens_tokenizer(checkpoint) if tokenizer else None
        model = HookedTransformer(HookedTransformerConfig.from_dict(cfg), tokenizer=words)
        state = state_dict(checkpoint) if state is None else state
        result = model.load_state_dict(state, strict=False)
    # TransformerLens 3.5 and later may leave identity LayerNorms in folded files.
    identity = {
        name
        for name in result.unexpected_keys
        if checkpoint.config.folded and _is_identity_norm(name, state[name])
    }
    known = buffers("hooked", checkpoint.config.n_layers)
    require_all(
        set(result.missing_keys) - known,
        set(result.unexpected_keys) - known - identity,
        "HookedTransformer",
        checkpoint,
    )
    return model.eval()


def _is_identity_norm(name: str, tensor: Tensor) -> bool:
    _, _, norm = name.removesuffix(".w").removesuffix(".b").rpartition(".")
    neutral = 1 if name.endswith(".w") else 0
    return norm in ("ln1", "ln2", "ln_final") and bool((tensor == neutral).all())


def bridge_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    state: State | None = None,
) -> Any:
    """TransformerBridge around the architecture that config.json describes, weights loaded.
    `state`: see `hf_model`.

    Raises:
        TensorMismatch: the bridge does not hold what was loaded into it (config.json ties
            embedding and head, the file does not).
    """
    import torch

    dtype = dtype or getattr(torch, NAMES[checkpoint.dtype])
    tokenizer = lens_tokenizer(checkpoint)
    state = state_dict(checkpoint) if state is None else state
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        named: dict[str, Any] = {"device": str(device), "dtype": dtype}
        named["tokenizer"] = tokenizer or _placeholder_tokenizer()
        if checkpoint.as_saved and checkpoint.source.hf_config:
            place = str(checkpoint.source.path)
            # Without weights, a bridge's dtype is that of config.json, whatever dtype= says.
            overrides = {"dtype": dtype, "torch_dtype": dtype}
            named |= {"load_weights": False, "hf_config_overrides": overrides}
        else:
            place, named["hf_model"] = "gpt-neo", _shell(checkpoint, state, dtype)
        bridge: Any = TransformerBridge.boot_transformers(place, **named)
        if checkpoint.biased:
            # A raw bridge has no q, k, v biases, and would be silently wrong without them.
            bridge.enable_compatibility_mode()
        bridge.to(device=device, dtype=dtype)  # TL 3.9 makes the biases in float32
        bridge.load_state_dict(state, strict=True)
        held = bridge.state_dict()
        wrong = [n for n, t in state.items() if not _equal(held[n].cpu(), t.to(dtype))]
    if wrong:
        raise TensorMismatch(
            f"TransformerBridge does not hold the weights loaded into it: {', '.join(wrong[:4])}.",
            where=str(checkpoint.source.path),
            do='Embedding and head differ: config.json must say "tie_word_embeddings": false.',
        )
    if tokenizer is None:  # else text would become the placeholder's ids in silence
        bridge.tokenizer = None
    return bridge.eval()


def _shell(checkpoint: Checkpoint, state: State, dtype: torch.dtype) -> Any:
    """The GPTNeoForCausalLM that a bridge wraps, whose weights are loaded afterwards: those of
    `state` that it has a place for stand in for them, since random ones would cost time."""
    from transformers import GPTNeoForCausalLM

    neo: Any = GPTNeoForCausalLM
    config = checkpoint.config
    slots = expand("hf", config.sizes, config.n_layers)
    named = {str(checkpoint.slots[key].name): slot.name for key, slot in slots.items() if slot.name}
    held = {named[name]: tensor.clone() for name, tensor in state.items() if name in named}
    if checkpoint.tied:
        del held["lm_head.weight"]
    return neo.from_pretrained(None, config=hf_config(checkpoint), state_dict=held).to(dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    """As torch.equal, but that NaN is NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def lens_tokenizer(checkpoint: Checkpoint) -> Any:
    """The same, for TransformerLens; None where it could not take it: it loads a tokenizer again
    from its files, to make it prepend a token."""
    tokenizer = local_tokenizer(checkpoint)
    known = tokenizer is not None and tokenizer.init_kwargs.get("name_or_path")
    return tokenizer if known else None


def _placeholder_tokenizer() -> Any:
    """boot_transformers insists on one; verification only ever passes token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    core = Tokenizer(WordLevel({end: 0}, unk_token=end))
    # No bos_token: TransformerLens would load the tokenizer a second time, from its files.
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=core, eos_token=end, pad_token=end)
