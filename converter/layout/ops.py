"""What a row of the layout table does to a tensor, and its inverse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from converter.piecewise import Piecewise

Sizes = Mapping[str, int]
"""Length of each named axis: v vocabulary, c context, d model, n heads, h head, f MLP."""


def axes(pattern: str) -> list[list[str]]:
    """`"(n h) d"` -> `[["n", "h"], ["d"]]`: the einops pattern, one list per dimension."""
    dimensions: list[list[str]] = []
    group: list[str] | None = None
    for token in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
            dimensions.append(group)
        elif token == ")":
            group = None
        elif group is None:
            dimensions.append([token])
        else:
            group.append(token)
    return dimensions


def shape(pattern: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that an einops pattern has with these axis sizes."""
    return tuple(math.prod(sizes[a] for a in dim) for dim in axes(pattern))


@dataclass(frozen=True)
class Rearrange:
    """An einops pattern; read backwards, it is its inverse, bit for bit. Moves, never computes."""

    before: str
    after: str

    def apply(self, tensor: np.ndarray, sizes: Sizes) -> np.ndarray:
        if self.before == self.after:
            return tensor
        used = {a: sizes[a] for dim in axes(self.before) for a in dim}
        if isinstance(tensor, Piecewise):
            return self._piecewise(tensor, used)
        result: np.ndarray = rearrange(tensor, f"{self.before} -> {self.after}", **used)
        return result

    def _piecewise(self, tensor: Any, used: dict[str, int]) -> Any:
        """Rows of the result from what they have of the axis that varies slowest."""
        (slowest, *inner), *_ = axes(self.after)
        source, target = shape(self.before, used), shape(self.after, used)
        place = axes(self.before).index([slowest])
        rows = math.prod(used[axis] for axis in inner)

        def compute(index: tuple[Any, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(target[0])
            first, last = start // rows, -(-stop // rows)
            part = [slice(None)] * len(source)
            part[place] = slice(first, last)
            piece = self.apply(tensor[tuple(part)], used | {slowest: last - first})
            result: np.ndarray = piece[start - first * rows : stop - first * rows]
            return result[(slice(None), *index[1:])]

        return Piecewise(target, tensor.dtype, compute, rows)

    @property
    def inverse(self) -> Rearrange:
        return Rearrange(self.after, self.before)
