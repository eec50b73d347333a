"""GPT-Neo's forward pass, our own: the float64 reference, and a float32 runtime.

Streamed: weights are read from the checkpoint unit by unit, used for all probes, released.

The mathematics, with r the residual stream [batch, pos, d], for each layer i:

    r   = W_E[token] + W_pos[position]
    LN(r) = (r - mean r) / sqrt(mean (r - mean r)² + eps) · w + b      (folded: w = 1, b = 0)
    x   = LN1(r);   q, k, v = x W_Q + b_Q, x W_K + b_K, x W_V + b_V    [batch, n, pos, h]
    s   = q · k / score_divisors[i]                                    (GPT-Neo: divided by 1)
    s   = -inf where key > query, and in a local layer where key <= query - window
    r  += (softmax(s) v) W_O + b_O
    r  += act(LN2(r) W_in + b_in) W_out + b_out
    logits = LN_final(r) W_U + b_U

transformers cannot serve as the reference: it casts queries and keys to float32, whatever
the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from converter.checkpoint import Checkpoint, NeoConfig
from converter.dtypes import cast
from converter.processing.attn_scale import hub_tensor
from converter.verification.activations import Activation, activation_named
from converter.verification.probes import Probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Watch = Callable[[str, Sequence["Tensor"]], None]
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Storage:
    """How an artifact stores an original's weights, when that rounds them."""

    codes: str | Mapping[str, str]
    """A safetensors code for all, or one for each `hooked` name."""
    absorb: bool = False
    """Whether score divisors go into W_Q and b_Q, before these are rounded."""

    def tensor(self, checkpoint: Checkpoint, key: str) -> np.ndarray:
        code = self.codes if isinstance(self.codes, str) else self.codes[key]
        return (hub_tensor if self.absorb else Checkpoint.tensor)(checkpoint, key, code)


@dataclass(frozen=True)
class _Weights:
    """Reads a checkpoint's weights as torch tensors: rounded to `storage`, then to `dtype`."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    storage: Storage | None
    device: torch.device

    def __call__(self, key: str) -> Tensor:
        return self.widen(self.raw(key))

    def raw(self, key: str) -> np.ndarray:
        if self.storage is None:
            return self.checkpoint.tensor(key)
        return self.storage.tensor(self.checkpoint, key)

    def divisor(self, layer: int) -> float | None:
        """What the layer's scores are divided by, or None."""
        divisors = self.checkpoint.config.score_divisors
        absorbed = self.storage is not None and self.storage.absorb
        return divisors[layer] if divisors and not absorbed else None

    def widen(self, array: np.ndarray) -> Tensor:
        import torch

        code = {torch.float64: "F64", torch.float32: "F32"}[self.dtype]
        # np.require: torch wants writable, positively strided memory.
        wide = np.require(cast(array, code), requirements="W")
        tensor: Tensor = torch.from_numpy(wide).to(self.device)
        return tensor


@dataclass(frozen=True)
class Forward:
    """A forward pass up to the head. The head is applied when asked for, a few rows at a time:
    logits of long sequences over a large vocabulary are the largest thing there is."""

    probes: Sequence[Probe]
    final: tuple[Tensor, ...]
    """LN_final(r) for each probe [batch, pos, d]."""
    weights: _Weights
    head: np.ndarray
    """W_U [d, v] in its storage dtype."""
    head_bias: Tensor

    def logits(self, index: int) -> Tensor:
        """[batch, pos, v] of a probe, in the dtype of the pass."""
        final = self.final[index]
        return self._unembed(final.flatten(0, 1)).view(*final.shape[:2], -1)

    def rows(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits of a probe's positions, padding left out, in order, some rows at a time.

        Yields the rows' indices into the flattened [batch · pos], and their logits [rows, v].
        """
        import torch

        final = self.final[index].flatten(0, 1)
        mask = self.probes[index].mask
        wanted = torch.arange(final.shape[0])
        if mask is not None:
            wanted = wanted[torch.from_numpy(mask.reshape(-1).copy())]
        step = max(1, _CHUNK_BYTES // (8 * self.head.shape[1]))
        for chunk in torch.split(wanted, step):
            yield chunk, self._unembed(final[chunk.to(final.device)])

    def _unembed(self, final: Tensor) -> Tensor:
        """final [rows, d] -> logits [rows, v], the head widened a block of columns at a time."""
        d, v = self.head.shape
        logits = final.new_empty(final.shape[0], v)
        step = max(1, _CHUNK_BYTES // (8 * d))
        for start in range(0, v, step):
            block = self.weights.widen(self.head[:, start : start + step])
            logits[:, start : start + step] = final @ block
        return logits + self.head_bias


def forward(
    checkpoint: Checkpoint,
    probes: Sequence[Probe],
    *,
    dtype: torch.dtype,
    storage: Storage | None = None,
    device: torch.device | str = "cpu",
    jitter: Sequence[int | None] | None = None,
    watch: Watch | None = None,
) -> Forward:
    """Run all probes through the model; every weight is read once.

    Args:
        dtype: torch.float64 or torch.float32, of weights and of all arithmetic.
        storage: weights are first rounded as an artifact stores them.
        jitter: for each probe None or a seed: the embeddings' last bits are then moved, which
            shows how the model amplifies rounding.
        watch: called with ("embed" | "block i" | "final", residual streams) after each unit.

    Raises:
        ConfigError: an activation that transformers does not know.
    """
    import torch

    config = checkpoint.config
    weights = _Weights(checkpoint, dtype, storage, torch.device(device))
    activation = activation_named(config.act_fn, dtype)
    with torch.inference_mode():
        masks = [_allowed(probe, weights.device) for probe in probes]
        residuals = _embed(weights, probes, jitter)
        if watch:
            watch("embed", residuals)
        for layer in range(config.n_layers):
            _block(weights, config, layer, residuals, masks, activation)
            if watch:
                watch(f"block {layer}", residuals)
        norm = weights("ln_final.w"), weights("ln_final.b")
        final = tuple(_layer_norm(r, *norm, config.eps) for r in residuals)
        if watch:
            watch("final", final)
        return Forward(probes, final, weights, weights.raw("unembed.W_U"), weights("unembed.b_U"))


def _embed(
    weights: _Weights, probes: Sequence[Probe], jitter: Sequence[int | None] | None
) -> list[Tensor]:
    """W_E[token] + W_pos[position]: [batch, pos, d] for each probe."""
    tokens, positions = weights.raw("embed.W_E"), weights.raw("pos_embed.W_pos")
    residuals = [
        weights.widen(tokens[p.tokens]) + weights.widen(positions[p.positions]) for p in probes
    ]
    if jitter is None:
        return residuals
    return [r if s is None else _jittered(r, s) for r, s in zip(residuals, jitter, strict=True)]


def _jittered(residual: Tensor, seed: int) -> Tensor:
    """Each element moved one unit in the last place, up or down at random."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    up = torch.rand(residual.shape, generator=generator) < 0.5
    toward = torch.where(up, math.inf, -math.inf).to(residual)
    return torch.nextafter(residual, toward)


def _block(
    weights: _Weights,
    config: NeoConfig,
    layer: int,
    residuals: list[Tensor],
    masks: Sequence[Callable[[int | None], Tensor]],
    activation: Activation,
) -> None:
    """Block `layer`, applied to each probe's residual stream in place of it."""

    def w(name: str) -> Tensor:
        return weights(f"blocks.{layer}.{name}")

    n, h, d = config.n_heads, config.d_head, config.d_model
    window = config.window_size if config.attn_types[layer] == "local" else None
    divisor = weights.divisor(layer)
    norm = w("ln1.w"), w("ln1.b")
    # [n, d, h] -> [d, n h]: one matrix product for all heads.
    qkv = [(w(f"attn.W_{x}").permute(1, 0, 2).reshape(d, n * h), w(f"attn.b_{x}")) for x in "QKV"]
    output, output_bias = w("attn.W_O").reshape(n * h, d), w("attn.b_O")
    for index, residual in enumerate(residuals):
        x = _layer_norm(residual, *norm, config.eps)
        q, k, v = (
            ((x @ matrix).view(*x.shape[:2], n, h) + bias).transpose(1, 2) for matrix, bias in qkv
        )
        mixed = _attend(q, k, v, masks[index](window), divisor)
        residuals[index] = residual + (mixed.transpose(1, 2).flatten(2) @ output + output_bias)
    del qkv, output
    norm = w("ln2.w"), w("ln2.b")
    w_in, b_in, w_out, b_out = w("mlp.W_in"), w("mlp.b_in"), w("mlp.W_out"), w("mlp.b_out")
    for index, residual in enumerate(residuals):
        x = _layer_norm(residual, *norm, config.eps)
        residuals[index] = residual + (activation(x @ w_in + b_in) @ w_out + b_out)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, divisor: float | None) -> Tensor:
    """softmax(q kᵀ / divisor) v, a batch row at a time. q, k, v [batch, n, pos, h];
    allowed bool [batch or 1, query, key]."""
    import torch

    mixed = torch.empty_like(q)
    for row in range(q.shape[0]):
        scores = q[row] @ k[row].transpose(-1, -2)
        if divisor is not None:
            scores = scores / divisor
        scores = scores.masked_fill(~allowed[min(row, allowed.shape[0] - 1)], -math.inf)
        mixed[row] = scores.softmax(-1) @ v[row]
    return mixed


def _allowed(probe: Probe, device: torch.device) -> Callable[[int | None], Tensor]:
    """For a window (None: global), which keys each query sees: bool [batch or 1, query, key]."""
    import torch

    length = probe.tokens.shape[1]
    positions = torch.arange(length, device=device)
    ago = positions[:, None] - positions[None, :]

    def allowed(window: int | None) -> Tensor:
        seen = (ago >= 0) if window is None else (ago >= 0) & (ago < window)
        if probe.mask is None:
            return seen[None]
        real = torch.from_numpy(probe.mask).to(device)
        # Padding sees itself: a row without any key would be NaN, and NaN times zero is NaN.
        return (seen & real[:, None, :]) | (ago == 0)

    return allowed


def _layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w + b
