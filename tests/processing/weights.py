"""Small GPT-Neo weights by the unit, a float64 forward pass, and ways to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from converter.dtypes import CODES, cast
from converter.processing import STEPS, Step, apply_all
from converter.processing.step import Array, Unit

SUBSETS = [subset for size in range(1, 6) for subset in combinations(STEPS, size)]
"""All 31 non-empty subsets, in TransformerLens's order."""


def label(steps: Sequence[Step]) -> str:
    return "+".join(step.name for step in steps)


@dataclass(frozen=True)
class Sizes:
    d: int = 24
    n: int = 3
    f: int = 40
    v: int = 37
    c: int = 12
    layers: int = 2


SIZES = Sizes()
EPS = 1e-5


def embed(rng: np.random.Generator, s: Sizes = SIZES) -> dict[str, Array]:
    # A large common component, as trained embeddings have.
    common = rng.normal(size=s.d)
    return {
        "embed.W_E": rng.normal(size=(s.v, s.d)) + common,
        "pos_embed.W_pos": 0.3 * rng.normal(size=(s.c, s.d)),
    }


def block(rng: np.random.Generator, s: Sizes = SIZES, *, biases: bool = False) -> dict[str, Array]:
    """`biases`: also those that HF GPT-Neo lacks."""
    h = s.d // s.n
    own = 0.5 if biases else 0.0
    return {
        "ln1.w": 1 + 0.3 * rng.normal(size=s.d),
        "ln1.b": 0.2 * rng.normal(size=s.d),
        "attn.W_Q": 0.2 * rng.normal(size=(s.n, s.d, h)),
        "attn.W_K": 0.2 * rng.normal(size=(s.n, s.d, h)),
        "attn.W_V": 0.2 * rng.normal(size=(s.n, s.d, h)),
        "attn.W_O": 0.2 * rng.normal(size=(s.n, h, s.d)),
        "attn.b_Q": own * rng.normal(size=(s.n, h)),
        "attn.b_K": own * rng.normal(size=(s.n, h)),
        "attn.b_V": own * rng.normal(size=(s.n, h)),
        "attn.b_O": 0.3 * rng.normal(size=s.d),
        "ln2.w": 1 + 0.3 * rng.normal(size=s.d),
        "ln2.b": 0.2 * rng.normal(size=s.d),
        "mlp.W_in": 0.2 * rng.normal(size=(s.d, s.f)),
        "mlp.b_in": 0.3 * rng.normal(size=s.f),
        "mlp.W_out": 0.2 * rng.normal(size=(s.f, s.d)),
        "mlp.b_out": 0.3 * rng.normal(size=s.d),
    }


def final(rng: np.random.Generator, s: Sizes = SIZES, *, biases: bool = False) -> dict[str, Array]:
    return {
        "ln_final.w": 1 + 0.3 * rng.normal(size=s.d),
        "ln_final.b": 0.2 * rng.normal(size=s.d),
        "unembed.W_U": 0.3 * rng.normal(size=(s.d, s.v)) + 0.5 * rng.normal(size=(s.d, 1)),
        "unembed.b_U": (0.5 if biases else 0.0) * rng.normal(size=s.v),
    }


def model(seed: int, s: Sizes = SIZES, *, biases: bool = False) -> list[dict[str, Array]]:
    """The units of a model, in the order of the forward pass."""
    rng = np.random.default_rng(seed)
    blocks = [block(rng, s, biases=biases) for _ in range(s.layers)]
    return [embed(rng, s), *blocks, final(rng, s, biases=biases)]


def in_dtype(unit: Unit, code: str) -> dict[str, NDArray[Any]]:
    return {name: cast(array, code) for name, array in unit.items()}


def in_float64(unit: dict[str, NDArray[Any]]) -> dict[str, Array]:
    return {name: array.astype(np.float64) for name, array in unit.items()}


def process(units: Sequence[Unit], steps: Sequence[Step]) -> list[dict[str, Array]]:
    return [apply_all(unit, steps)[0] for unit in units]


def distance(a: Array, b: Array) -> float:
    """The largest difference, relative to the largest element."""
    a, b = np.asarray(a), np.asarray(b)
    scale = max(float(np.abs(b).max(initial=0)), 1e-300)
    return float(np.abs(a - b).max(initial=0)) / scale


def forward(units: Sequence[Unit], tokens: Sequence[int], window: int = 4) -> Array:
    """Log-probabilities of GPT-Neo in float64: odd layers attend to `window` positions."""
    first, *blocks, last = ({n: np.asarray(a) for n, a in unit.items()} for unit in units)
    positions = np.arange(len(tokens))
    x = first["embed.W_E"][list(tokens)] + first["pos_embed.W_pos"][positions]
    gap = positions[:, None] - positions
    for layer, u in enumerate(blocks):
        seen = (gap >= 0) & (gap < (window if layer % 2 else len(tokens)))
        y = _norm(x, u["ln1.w"], u["ln1.b"])
        q, k, v = (
            np.einsum("pd,ndh->nph", y, u[f"attn.W_{t}"]) + u[f"attn.b_{t}"][:, None] for t in "QKV"
        )
        scores = np.where(seen, q @ k.swapaxes(1, 2), -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        x = x + np.einsum("nph,nhd->pd", pattern @ v, u["attn.W_O"]) + u["attn.b_O"]
        y = _norm(x, u["ln2.w"], u["ln2.b"]) @ u["mlp.W_in"] + u["mlp.b_in"]
        gelu = 0.5 * y * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))
        x = x + gelu @ u["mlp.W_out"] + u["mlp.b_out"]
    logits = _norm(x, last["ln_final.w"], last["ln_final.b"]) @ last["unembed.W_U"]
    logits = logits + last["unembed.b_U"]
    top = logits.max(-1, keepdims=True)
    result: Array = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return result


def _norm(x: Array, gain: Array, bias: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    result: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * gain + bias
    return result


TOKENS = [5, 11, 36, 0, 5, 5, 20, 7, 9]

gains = st.sampled_from(["ordinary", "zero", "negative", "denormal", "huge", "mixed", "small"])
"""Kinds of LayerNorm gains."""


def with_gains(unit: Unit, kind: str, rng: np.random.Generator) -> dict[str, Array]:
    """The unit with a few channels of unusual gain in every LayerNorm."""
    result = dict(unit)
    values = {
        "zero": [0.0],
        "negative": [-1.3, -0.2],
        "denormal": [1e-40, -3e-45],
        "huge": [1e30, -1e25],
        "small": [1e-3, -1e-6],
        "mixed": [0.0, -0.0, -1.0, 1e-40, 1e4, 1e-4],
    }.get(kind, [])
    for name in unit:
        if name.startswith("ln") and name.endswith(".w") and values:
            gain = unit[name].copy()
            where = rng.choice(gain.size, size=len(values), replace=False)
            gain[where] = values
            result[name] = gain
    return result


units = st.builds(
    lambda seed, kind, part, biases: with_gains(
        {
            "embed": lambda r: embed(r),
            "block": lambda r: block(r, biases=biases),
            "final": lambda r: final(r, biases=biases),
        }[part](np.random.default_rng(seed)),
        kind,
        np.random.default_rng(seed + 1),
    ),
    st.integers(0, 2**32),
    gains,
    st.sampled_from(["embed", "block", "final"]),
    st.booleans(),
)
codes = st.sampled_from(sorted(CODES))
