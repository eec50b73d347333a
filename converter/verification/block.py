"""One block of GPT-Neo on residual streams: `converter.verification.reference` has the mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from converter.checkpoint import NeoConfig
from converter.verification.activations import Activation

if TYPE_CHECKING:
    from torch import Tensor

_QUERIES = 128
"""Attended from at a time."""


def apply_block(
    weights: Callable[[str], Tensor],
    config: NeoConfig,
    layer: int,
    divisor: float | None,
    residuals: list[Tensor],
    masks: Sequence[Tensor | None],
    activation: Activation,
) -> None:
    """Block `layer`, applied to each probe's residual stream in place of it.

    `weights`: by `hooked` name. `divisor`: of the scores; None: they are not divided.
    """

    def w(name: str) -> Tensor:
        return weights(f"blocks.{layer}.{name}")

    n, h, d = config.n_heads, config.d_head, config.d_model
    window = config.window_size if config.attn_types[layer] == "local" else None
    norm = w("ln1.w"), w("ln1.b")
    # [n, d, h] -> [d, n h]: one matrix product for all heads.
    qkv = [(w(f"attn.W_{x}").permute(1, 0, 2).reshape(d, n * h), w(f"attn.b_{x}")) for x in "QKV"]
    output, output_bias = w("attn.W_O").reshape(n * h, d), w("attn.b_O")
    for index, residual in enumerate(residuals):
        x = layer_norm(residual, *norm, config.eps)
        q, k, v = (
            ((x @ matrix).view(*x.shape[:2], n, h) + bias).transpose(1, 2) for matrix, bias in qkv
        )
        mixed = _attend(q, k, v, masks[index], window, divisor)
        residuals[index] = residual + (mixed.transpose(1, 2).flatten(2) @ output + output_bias)
    del qkv, output
    norm = w("ln2.w"), w("ln2.b")
    w_in, b_in, w_out, b_out = w("mlp.W_in"), w("mlp.b_in"), w("mlp.W_out"), w("mlp.b_out")
    for index, residual in enumerate(residuals):
        x = layer_norm(residual, *norm, config.eps)
        residuals[index] = residual + (activation(x @ w_in + b_in) @ w_out + b_out)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None, divisor: float | None
) -> Tensor:
    """softmax(q kᵀ / divisor) v over the keys that each query sees, some queries at a time.

    q, k, v [batch, n, pos, h]; mask bool [batch, pos], False at padding.
    """
    import torch

    length = q.shape[2]
    position = torch.arange(length, device=q.device)
    mixed = torch.empty_like(q)
    for row in range(q.shape[0]):
        for start in range(0, length, _QUERIES):
            stop = min(start + _QUERIES, length)
            first = 0 if window is None else max(0, start - window + 1)
            ago = position[start:stop, None] - position[first:stop]
            seen = ago >= 0 if window is None else (ago >= 0) & (ago < window)
            if mask is not None:
                # Padding sees itself: a row without a key would be NaN, and NaN times 0 is NaN.
                seen = (seen & mask[row, first:stop]) | (ago == 0)
            scores = q[row, :, start:stop] @ k[row, :, first:stop].transpose(-1, -2)
            if divisor is not None:
                scores = scores / divisor
            weights = scores.masked_fill_(~seen, -math.inf).softmax(-1)
            mixed[row, :, start:stop] = weights @ v[row, :, first:stop]
    return mixed


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w + b
