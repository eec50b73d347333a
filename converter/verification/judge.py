"""Is a run as close to the original as float32 allows? The noise floor and the verdict.

The error of a run on a probe is its log-probabilities minus those of the float64 reference,
both normalised in float64 from the run's logits. Two statistics of it are judged: the largest
|error|, which sees one wrong element, and the root mean square, which sees a small error
everywhere. Each is divided by its noise floor; the larger quotient is the probe's `ratio`.

The floor is what float32 arithmetic alone costs the *original*: its run in its own software,
pooled with runs of our own forward whose embeddings were moved by one unit in the last place.
One run alone would not do. In an ill-conditioned model rounding is amplified along few
directions, so that the error of a run is like |g| times a constant, g normal: the quotient of
two such has a Cauchy tail and exceeds 10 once in 16 times. Pooling several draws tames it.
The floor is never below the rounding of the logits themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converter.verification.reference import Forward

if TYPE_CHECKING:
    from torch import Tensor

ULP = 2.0**-23
"""float32's unit in the last place, relative."""


@dataclass(frozen=True)
class Floor:
    """What float32 arithmetic alone costs the original on a probe."""

    max_abs: float
    rms: float


@dataclass(frozen=True)
class Errors:
    """One run against the reference on one probe. Only elements finite in both are in the numbers."""

    max_abs: float
    mean_abs: float
    rms: float
    kl: float
    """Mean over positions of KL(reference || run), in nats."""
    top1_agreement: float
    """Over positions where the reference's lead exceeds the margin; 1 where there is none."""
    scale: float
    """Largest |logit| or |logsumexp| of the reference: float32 rounds in proportion to it."""
    compared: int
    """Elements compared."""
    classes: dict[int, Tensor] = field(default_factory=dict)
    """Rows with a log-probability that is not finite -> 1 NaN, 2 +inf, 3 -inf, 0 finite [v]."""

    def ratio(self, floor: Floor) -> float:
        return max(_quotient(self.max_abs, floor.max_abs), _quotient(self.rms, floor.rms))

    def same_classes(self, other: Errors) -> bool:
        """Whether NaN and infinities are in the same places."""
        return self.classes.keys() == other.classes.keys() and all(
            bool((mine == other.classes[row]).all()) for row, mine in self.classes.items()
        )


def _quotient(error: float, floor: float) -> float:
    if error == 0:
        return 0.0
    return error / floor if floor else math.inf


def measure(reference: Forward, index: int, logits: Tensor, *, margin: float = 0.0) -> Errors:
    """Compare a run's logits [batch, pos, v] on probe `index` with the reference."""
    import torch

    flat = logits.flatten(0, 1)
    classes: dict[int, Tensor] = {}
    largest = total = squares = kl = scale = 0.0
    compared = positions = decided = agreed = 0
    with torch.inference_mode():
        for rows, expected in reference.rows(index):
            normaliser = expected.logsumexp(-1, keepdim=True)
            run = flat[rows.to(flat.device)].to(expected.device, torch.float64)
            p, q = expected - normaliser, run.log_softmax(-1)
            bad = ~q.isfinite()
            for row in bad.any(-1).nonzero().flatten().tolist():
                kinds = q[row].isnan() * 1 + q[row].isposinf() * 2 + q[row].isneginf() * 3
                classes[int(rows[row])] = kinds.to("cpu", torch.uint8)
            usable = p.isfinite() & ~bad
            error = torch.where(usable, q - p, 0.0)
            size = error.abs()
            largest = max(largest, float(size.max()))
            total += float(size.sum())
            squares += float(size.square().sum())
            compared += int(usable.sum())
            kl += float(-(torch.where(usable, p, -math.inf).exp() * error).sum())
            for part in (torch.where(usable, expected, 0.0), normaliser):
                scale = max(scale, float(part.nan_to_num(0, 0, 0).abs().max()))
            positions += len(rows)
            lead = p.topk(min(2, p.shape[-1]), -1)
            decisive = lead.values[:, 0] - lead.values[:, -1] > margin
            decided += int(decisive.sum())
            agreed += int((decisive & (q.argmax(-1) == lead.indices[:, 0])).sum())
    n = max(compared, 1)
    return Errors(
        max_abs=largest,
        mean_abs=total / n,
        rms=math.sqrt(squares / n),
        kl=max(kl / max(positions, 1), 0.0),
        top1_agreement=agreed / decided if decided else 1.0,
        scale=scale,
        compared=compared,
        classes=classes,
    )


def pooled_floor(runs: Sequence[Errors]) -> Floor:
    """The floor that several float32 runs of the original show together."""
    scale = max(run.scale for run in runs)
    return Floor(
        # Logit and normaliser are each rounded by up to half a unit, in either run.
        max_abs=max(*(run.max_abs for run in runs), 2 * ULP * scale),
        rms=max(math.sqrt(sum(run.rms**2 for run in runs) / len(runs)), ULP * scale),
    )
