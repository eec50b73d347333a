"""TransformerLens's `cfg.json` (a HookedTransformerConfig as plain JSON) <-> NeoConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from converter.checkpoint.config import (
    ACTIVATIONS,
    FIELDS,
    NeoConfig,
    checked,
    fail,
    integer,
    is_finite,
)
from converter.errors import NotRepresentable
from converter.strict_json import Json

TL_REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "positional_embedding_type": (("standard",), "GPT-Neo adds learned position embeddings"),
    "attention_dir": (("causal",), "GPT-Neo attends causally"),
    "attn_only": ((False, None), "every GPT-Neo block has an MLP"),
    "gated_mlp": ((False, None), "GPT-Neo's MLP has no gate"),
    "parallel_attn_mlp": ((False, None), "GPT-Neo's MLP reads what its attention wrote"),
    "num_experts": ((None, 0), "GPT-Neo has no experts"),
    "use_qk_norm": ((False, None), "GPT-Neo does not normalise queries and keys"),
    "clip_qkv": ((None,), "GPT-Neo does not clip queries, keys and values"),
    "use_logn_attn": ((False, None), "GPT-Neo does not scale queries by position"),
    "use_attention_sinks": ((False, None), "GPT-Neo has no attention sinks"),
    "post_embedding_ln": ((False, None), "GPT-Neo has no LayerNorm after its embedding"),
    "use_normalization_before_and_after": ((False, None), "GPT-Neo normalises before a layer only"),
    "uses_rms_norm": ((False, None), "GPT-Neo has LayerNorm"),
    "final_rms": ((False, None), "GPT-Neo has LayerNorm"),
    "shortformer_pos": (
        (False, None),
        "GPT-Neo adds its position embeddings to the residual stream",
    ),
    "experts_per_token": ((None, 0), "GPT-Neo has no experts"),
    "quantization_method": ((None,), "quantised weights are not supported"),
    "load_in_4bit": ((False, None), "quantised weights are not supported"),
    "attn_scores_soft_cap": ((-1.0, 0, None), "GPT-Neo has no soft cap on scores"),
    "output_logits_soft_cap": ((-1.0, 0, None), "GPT-Neo has no soft cap on logits"),
}
"""Fields of a TL config that GPT-Neo cannot vary: accepted values, and why."""

KEPT = (
    "model_name", "init_mode", "initializer_range", "default_prepend_bos", "tokenizer_prepends_bos",
    "use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in", "use_hook_tokens",
    "from_checkpoint", "checkpoint_index", "checkpoint_label_type", "checkpoint_value",
)  # fmt: skip
"""Fields that do not change what is computed, known from TL 2.16 to 3.9: they come back in the
next cfg.json. What else a cfg said (of a machine, of another version, of a run) stays in provenance."""


def of_bridge(config: Mapping[str, Any]) -> bool:
    """Whether it is a TransformerBridge's own cfg, which says scaled, global attention of any
    GPT-Neo. HookedTransformerConfig has no field `architecture`."""
    return "architecture" in config


def from_tl(
    config: Mapping[str, Any], where: str = "cfg.json", notes: list[str] | None = None
) -> NeoConfig:
    """Read a HookedTransformerConfig given as a dict.

    Args:
        notes: what was filled in is appended.

    Raises:
        ConfigError: malformed, or inconsistent with itself.
        NotRepresentable: a model that GPT-Neo cannot express; the message names the field.
    """

    def refuse(name: str, why: str) -> NotRepresentable:
        return NotRepresentable(
            f"{name}={config.get(name)!r} cannot be expressed by GPT-Neo: {why}.",
            where=where,
            do="Only models with GPT-Neo's architecture can be converted.",
        )

    fields: dict[str, Any] = {
        name: integer(config, name, None, where)
        for name in ("n_layers", "d_model", "n_ctx", "d_vocab", "d_head")
    }
    d_model, d_head = fields["d_model"], fields.pop("d_head")
    stated = config.get("n_heads")
    fields["n_heads"] = (
        d_model // d_head if stated in (None, -1) else integer(config, "n_heads", None, where)
    )
    fields["d_mlp"] = (
        4 * d_model if config.get("d_mlp") is None else integer(config, "d_mlp", None, where)
    )
    if fields["n_heads"] * d_head != d_model:
        raise refuse(
            "d_head", f"{fields['n_heads']} heads of {d_head} do not make d_model {d_model}"
        )
    for name, (accepted, why) in TL_REQUIRED.items():
        if name in config and config[name] not in accepted:
            raise refuse(name, why)
    norm = config.get("normalization_type", "LN")
    if norm not in ("LN", "LNPre"):
        raise refuse("normalization_type", "GPT-Neo has LayerNorm")
    if config.get("n_key_value_heads") not in (None, fields["n_heads"]):
        raise refuse("n_key_value_heads", "every GPT-Neo head has keys and values of its own")
    if config.get("d_vocab_out", -1) not in (-1, None, fields["d_vocab"]):
        raise refuse(
            "d_vocab_out", f"GPT-Neo reads and writes one vocabulary (d_vocab {fields['d_vocab']})"
        )
    act_fn = config.get("act_fn")
    if act_fn is None:  # TL 2 raises, TL 3.9 takes relu: no guess
        raise fail(
            "The config does not say act_fn, the activation.",
            where,
            'Add it: "act_fn": "gelu_new" is that of every published GPT-Neo model.',
        )
    if not isinstance(act_fn, str) or act_fn not in ACTIVATIONS:
        raise refuse(
            "act_fn", f"transformers has no such activation (known: {', '.join(ACTIVATIONS)})"
        )
    n_layers = fields["n_layers"]
    stated_types: Any = config.get("attn_types")
    local = bool(config.get("use_local_attn"))
    if n_layers > 2**20:  # before anything is made for each
        raise fail(f"n_layers is {n_layers}.", where)
    if local and not isinstance(stated_types, (list, tuple)):
        raise fail("use_local_attn is set, but attn_types is not a list.", where)
    types = stated_types if local else ["global"] * n_layers
    filled = {
        "n_heads": fields["n_heads"], "d_mlp": fields["d_mlp"], "eps": 1e-5,
        "normalization_type": "LN", "use_attn_scale": True, "use_local_attn": False,
    }  # fmt: skip
    left_out = [
        f"{name}={value}"
        for name, value in filled.items()
        if name not in config or (config[name] is None and name == "d_mlp")
    ]
    notes = [] if notes is None else notes
    if left_out:
        notes.append(f"cfg.json leaves out {', '.join(left_out)}: TransformerLens's defaults")
    if not local and isinstance(stated_types, list) and "local" in stated_types:
        notes.append(
            "cfg.json has use_local_attn off: its attn_types are not used, as in TransformerLens"
        )
    # Without local layers the window is unused; HF wants a number all the same.
    window = config.get("window_size")
    fields["window_size"] = (
        256 if window is None and not local else integer(config, "window_size", None, where)
    )
    fields |= {
        "attn_types": tuple(types),
        "act_fn": act_fn,
        "eps": config.get("eps", 1e-5),
        "folded": norm == "LNPre",
        "score_divisors": _score_divisors(config, n_layers, d_head, where),
    }
    return checked(fields, where)


def _score_divisors(
    config: Mapping[str, Any], n_layers: int, d_head: int, where: str
) -> tuple[float, ...]:
    """TL's AbstractAttention: scores / attn_scale, times the layer number where asked for."""
    divisor = 1.0
    if config.get("use_attn_scale", True):
        stated = config.get("attn_scale")
        divisor = math.sqrt(d_head) if stated in (None, -1.0) else stated
    if not is_finite(divisor) or not divisor:
        raise fail(f"attn_scale is {divisor!r}: expected a finite number other than zero.", where)
    if config.get("scale_attn_by_inverse_layer_idx"):
        return tuple(divisor * (layer + 1) for layer in range(n_layers))
    return () if divisor == 1 else (float(divisor),) * n_layers


def to_tl(config: NeoConfig, base: Json | None, *, dtype: str, model_name: str) -> Json:
    """A `cfg.json`: plain JSON that `HookedTransformerConfig.from_dict` takes once `dtype` is a torch dtype.

    Only fields that TL 2.16 to 3.9 all know. `base`: the TL config these weights once came
    with, of which `KEPT` is kept.

    Raises:
        NotRepresentable: the activation is one that TL does not have.
    """
    if config.act_fn not in ACTIVATIONS:
        raise NotRepresentable(
            f"HookedTransformer has no activation {config.act_fn!r}.",
            where="config.json: activation_function",
            do="Use --layout bridge, which runs HF's own code; HookedTransformer has"
            f" {', '.join(ACTIVATIONS)}.",
        )
    result: Json = {"model_name": model_name}
    result |= {name: value for name, value in (base or {}).items() if name in KEPT}
    result |= {
        **{field.name: getattr(config, field.name) for field in FIELDS},
        "d_head": config.d_head,
        "d_mlp": config.d_mlp,
        "d_vocab_out": config.d_vocab,
        "normalization_type": "LNPre" if config.folded else "LN",
        "positional_embedding_type": "standard",
        "attention_dir": "causal",
        "use_local_attn": "local" in config.attn_types,
        "attn_types": list(config.attn_types),
        "use_attn_scale": False,
        "scale_attn_by_inverse_layer_idx": False,
        "original_architecture": "GPTNeoForCausalLM",
        "dtype": dtype,
    }
    return result
