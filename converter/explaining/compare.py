"""Two operands side by side: how much of one the other accounts for, and where it does not.

The tolerance of an element, with the magnitudes of `operand`:

    NOISE·u32·magnitude                  float32 arithmetic, as TransformerLens's is
  + u·magnitude, for each side that is a *product* of steps: it was rounded to its storage dtype

A side that no step was undone on is the source itself, and has no error of its own. Where more
than a few elements of a matrix disagree by little more than that, everywhere, the steps were
computed in the storage dtype (TransformerLens 2 did so in float16 and bfloat16), or the
original itself is a rounded copy: then COARSE roundings of storage are allowed, here and from
here on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from converter.explaining.operand import Operand, parts
from converter.processing.step import FLOAT32, Array, Rounding

NOISE = 4.0
"""Roundings of float32 for each magnitude. TransformerLens 3.9 and 4.3 need 1.1 at most: measured
on the demo model and random ones of d_model 64 and 768, with gains over one and six decades."""
COARSE = 2.0
"""Roundings of the wider-rounding dtype. ProcessWeights run in float16 and bfloat16 needs 1.1."""
FEW = 1 / 16
"""The same for the elements of a vector."""
_CAST = 0.25
"""A cast changes more of a tensor's elements than this."""
_SAMPLES = 64
_FLOAT16 = Rounding.of("F16")
_SPREAD = 0.5
"""The part of a matrix's rows that noise of storage reaches; an edit reaches few."""


@dataclass(frozen=True)
class Match:
    """What is left of a tensor after the steps. Energies are sums of squares."""

    cells: int
    failing: int
    """Cells that differ by more than rounding."""
    residual: float
    """The largest difference left."""
    energy: float
    """Of all differences."""
    scale: float
    """Of the converted tensor."""
    others: Array
    """Energy of the failing cells for each index of the axes other than d_model, flattened."""
    channels: Array
    """The same for each index of d_model; empty where the tensor has no such axis."""
    samples: tuple[Array, Array] | None = None
    """A few elements of both sides, at the same places."""
    strict: float | None = None
    """The share of a vector's cells that fail without the tolerance of coarse rounding, which
    was granted for what the vector alone shows."""
    product: str | None = None
    """What was compared instead of the tensor: a product in which the heads' basis cancels.
    The cells are then the product's rows or columns, and `residual` is relative to its norm."""

    @property
    def agrees(self) -> bool:
        return self.failing == 0

    def vanished(self, before: Match) -> bool:
        """Nothing is left, and not for a larger tolerance's sake."""
        return self.agrees and (before.agrees or self.relative <= before.relative / 4)

    @property
    def share(self) -> float:
        """Of the cells that fail."""
        return self.failing / self.cells

    @property
    def relative(self) -> float:
        """The size of what is left beside the tensor's own."""
        return float(np.sqrt(self.energy / self.scale)) if self.scale else float(self.energy > 0)


def roundings(left: Operand, right: Operand) -> tuple[float, float]:
    """How many roundings of its storage each side carries."""
    if not left.moved and not right.moved:
        if left.unpacked or right.unpacked:
            return 1.0, 1.0
        narrow_left = left.rounding.relative > right.rounding.relative
        return float(narrow_left), float(not narrow_left)
    return float(right.moved or left.unpacked), float(left.moved or right.unpacked)


def noise(x: Operand) -> float:
    """The tolerance of something that was rounded to storage after float32 arithmetic, for each
    magnitude."""
    return x.rounding.relative + NOISE * FLOAT32.relative


@dataclass
class Comparer:
    """Compares, and remembers having met steps that were computed in the storage dtype."""

    coarse: bool = False
    frozen: bool = False
    """Does not begin to be coarse: a proof is no place for it."""

    def proof(self) -> Comparer:
        return replace(self, frozen=True)

    def __call__(self, left: Operand, right: Operand, d_axis: int | None) -> Match:
        derived = left.moved or right.moved or left.unpacked or right.unpacked
        weights, looser = roundings(left, right), (COARSE, COARSE) if derived else (1.0, 1.0)
        if not derived:
            # A cast shows nearly everywhere, an edit does not; and widening is exact.
            single = FLOAT32 == left.rounding == right.rounding
            match = _compare(_with_floor(left) if single else left, right, d_axis, (0.0, 0.0))
            if match.share <= _CAST or left.rounding == right.rounding:
                return match
        match = _compare(left, right, d_axis, weights)
        if match.agrees or FLOAT32 == left.rounding == right.rounding:
            return match
        matrix = match.channels.size > 1 and match.others.size > 1
        if self.coarse or (not self.frozen and _widespread(match, matrix)):
            loose = _compare(left, right, d_axis, looser, coarse=derived)
            if loose.agrees or (matrix and loose.share < match.share / 4):
                self.coarse = self.coarse or matrix
                return loose if self.coarse else replace(loose, strict=match.share)
        return match


def _widespread(match: Match, matrix: bool) -> bool:
    """Noise reaches most rows and most columns; an edited row or LayerNorm channel does not."""
    if not matrix:
        return match.share > FEW
    return bool(min((match.others > 0).mean(), (match.channels > 0).mean()) > _SPREAD)


def _with_floor(x: Operand) -> Operand:
    """With the magnitude that its making may have had, where two made it from a third.

    Means and sums of products were larger than what is left of them: for a matrix, as large as
    its rows and columns; for a bias, a sum over d_model, by about the square root of its size.
    """
    last = x.total(-1) / x.value.shape[-1]
    if x.value.ndim == 1:
        return replace(x, floors=(*x.floors, last * np.sqrt(x.value.size)))
    before = x.total(-2) / x.value.shape[-2]
    return replace(x, floors=(*x.floors, 2 * last, 2 * before))


def _compare(
    left: Operand,
    right: Operand,
    d_axis: int | None,
    weights: tuple[float, float],
    *,
    coarse: bool = False,
) -> Match:
    shape = left.value.shape
    units = [left.rounding.relative, right.rounding.relative]
    units = [max(units)] * 2 if coarse else units
    per_cell = [w * u + NOISE * FLOAT32.relative for w, u in zip(weights, units, strict=True)]
    failing, worst, energy, scale = 0, 0.0, 0.0, 0.0
    others = np.zeros(shape if d_axis is None else np.delete(shape, d_axis))
    channels = np.zeros(0 if d_axis is None else shape[d_axis])
    for part in parts(left.value):
        a, b = left.value[part], right.value[part]
        with np.errstate(all="ignore"):
            gap = np.abs(a - b)
            gap[(a == b) | (np.isnan(a) & np.isnan(b)) | _overflown(a, b, right)] = 0
            if right.finest > left.finest:  # what is small was rounded, whatever digits it had
                gap[(gap <= right.finest) & (np.abs(a) < right.finest / _FLOAT16.relative)] = 0
            gap[np.isnan(gap)] = np.inf
            bound = per_cell[0] * left.magnitude(part) + per_cell[1] * right.magnitude(part)
            bad = ~(gap <= bound)
            squares = np.minimum(gap, 1e150) ** 2
            scale += float((np.clip(np.nan_to_num(b), -1e150, 1e150) ** 2).sum())
        failing += int(bad.sum())
        worst = max(worst, float(gap.max(initial=0)))
        energy += float(squares.sum())
        squares *= bad
        if d_axis is None:
            others[part] = squares
        elif d_axis % len(shape) == 0:
            channels[part] = squares.sum(tuple(range(1, len(shape))))
            others += squares.sum(0)
        else:
            rest = tuple(i for i in range(len(shape)) if i != d_axis % len(shape))
            channels += squares.sum(rest)
            others[part] = squares.sum(d_axis)
    places = np.linspace(0, left.value.size - 1, min(left.value.size, _SAMPLES)).astype(np.int64)
    samples = (left.value.flat[places], right.value.flat[places])
    return Match(
        left.value.size, failing, worst, energy, scale, np.ravel(others), channels, samples
    )


def _overflown(a: Array, b: Array, right: Operand) -> NDArray[np.bool_]:
    """Infinite in storage, and too large for it before."""
    result: NDArray[np.bool_] = (
        np.isinf(b) & (np.sign(a) == np.sign(b)) & (np.abs(a) > right.largest)
    )
    return result
