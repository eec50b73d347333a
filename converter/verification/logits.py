"""What a forward pass comes to: its logits, which are computed when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from converter.checkpoint import NeoConfig
from converter.dtypes import cast
from converter.verification.probes import Probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.verification.measuring import Logits

_CHUNK_BYTES = 64 * 2**20
_KEPT_BYTES = 2**28
"""Of logits that are kept: four to six hundred positions of GPT-Neo's vocabulary."""


class Tensors(Protocol):
    """Weights by `hooked` name, in `hooked` axes: a checkpoint, or what one would become."""

    @property
    def config(self) -> NeoConfig: ...

    def tensor(self, key: str) -> np.ndarray: ...


@dataclass(frozen=True)
class TorchWeights:
    """Reads weights as torch tensors of `dtype`."""

    source: Tensors
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
    weights: TorchWeights
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
    def source(self) -> Tensors:
        return self.weights.source

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
