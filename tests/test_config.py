"""HF config <-> TL cfg, every field that matters, and what GPT-Neo cannot express."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.checkpoint.hf_config import ACTIVATION_ALIASES, compress, from_hf, to_hf
from converter.checkpoint.tl_config import from_tl, to_tl
from converter.convert import bake, hf_to_tl, tl_to_hf
from converter.errors import ConfigError, NotRepresentable
from converter.exporting import Graph
from tests.checkpoints import Recipe, recipes
from tests.models import TINY, random_hf

TL: dict[str, Any] = {
    "n_layers": 2, "d_model": 4, "n_heads": 2, "d_head": 2, "n_ctx": 9, "d_vocab": 7, "d_mlp": 5,
    "act_fn": "gelu_new", "use_attn_scale": False, "use_local_attn": True,
    "attn_types": ["global", "local"], "window_size": 3,
}  # fmt: skip


@given(recipes)
def test_hf_to_tl_to_hf(recipe: Recipe) -> None:
    config = from_hf(recipe.config)
    tl = to_tl(config, None, dtype="float32", model_name="m")
    assert from_tl(json.loads(json.dumps(tl))) == config
    assert to_hf(from_tl(tl), recipe.config, tied=recipe.tied, dtype=None) == recipe.config
    rebuilt = to_hf(from_tl(tl), None, tied=recipe.tied, dtype="float32")
    assert from_hf(rebuilt) == config
    assert rebuilt["tie_word_embeddings"] is recipe.tied


@given(st.lists(st.sampled_from(["global", "local"]), min_size=1, max_size=12).map(tuple))
def test_attention_types_compress_to_what_expands_back(types: tuple[str, ...]) -> None:
    assert from_hf(Recipe().config | {
        "num_layers": len(types), "attention_types": compress(types), "attention_layers": list(types),
    }).attn_types == types  # fmt: skip


def test_published_config_shapes_are_short() -> None:
    assert compress(("global", "local") * 6) == [[["global", "local"], 6]]
    assert compress(("global",) * 4) == [[["global"], 4]]


def test_transformers_defaults_fill_what_is_left_out() -> None:
    """EleutherAI/gpt-neo-1.3B is GPTNeoConfig()."""
    config = from_hf({"model_type": "gpt_neo"})
    assert (config.n_layers, config.d_model, config.d_mlp, config.d_vocab) == (
        24,
        2048,
        8192,
        50257,
    )
    assert config.attn_types == ("global", "local") * 12


def test_transformers_aliases() -> None:
    config = Recipe().config
    renamed = {
        "num_hidden_layers": config.pop("num_layers"),
        "num_attention_heads": config.pop("num_heads"),
    }
    assert from_hf(config | renamed) == from_hf(Recipe().config)


def test_what_tl_has_no_name_for_is_kept_and_what_changed_is_not() -> None:
    base = Recipe().config
    edited = from_tl(
        to_tl(from_hf(base), None, dtype="float32", model_name="m") | {"window_size": 4}
    )
    assert to_hf(edited, base, tied=True, dtype=None) == base | {"window_size": 4}
    assert to_hf(edited, base, tied=False, dtype="float16") == base | {
        "window_size": 4, "tie_word_embeddings": False, "dtype": "float16"
    }  # fmt: skip
    old = base | {"torch_dtype": "float32"}
    assert to_hf(from_hf(base), old, tied=True, dtype="float16")["torch_dtype"] == "float16"


def test_an_mlp_of_another_width() -> None:
    config = from_hf(Recipe().config)
    wider = replace(config, d_mlp=config.d_mlp + 1)
    assert from_hf(to_hf(wider, Recipe().config, tied=True, dtype=None)) == wider


def test_a_kept_config_that_is_no_gpt_neo_is_not_built_upon() -> None:
    config = from_hf(Recipe().config)
    plain = to_hf(config, None, tied=True, dtype="float32")
    for kept in ({"model_type": "gpt2"}, Recipe().config | {"num_layers": 0}):
        assert to_hf(config, kept, tied=True, dtype="float32") == plain


def test_dtypes_that_transformers_does_not_load_in(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for stated in ("floaty", "auto", "torch.float16", "int8", 3):
        random_hf(tmp_path / "hf")
        config = json.loads((tmp_path / "hf/config.json").read_text()) | {"dtype": stated}
        (tmp_path / "hf/config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="dtype"):
            from_hf(config)
        with pytest.raises((AttributeError, ValueError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for right in ("half", "double", "bfloat16", None):
        from_hf(Recipe().config | {"dtype": right})


@pytest.mark.parametrize("name", ACTIVATION_ALIASES)
def test_an_activation_under_another_name_is_the_same(name: str, tmp_path: Path) -> None:
    """Verified: transformers runs it by its own name."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        pytest.skip("this transformers does not know it")
    source = random_hf(tmp_path / "hf", activation_function=name)
    hf_to_tl(source, tmp_path / "tl", layout="hooked", effort="quick")
    tl_to_hf(tmp_path / "tl", tmp_path / "back", effort="quick")
    kept = json.loads((tmp_path / "back/config.json").read_text())
    assert kept["activation_function"] == name
    bake(source, tmp_path / "graph", process="none", graph=Graph(), effort="quick")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positional_embedding_type", "rotary"), ("normalization_type", "RMS"), ("normalization_type", None),
        ("attn_only", True), ("gated_mlp", True), ("parallel_attn_mlp", True), ("attention_dir", "bidirectional"),
        ("act_fn", "solu_ln"), ("num_experts", 4), ("n_key_value_heads", 1), ("d_vocab_out", 8),
        ("use_qk_norm", True), ("attn_scores_soft_cap", 30.0), ("output_logits_soft_cap", 30.0),
        ("d_head", 3), ("post_embedding_ln", True), ("use_attention_sinks", True),
    ],
)  # fmt: skip
def test_not_representable_names_the_field(field: str, value: object) -> None:
    with pytest.raises(NotRepresentable, match=field):
        from_tl({**TL, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", None), ("d_vocab", -1), ("attn_types", None), ("attn_types", ["global"]),
        ("attn_types", ["global", "strided"]), ("window_size", 0), ("attn_scale", 0.0),
        ("eps", float("nan")), ("eps", -1.0), ("n_ctx", True), ("d_mlp", 2.5),
    ],
)  # fmt: skip
def test_malformed_cfg(field: str, value: object) -> None:
    with pytest.raises(ConfigError):
        from_tl({**TL, "use_attn_scale": field == "attn_scale", field: value})


def test_score_divisors() -> None:
    assert from_tl(TL).score_divisors == ()
    scaled = {**TL, "use_attn_scale": True}
    assert from_tl(scaled).score_divisors == (2**0.5, 2**0.5)
    assert from_tl({**scaled, "attn_scale": 8.0}).score_divisors == (8.0, 8.0)
    both = {**scaled, "attn_scale": 8.0, "scale_attn_by_inverse_layer_idx": True}
    assert from_tl(both).score_divisors == (8.0, 16.0)
    only = {**TL, "scale_attn_by_inverse_layer_idx": True}
    assert from_tl(only).score_divisors == (1.0, 2.0)


def test_all_global_needs_no_window() -> None:
    config = from_tl({**TL, "use_local_attn": False, "attn_types": None, "window_size": None})
    assert config.attn_types == ("global", "global")


def test_aliases_win_as_in_transformers() -> None:
    """One config with both names: transformers reads num_attention_heads."""
    config = from_hf(Recipe().config | {"num_attention_heads": 1})
    assert config.n_heads == 1
    written = to_hf(config, Recipe().config | {"num_attention_heads": 1}, tied=True, dtype=None)
    assert written["num_heads"] == 1
    assert "num_attention_heads" not in written


@pytest.mark.parametrize("types", [None, [[["global"], 2]], [[["global", "local"], 12]]])
def test_attention_layers_count_whatever_attention_types_say(types: object) -> None:
    base = Recipe().config | {"attention_types": types, "attention_layers": ["local", "global"]}
    notes: list[str] = []
    config = from_hf(base, notes=notes)
    assert config.attn_types == ("local", "global")
    assert "attention_layers counts" in notes[0]
    written = to_hf(config, base, tied=True, dtype=None)
    assert written["attention_types"] == [[["local", "global"], 1]]
    notes.clear()
    assert from_hf(written, notes=notes) == config
    assert notes == []


@pytest.mark.parametrize(
    "layers", [None, ["local"], "global", ["global", "strided"], ["global", "local", "local"]]
)
def test_malformed_attention_layers(layers: object) -> None:
    with pytest.raises(ConfigError):
        from_hf(Recipe().config | {"attention_layers": layers})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", True), ("num_heads", "2"), ("num_layers", 2.0), ("window_size", None),
        ("vocab_size", None), ("activation_function", None),
        ("tie_word_embeddings", None), ("tie_word_embeddings", "false"), ("attention_dropout", None),
        ("bos_token_id", True), ("eos_token_id", "1"), ("use_cache", 3), ("initializer_range", "x"),
        ("classifier_dropout", "7"), ("quantization_config", {"a": 1}),
    ],
)  # fmt: skip
def test_what_transformers_refuses_is_refused_by_name(field: str, value: object) -> None:
    from transformers import GPTNeoConfig

    config = Recipe().config | {field: value}
    with pytest.raises(ConfigError, match=field):
        from_hf(config)
    if field != "quantization_config":
        with pytest.raises(Exception, match=field):
            GPTNeoConfig(**config)


FOREIGN: list[tuple[str, Any]] = [
    ("sliding_window", 8), ("attention_chunk_size", 8), ("layer_types", ["sliding_attention"] * 2),
    ("layer_types", ["full_attention"] * 2), ("kv_sharing_modes", ["reuse", None]),
    ("num_kv_shared_layers", 1), ("per_layer_config", {"0": {"sliding_window": 8}}),
    ("is_causal", False), ("is_encoder_decoder", True), ("text_config", {"vocab_size": 3}),
    ("decoder", {}), ("sliding_window", "none"),
]  # fmt: skip
HARMLESS: list[tuple[str, Any]] = [
    *((field, None) for field, _ in FOREIGN if field != "is_encoder_decoder"),
    ("sliding_window", TINY["max_position_embeddings"]), ("attention_chunk_size", 4096),
    ("per_layer_config", {}), ("num_kv_shared_layers", 0), ("is_causal", True),
    ("is_encoder_decoder", False),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), FOREIGN)
def test_a_field_of_other_models_that_transformers_heeds(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as refused:
        from_hf(TINY | {field: value}, "m/config.json")
    assert refused.value.lines()[1:] == ("m/config.json", f"Remove {field} from the config.")


def _cached(directory: Path) -> Any:
    """What transformers makes of a sequence, its second half a token at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.arange(32)[None]
    with torch.inference_mode():
        cache, pieces = None, []
        for start, end in zip([0, *range(16, 32)], range(16, 33), strict=True):
            out = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    return torch.cat(pieces, 1)


def test_without_effect_such_a_field_is_taken(tmp_path: Path) -> None:
    plain = _cached(random_hf(tmp_path / "plain"))
    for field, value in HARMLESS:
        from_hf(TINY | {field: value})
        assert (_cached(random_hf(tmp_path / "m", **{field: value})) == plain).all(), field
    random_hf(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"sliding_window": 8}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert not (_cached(tmp_path / "m") == plain).all()


@pytest.mark.parametrize("field", ["act_fn", "window_size", "attn_types", "d_vocab", "d_head"])
def test_what_transformer_lens_does_not_fill_in_is_not_filled_in(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        from_tl({name: value for name, value in TL.items() if name != field})


def test_what_transformer_lens_fills_in_is_said() -> None:
    notes: list[str] = []
    config = from_tl({n: v for n, v in TL.items() if n not in ("n_heads", "d_mlp")}, notes=notes)
    assert (config.n_heads, config.d_mlp, config.eps) == (2, 16, 1e-5)
    assert "n_heads=2, d_mlp=16, eps=1e-05, normalization_type=LN" in notes[0]


def test_types_of_attention_that_transformer_lens_passes_over() -> None:
    notes: list[str] = []
    config = from_tl(TL | {"use_local_attn": False}, notes=notes)
    assert config.attn_types == ("global", "global")
    assert "its attn_types are not used" in notes[-1]


def test_the_next_cfg_has_nothing_of_another_machine_or_version() -> None:
    of_then = {
        "device": "cuda", "n_devices": 2, "tokenizer_name": "x/y", "seed": 3, "run_note": "good",
        "use_headwise_qkv_input": False, "default_prepend_bos": False,
    }  # fmt: skip
    written = to_tl(from_tl(TL | of_then), TL | of_then, dtype="float32", model_name="m")
    assert written.keys() & of_then.keys() == {"default_prepend_bos"}
    assert written["default_prepend_bos"] is False
