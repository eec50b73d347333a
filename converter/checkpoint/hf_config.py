"""HF's `config.json` <-> NeoConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.checkpoint.config import ACTIVATIONS, FIELDS, NeoConfig, checked, fail, integer
from converter.checkpoint.standard import NAMED
from converter.dtypes import code_stated
from converter.errors import ConfigError
from converter.strict_json import Json

ACTIVATION_ALIASES = {other: name for name, others in ACTIVATIONS.items() for other in others}

_MOST_LAYERS = 2**20
_NUMBER, _TOKEN = (int, float), (int, type(None))
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "tie_word_embeddings": (bool,), "use_cache": (bool,), "initializer_range": (float,),
    "layer_norm_epsilon": (float,),
    "resid_dropout": _NUMBER, "embed_dropout": _NUMBER, "attention_dropout": _NUMBER,
    "classifier_dropout": _NUMBER, "bos_token_id": _TOKEN, "pad_token_id": _TOKEN,
    "eos_token_id": (*_TOKEN, list),
}  # fmt: skip
"""Fields that we only pass on or take any number for, and the types that transformers takes: with
others it refuses the whole config."""
_WINDOWS = ("sliding_window", "attention_chunk_size")
_FOREIGN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_WINDOWS, ()), "layer_types": (), "kv_sharing_modes": (),
    "num_kv_shared_layers": (0,), "per_layer_config": ({},),
    "is_causal": (True,), "is_encoder_decoder": (False,),
    "text_config": (), "text_encoder": (), "decoder": (), "generator": (),
}  # fmt: skip
"""Fields that no GPT-Neo has, by which transformers gives a model of any kind another cache, another
mask, or the place of another config; and the values, beside null, with which it does not."""


def from_hf(
    config: Mapping[str, Any], where: str = "config.json", notes: list[str] | None = None
) -> NeoConfig:
    """Read an HF `config.json`. Fields left out take transformers' defaults.

    Args:
        notes: what was filled in is appended.

    Raises:
        ConfigError: not a GPT-Neo config, or its numbers do not fit together.
    """
    model_type = config.get("model_type")
    if model_type != "gpt_neo":
        raise fail(
            f"This is a {model_type!r} model; neoconvert converts GPT-Neo (model_type 'gpt_neo').",
            where,
            "Name a GPT-Neo checkpoint, such as EleutherAI/gpt-neo-125m.",
        )
    for field in FIELDS:
        if field.alias and field.alias in config:
            if field.hf in config:  # transformers checks what it does not use, too
                integer(config, field.hf, None, where)
            config = {**config, field.hf: config[field.alias]}
    _require_optional(config, where)
    notes = [] if notes is None else notes
    left_out = [f"{field.hf}={field.default}" for field in FIELDS if field.hf not in config]
    if left_out:
        notes.append(f"config.json leaves out {', '.join(left_out)}: transformers' defaults")
    fields: dict[str, Any] = {}
    for name, theirs, default, *_ in FIELDS:
        if isinstance(default, int):
            fields[name] = integer(config, theirs, default, where)
        else:
            fields[name] = config.get(theirs, default)
    if not isinstance(fields["act_fn"], str):
        raise fail(f"activation_function is {fields['act_fn']!r}: expected a name.", where)
    fields["act_fn"] = ACTIVATION_ALIASES.get(fields["act_fn"], fields["act_fn"])
    inner = config.get("intermediate_size")
    fields["d_mlp"] = (
        4 * fields["d_model"]
        if inner is None
        else integer(config, "intermediate_size", None, where)
    )
    fields["attn_types"] = _attention_layers(config, fields["n_layers"], where, notes)
    _refuse_foreign(config, fields["n_ctx"], where)
    return checked(fields, where)


def ties(config: Mapping[str, Any] | None) -> bool:
    """Whether it says that the head is the embedding: transformers' default."""
    return (config or {}).get("tie_word_embeddings", True) is not False


def _refuse_foreign(config: Mapping[str, Any], n_ctx: int, where: str) -> None:
    """
    Raises:
        ConfigError: a field makes transformers run something else than GPT-Neo, be it only when it
            generates: keys that a sliding cache has dropped are seen by no layer, global or local.
    """
    for name, harmless in _FOREIGN.items():
        value = config.get(name)
        whole = name in _WINDOWS and type(value) is int and value >= n_ctx
        if not (value is None or value in harmless or whole):
            raise fail(
                f"{name} is {value!r:.40}: GPT-Neo has no such field, and transformers would"
                " run another model by it.",
                where,
                f"Remove {name} from the config.",
            )


def _require_optional(config: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        ConfigError: a field that is only passed on has a value with which transformers would not
            open the config; or the weights are quantised.
    """
    for name, types in _OPTIONAL.items():
        value = config.get(name)
        ids = value if isinstance(value, list) else []
        right = type(value) in types and all(type(one) is int for one in ids)
        if name in config and not right:
            raise fail(
                f"{name} is {str(value)[:40]!r}: transformers does not open such a config.",
                where,
                f"Correct {name} in the config, or remove it: transformers then fills it in.",
            )
    if (stated := config.get("dtype")) and code_stated(stated) is None:
        raise fail(
            f"dtype is {str(stated)[:40]!r}: transformers cannot load a GPT-Neo in that.",
            where,
            "Correct dtype in the config, or remove it: the weights then keep their own.",
        )
    if config.get("quantization_config") is not None:
        raise fail(
            "quantization_config says that these weights are quantised.",
            where,
            "Convert the checkpoint that was quantised; or, if the weights beside it are not,"
            " remove quantization_config.",
        )


def _attention_layers(
    config: Mapping[str, Any], n_layers: int, where: str, notes: list[str]
) -> tuple[str, ...]:
    """The layers' attention, as transformers finds it: `attention_layers` where it is there,
    whatever `attention_types` says, else `attention_types` expanded."""
    types = config.get("attention_types")
    _require_expandable(types, where)
    expanded = _expanded([[["global", "local"], 12]] if types is None else types, n_layers)
    if "attention_layers" not in config:
        if expanded is None:
            raise fail(
                f"attention_types {str(types)[:80]} does not describe {n_layers} layers."
                if types is not None
                else f"There are neither attention_types nor attention_layers for {n_layers} layers.",
                where,
            )
        if types is None:
            notes.append(
                "config.json leaves out attention_types: transformers' default, global and local"
                " in turn"
            )
        return tuple(expanded)
    stated = config["attention_layers"]
    if not isinstance(stated, list) or len(stated) != n_layers:
        raise fail(
            f"attention_layers {str(stated)[:80]} does not describe {n_layers} layers.", where
        )
    if stated != expanded:
        what = "leaves out attention_types" if types is None else "has other attention_types"
        notes.append(f"config.json {what}: attention_layers counts, as in transformers")
    return tuple(map(str, stated))


def _require_expandable(types: Any, where: str) -> None:
    """
    Raises:
        ConfigError: transformers, which expands attention_types even where attention_layers goes
            before it, would stop at it or fill the memory.
    """
    sound = types is None or (
        isinstance(types, list)
        and all(isinstance(item, list) and len(item) > 1 for item in types)
        and all(isinstance(i[0], (list, str)) and isinstance(i[1], int) for i in types)
        and sum(max(0, item[1]) * max(1, len(item[0])) for item in types) <= _MOST_LAYERS
    )
    if not sound:
        raise fail(
            f"attention_types {str(types)[:80]} is no list of names of layers, each with a number of times.",
            where,
            "Correct it, or remove it where the config has attention_layers.",
        )


def _expanded(types: Any, n_layers: int) -> list[str] | None:
    """[[["global", "local"], 6]] is twelve layers. None: it does not describe so many."""
    layers: list[str] = []
    try:
        for pattern, times in types:
            # Counted before it is built: a hostile repeat must not fill memory.
            if isinstance(times, bool) or not 0 <= times * len(pattern) <= n_layers:
                return None
            layers += [str(name) for name in pattern] * times
    except (TypeError, ValueError):
        return None
    return layers if len(layers) == n_layers else None


def to_hf(config: NeoConfig, base: Json | None, *, tied: bool, dtype: str | None) -> Json:
    """An HF `config.json` for this architecture.

    `base` is the HF config the weights once came with; it is returned field for field as far
    as it still says what `config` says. Without one, a plain config is built. `dtype` is the
    storage dtype to state, or None to leave it as `base` has it.
    """
    result: Json = dict(base) if base is not None else _plain_hf(config, dtype)
    result.pop(NAMED, None)  # a file that does not come along: transformers leaves it out, too
    try:
        old = from_hf(result)
    except ConfigError:
        result = _plain_hf(config, dtype)
        old = from_hf(result)
    for field in FIELDS:
        value, twice = getattr(config, field.name), field.hf in result and field.alias in result
        if twice or getattr(old, field.name) != value:
            result = {k: v for k, v in result.items() if k != field.alias} | {field.hf: value}
    if (result.get("intermediate_size") or 4 * config.d_model) != config.d_mlp:
        result["intermediate_size"] = config.d_mlp
    layers = list(config.attn_types)
    stale = _expanded(result.get("attention_types"), config.n_layers) != layers
    if stale or result.get("attention_layers", layers) != layers:
        result["attention_types"] = compress(config.attn_types)
        result["attention_layers"] = layers
    if result.get("tie_word_embeddings", True) is not tied:
        result["tie_word_embeddings"] = tied
    result["architectures"] = ["GPTNeoForCausalLM"]
    if dtype is not None:
        stated = [name for name in ("dtype", "torch_dtype") if name in result] or ["dtype"]
        result.update(dict.fromkeys(stated, dtype))
    return result


def _plain_hf(config: NeoConfig, dtype: str | None) -> Json:
    # GPT-2's end-of-text, as transformers assumes; a smaller vocabulary has no such token.
    end_of_text = 50256 if config.d_vocab > 50256 else None
    return {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM"],
        **{field.hf: getattr(config, field.name) for field in FIELDS},
        "intermediate_size": None if config.d_mlp == 4 * config.d_model else config.d_mlp,
        "attention_types": compress(config.attn_types),
        "attention_layers": list(config.attn_types),
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": dtype or "float32",
    }


def compress(types: tuple[str, ...]) -> list[list[Any]]:
    """The shortest `attention_types` for these layers: the inverse of its expansion."""
    n = len(types)
    period = next(p for p in range(1, n + 1) if n % p == 0 and types == types[:p] * (n // p))
    return [[list(types[:period]), n // period]]
