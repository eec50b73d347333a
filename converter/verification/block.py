"""One block of GPT-Neo on residual streams: `converter.verification.reference` has the mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from converter.checkpoint import NeoConfig
from converter.verification.activations import Activation

if TYPE_CHECKING:
    from torch import Tensor

Tap = Callable[[int, str, "Tensor"], None]
"""Called with a probe's place, TransformerLens's name of a hook point, and what is there."""
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
    tap: Tap | None = None,
) -> None:
    """Block `layer`, applied to each probe's residual stream in place of it.

    `weights`: by `hooked` name. `divisor`: of the scores; None: they are not divided. `tap`: of all
    hook points but those of the scores, which are never there as a whole.
    """

    def w(name: str) -> Tensor:
        return weights(f"blocks.{layer}.{name}")

    def show(index: int, name: str, value: Tensor) -> None:
        if tap is not None:
            tap(index, f"blocks.{layer}.{name}", value)

    def normed(index: int, name: str, residual: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        x, scale = normalised(residual, config.eps)
        show(index, f"{name}.hook_scale", scale)
        show(index, f"{name}.hook_normalized", x)
        return x * gain + bias

    def attention() -> None:
        n, h, d = config.n_heads, config.d_head, config.d_model
        window = config.window_size if config.attn_types[layer] == "local" else None
        norm = w("ln1.w"), w("ln1.b")
        # [n, d, h] -> [d, n h]: one matrix product for all heads.
        qkv = [
            (x, w(f"attn.W_{x}").permute(1, 0, 2).reshape(d, n * h), w(f"attn.b_{x}"))
            for x in "QKV"
        ]
        output, output_bias = w("attn.W_O").reshape(n * h, d), w("attn.b_O")
        for index, residual in enumerate(residuals):
            show(index, "hook_resid_pre", residual)
            x = normed(index, "ln1", residual, *norm)
            heads = []
            for name, matrix, bias in qkv:
                own = (x @ matrix).view(*x.shape[:2], n, h) + bias
                show(index, f"attn.hook_{name.lower()}", own)
                heads.append(own.transpose(1, 2))
            q, k, v = heads
            z = _attend(q, k, v, masks[index], window, divisor).transpose(1, 2)
            show(index, "attn.hook_z", z)
            out = z.flatten(2) @ output + output_bias
            show(index, "hook_attn_out", out)
            residuals[index] = residual + out

    def mlp() -> None:
        norm = w("ln2.w"), w("ln2.b")
        w_in, b_in, w_out, b_out = w("mlp.W_in"), w("mlp.b_in"), w("mlp.W_out"), w("mlp.b_out")
        for index, residual in enumerate(residuals):
            show(index, "hook_resid_mid", residual)
            before = normed(index, "ln2", residual, *norm) @ w_in + b_in
            show(index, "mlp.hook_pre", before)
            after = activation(before)
            show(index, "mlp.hook_post", after)
            out = after @ w_out + b_out
            del before, after  # the largest there are, but for one probe
            show(index, "hook_mlp_out", out)
            residuals[index] = residual + out
            show(index, "hook_resid_post", residuals[index])

    attention()
    mlp()


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


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of mean 0 and variance 1, before the gain; and what it was divided by for that."""
    x = x - x.mean(-1, keepdim=True)
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x / scale, scale
