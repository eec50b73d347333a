"""HF's GPTNeoConfig <-> TransformerLens's HookedTransformerConfig.

`NeoConfig` is what both can say. The architecture's fields serve both directions; what a config
says beyond them is carried along verbatim (`base`), and overridden only where the architecture
itself has changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.errors import ConfigError
from converter.layout import GPT_NEO

FIELDS = tuple(field for field in GPT_NEO.fields if field.default is not None)
"""All but `d_mlp`, which follows from `d_model` where it is left out."""
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gelu_new": ("gelu_accurate",), "gelu": ("gelu_python",), "gelu_fast": (),
    "gelu_pytorch_tanh": ("gelu_python_tanh",), "relu": (), "silu": ("swish",),
}  # fmt: skip
"""Activations that mean the same function, under the same name, in transformers and in
TransformerLens; each with transformers' other names of it."""
SIZES = ("n_layers", "d_model", "n_heads", "d_mlp", "n_ctx", "d_vocab")
_MAX = 2**31 - 1


@dataclass(frozen=True)
class NeoConfig:
    """The architecture of a GPT-Neo model, in TransformerLens's terms."""

    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    window_size: int
    attn_types: tuple[str, ...]
    """"global" or "local" for each layer."""
    act_fn: str
    eps: float
    folded: bool = False
    """LNPre: the LayerNorm gains and biases are folded into the weights that follow."""
    score_divisors: tuple[float, ...] = ()
    """What each layer's attention scores are divided by; empty: 1, as in GPT-Neo."""

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def sizes(self) -> dict[str, int]:
        """The axis lengths that the layout table's patterns use."""
        stated = {field.axis: getattr(self, field.name) for field in GPT_NEO.fields if field.axis}
        return {**stated, "h": self.d_head}

    def differences(self, other: NeoConfig) -> tuple[str, ...]:
        """Fields, beyond the sizes, by which the two compute different functions."""
        reach = [
            tuple(min(c.window_size, c.n_ctx) if t == "local" else c.n_ctx for t in c.attn_types)
            for c in (self, other)
        ]
        differ = {
            "attn_types": self.attn_types != other.attn_types and reach[0] != reach[1],
            "window_size": self.attn_types == other.attn_types and reach[0] != reach[1],
            "act_fn": self.act_fn != other.act_fn,
            "eps": self.eps != other.eps,
            "attn_scale": self.score_divisors != other.score_divisors,
        }
        return tuple(name for name, different in differ.items() if different)


def fail(
    what: str, where: str, do: str = "Check the config against the checkpoint it came with."
) -> ConfigError:
    return ConfigError(what, where=where, do=do)


def integer(config: Mapping[str, Any], name: str, default: Any, where: str) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX:
        raise fail(f"{name} is {value!r}: expected an integer from 1 to {_MAX}.", where)
    return value


def integers(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those of a config that says them in `NeoConfig`'s own terms."""
    return {name: integer(stated, name, None, where) for name in (*SIZES, "window_size")}


def is_finite(value: Any) -> bool:
    """Whether a value of JSON is a number that a float holds."""
    try:
        return (
            not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
        )
    except OverflowError:  # an integer of hundreds of digits
        return False


def checked(fields: dict[str, Any], where: str) -> NeoConfig:
    """The rules that hold in either config."""
    eps = fields["eps"]
    if not is_finite(eps) or eps < 0:
        raise fail(
            f"The LayerNorm epsilon is {eps!r}: expected a finite number, zero or more.", where
        )
    if fields["d_model"] % fields["n_heads"]:
        raise fail(
            f"d_model {fields['d_model']} is not divisible by the {fields['n_heads']} heads.", where
        )
    types = fields["attn_types"]
    known = all(kind in ("global", "local") for kind in types)
    if len(types) != fields["n_layers"] or not known:
        raise fail(
            f"The attention types {list(types)[:8]} do not say global or local for each of"
            f" {fields['n_layers']} layers.",
            where,
        )
    return NeoConfig(**fields | {"eps": float(eps)})
