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
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from converter.checkpoint import NeoConfig
from converter.dtypes import cast
from converter.verification.activations import activation_named
from converter.verification.block import Tap, apply_block, normalised
from converter.verification.probes import Probe, wholes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.verification.measuring import Errors, Logits

Watch = Callable[[str, list["Tensor"]], None]
_CHUNK_BYTES = 64 * 2**20
_KEPT_BYTES = 2**28
"""Of logits that are kept: four to six hundred positions of GPT-Neo's vocabulary."""


class Source(Protocol):
    """Weights by `hooked` name, in `hooked` axes: a checkpoint, or what one would become."""

    @property
    def config(self) -> NeoConfig: ...

    def tensor(self, key: str) -> np.ndarray: ...


@dataclass(frozen=True)
class _Weights:
    """Reads weights as torch tensors of `dtype`."""

    source: Source
    dtype: torch.dtype
    device: torch.device

    def __call__(self, key: str) -> Tensor:
        return self.widen(self.raw(key))

    def raw(self, key: str) -> np.ndarray:
        return self.source.tensor(key)

    def divisor(self, layer: int) -> float | None:
        """What the layer's scores are divided by, or None."""
        divisors = self.source.config.score_divisors
        return divisors[layer] if divisors else None

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
    wholes: tuple[int, ...]
    """Of which probe each is the beginning; itself, if of none."""
    kept: dict[int, Tensor] | None = None
    """Logits of whole probes; None: none are kept."""

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def source(self) -> Source:
        return self.weights.source

    def itself(self, index: int) -> Errors:
        """See `Truth`."""
        from converter.verification.measuring import measure

        return measure(self, index, [partial(self.at, index)])[0]

    def keeping(self) -> Forward:
        """The same, which computes logits once, as far as there is room for them."""
        return replace(self, kept={})

    def part(self, few: Mapping[int, Probe]) -> Forward:
        """Of some probes, as far as they go; with what is kept of their logits."""
        finals, kept = [], {}
        for place, (index, probe) in enumerate(few.items()):
            batch, length = probe.tokens.shape
            finals.append(self.final[index][:batch, :length])
            of = self.wholes[index]
            if self.kept is not None and of in self.kept:
                logits = self.kept[of].view(*self.final[of].shape[:2], -1)
                kept[place] = logits[:batch, :length].flatten(0, 1)
        wholes = tuple(range(len(few)))
        return replace(
            self, probes=list(few.values()), final=tuple(finals), wholes=wholes, kept=kept
        )

    def logits(self, index: int) -> Tensor:
        """[batch, pos, v] of a probe, in the dtype of the pass."""
        final = self.final[index]
        return self._unembed(final.flatten(0, 1)).view(*final.shape[:2], -1)

    def each(self, index: int, count: int) -> Sequence[Tensor | Logits]:
        """The logits of a probe that is `count` probes of one shape, one under the other, for
        `measure`: of all at once, where there is room for them, since the head is read as often as
        it is applied."""
        size = self.final[index].shape[:2].numel()
        if 8 * size * self.head.shape[1] > _KEPT_BYTES:
            starts = range(0, size, size // count)
            return [partial(self._below, index, start) for start in starts]
        return self.logits(index).chunk(count)

    def _below(self, index: int, start: int, rows: Tensor) -> Tensor:
        return self.at(index, start + rows)

    def rows(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits of a probe's positions, padding left out, in order, some rows at a time.

        Yields the rows' indices into the flattened [batch · pos], and their logits [rows, v].
        """
        import torch

        count = self.final[index].shape[:2].numel()
        mask = self.probes[index].mask
        wanted = torch.arange(count)
        if mask is not None:
            wanted = wanted[torch.from_numpy(mask.reshape(-1).copy())]
        step = max(1, _CHUNK_BYTES // (8 * self.head.shape[1]))
        for chunk in torch.split(wanted, step):
            yield chunk, self.at(index, chunk)

    def at(self, index: int, rows: Tensor) -> Tensor:
        """The logits [rows, v] at these indices into a probe's flattened [batch · pos]."""
        final = self.final[index].flatten(0, 1)
        rows = rows.to(final.device)
        if self.kept is None:
            return self._unembed(final[rows])
        whole = self.wholes[index]
        if whole not in self.kept:
            size = self.final[whole].shape[:2].numel() * self.head.shape[1]
            held = sum(logits.numel() for logits in self.kept.values())
            if 8 * (held + size) > _KEPT_BYTES:
                return self._unembed(final[rows])
            self.kept[whole] = self._unembed(self.final[whole].flatten(0, 1))
        length, longer = self.final[index].shape[1], self.final[whole].shape[1]
        return self.kept[whole][rows // length * longer + rows % length]

    def _unembed(self, final: Tensor) -> Tensor:
        """final [rows, d] -> logits [rows, v], the head widened a block of columns at a time."""
        import torch

        d, v = self.head.shape
        logits = final.new_empty(final.shape[0], v)
        step = max(1, _CHUNK_BYTES // (8 * d))
        for start in range(0, v, step):
            some = slice(start, start + step)
            block = self.weights.widen(self.head[:, some])
            torch.addmm(self.head_bias[some], final, block, out=logits[:, some])
        return logits


def forward(
    source: Source,
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
        tap: told what is at each hook point of each probe; see `apply_block`.
        shared: one pass serves a sequence and those that begin it; not where someone watches.

    Raises:
        ConfigError: an activation that transformers does not know.
    """
    import torch

    config = source.config
    weights = _Weights(source, dtype, torch.device(device))
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
    weights: _Weights,
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
