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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from converter.verification.activations import activation_named
from converter.verification.block import Tap, apply_block, normalised
from converter.verification.logits import Forward, Tensors, TorchWeights
from converter.verification.probes import Probe, wholes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Watch = Callable[[str, list["Tensor"]], None]


def forward(
    source: Tensors,
    probes: Sequence[Probe],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    jitter: Sequence[int | None] | None = None,
    watch: Watch | None = None,
    tap: Tap | None = None,
    shared: bool = True,
) -> Forward:
    """Run all probes through the model; every weight is read once.

    Args:
        dtype: torch.float64 or torch.float32, of weights and of all arithmetic.
        jitter: for each probe None or a seed: the embeddings' last bits are then moved, which
            shows how the model amplifies rounding.
        watch: called with ("embed" | "block i" | "final", residual streams) after each unit. It
            may put other streams into the list, with which the next unit goes on.
        tap: called with what is at each hook point of each probe; see `apply_block`.
        shared: one pass serves a sequence and those that begin it; not where someone watches.

    Raises:
        ConfigError: an activation that transformers does not know.
    """
    import torch

    config = source.config
    weights = TorchWeights(source, dtype, torch.device(device))
    activation = activation_named(config.act_fn, dtype)
    every, whole = probes, list(range(len(probes)))
    if shared and watch is None and tap is None:
        whole = _wholes(probes, jitter)
    run = sorted(set(whole))
    probes = [every[i] for i in run]
    all_jitter, jitter = jitter, None if jitter is None else [jitter[i] for i in run]
    with torch.inference_mode():
        masks = [
            None if p.mask is None else torch.from_numpy(p.mask).to(weights.device) for p in probes
        ]
        residuals = _embed(weights, probes, jitter, tap)
        if watch:
            watch("embed", residuals)
        for layer in range(config.n_layers):
            divisor = weights.divisor(layer)
            apply_block(weights, config, layer, divisor, residuals, masks, activation, tap)
            if watch:
                watch(f"block {layer}", residuals)
        gain, shift = weights("ln_final.w"), weights("ln_final.b")
        final = []
        for index, residual in enumerate(residuals):
            x, scale = normalised(residual, config.eps)
            if tap:
                tap(index, "ln_final.hook_scale", scale)
                tap(index, "ln_final.hook_normalized", x)
            final.append(x * gain + shift)
        if watch:
            watch("final", final)
        if len(run) < len(every) and not all(bool(f.isfinite().all()) for f in final):
            # 0 · NaN is NaN: what is behind a position does change it.
            return forward(
                source, every, dtype=dtype, device=device, jitter=all_jitter, shared=False
            )
        ends = (
            final[run.index(of)][: p.tokens.shape[0], : p.tokens.shape[1]]
            for p, of in zip(every, whole, strict=True)
        )
        head, bias = weights.raw("unembed.W_U"), weights("unembed.b_U")
        return Forward(every, tuple(ends), weights, head, bias, tuple(whole))


def _wholes(probes: Sequence[Probe], jitter: Sequence[int | None] | None) -> list[int]:
    """Which probe's pass serves each: one with the same jitter."""
    if jitter is None:
        return wholes(probes)
    found = [0] * len(probes)
    for seed in set(jitter):
        same = [i for i, s in enumerate(jitter) if s == seed]
        for i, of in zip(same, wholes([probes[i] for i in same]), strict=True):
            found[i] = same[of]
    return found


def _embed(
    weights: TorchWeights,
    probes: Sequence[Probe],
    jitter: Sequence[int | None] | None,
    tap: Tap | None,
) -> list[Tensor]:
    """W_E[token] + W_pos[position]: [batch, pos, d] for each probe."""
    tokens, positions = weights.raw("embed.W_E"), weights.raw("pos_embed.W_pos")
    residuals = []
    for index, probe in enumerate(probes):
        own, place = weights.widen(tokens[probe.tokens]), weights.widen(positions[probe.positions])
        if tap:
            tap(index, "hook_embed", own)
            tap(index, "hook_pos_embed", place)
        seed = None if jitter is None else jitter[index]
        residuals.append(own + place if seed is None else _jittered(own + place, seed))
    return residuals


def _jittered(residual: Tensor, seed: int) -> Tensor:
    """Each element moved one unit in the last place, up or down at random."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    up = torch.rand(residual.shape, generator=generator) < 0.5
    toward = torch.where(up, math.inf, -math.inf).to(residual)
    return torch.nextafter(residual, toward)
