"""What an adapter does to one tensor: float64 in Hugging Face's axes, in and out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.float64]
Read = Callable[[], Wide]
"""Reads one of the adapter's tensors, widened."""
_ROWS_BYTES = 32 * 2**20


class Change(ABC):
    """One change of a weight or bias. Several are applied one after another."""

    @abstractmethod
    def apply(self, base: Wide) -> Wide:
        """The changed tensor; `base` may be written over."""


@dataclass(frozen=True)
class Replacement(Change):
    """The adapter has the whole tensor."""

    tensor: Read

    def apply(self, base: Wide) -> Wide:
        return self.tensor()


@dataclass(frozen=True)
class LowRank(Change):
    """W + scale · L R; with a magnitude (DoRA), each slice of it rescaled to that length.

    LoRA's factors are A [r, in] and B [out, r] for a linear layer, whose weight is [out, in]:
    L = B, R = A. For an embedding [n, d] they are A [r, n] and B [d, r]: L = Aᵀ, R = Bᵀ.
    """

    left: Read
    """[rows, r]"""
    right: Read
    """[r, columns]"""
    scale: float
    magnitude: Read | None = None
    along: int = 1
    """DoRA: the axis that lengths are taken along. A linear layer's rows have a magnitude each; of
    an embedding, the columns."""

    def apply(self, base: Wide) -> Wide:
        left, right = self.left(), np.ascontiguousarray(self.right())
        step = max(1, _ROWS_BYTES // (8 * base.shape[1]))
        for start in range(0, base.shape[0], step):  # the update is never whole in memory
            rows = slice(start, start + step)
            base[rows] += self.scale * (np.ascontiguousarray(left[rows]) @ right)
        if self.magnitude is not None:
            length = np.sqrt(np.einsum("ij,ij->i" if self.along else "ij,ij->j", base, base))
            base *= np.expand_dims(self.magnitude() / length, self.along)
        return base


@dataclass(frozen=True)
class Shift(Change):
    """b + scale · (the bias of B)."""

    bias: Read
    scale: float

    def apply(self, base: Wide) -> Wide:
        result: Wide = base + self.scale * self.bias()
        return result
