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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from converter.verification.reference import Forward

if TYPE_CHECKING:
    from torch import Tensor

MAX_RATIO = 8.0
"""How many times float32's own noise an honest artifact may be off.

Measured on 240 honest conversions of random and ill-conditioned models under either
TransformerLens, 3,900 probes (scripts/honest): 99 in 100 are below 2.1, the worst is at 5.1.
(With the original's one run as the floor, a few in a thousand would exceed 18.) Of the faults that
change the function (scripts/faults), the faintest, another epsilon, is at 30; a lost window, swapped
heads, a shifted position or a dropped bias are at ten thousand to several million.
"""
_CACHE = 2**17
"""Elements worked on at a time: what a processor's cache holds."""
Rows = Callable[["Tensor"], "Tensor"]
ULP = 2.0**-23
"""float32's unit in the last place, relative."""


@dataclass(frozen=True)
class Floor:
    """What float32 arithmetic alone costs the original on a probe."""

    max_abs: float
    rms: float
    by_position: tuple[float, ...] = ()


@dataclass(frozen=True)
class Errors:
    """One run against the reference on one probe. Only elements finite in both are in the numbers."""

    max_abs: float
    mean_abs: float
    rms: float
    kl: float
    """Mean over positions of KL(reference || run), in nats."""
    top1_agreement: float
    """Over the `decided` positions; 1 where there is none."""
    scale: float
    """Largest |logit| or |logsumexp| of the reference: float32 rounds in proportion to it."""
    compared: int
    """Elements compared."""
    decided: int = 0
    """Positions where the reference's lead exceeds the margin."""
    classes: dict[int, Tensor] = field(default_factory=dict)
    """Rows with a log-probability that is not finite -> 1 NaN, 2 +inf, 3 -inf, 0 finite [v]."""
    by_position: tuple[float, ...] = ()
    """The largest error at each position, over the batch."""
    nll: float = math.nan
    """Mean of -log p(next token), in nats: the run's. Its exponential is the perplexity."""
    reference_nll: float = math.nan

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


def measure(
    reference: Forward, index: int, runs: Sequence[Tensor | Rows], *, margin: float = 0.0
) -> list[Errors]:
    """Compare runs of probe `index` with the reference, some positions at a time.

    `runs`: a run's logits [batch, pos, v], or a function from indices into the flattened
    [batch · pos] to these rows' logits. `margin`: see `Errors.top1_agreement`.
    """
    import torch

    sources = [_rows_of(run) if isinstance(run, torch.Tensor) else run for run in runs]
    tokens = torch.from_numpy(reference.probes[index].tokens)
    tallies = [_Tally(margin, tokens.shape[1]) for _ in runs]
    following = tokens.roll(-1, 1)
    following[:, -1] = -1  # the last token has none
    with torch.inference_mode():
        for rows, expected in reference.rows(index):
            found = [source(rows).to(expected.device) for source in sources]
            few = max(1, _CACHE // expected.shape[1])
            pieces = zip(*(x.split(few) for x in (rows, expected, *found)), strict=True)  # type: ignore[no-untyped-call]
            for row, logits, *others in pieces:
                exact = _Exact.of(row, logits, following.flatten()[row].to(logits.device))
                for tally, other in zip(tallies, others, strict=True):
                    tally.add(exact, other.to(torch.float64))
    return [tally.errors() for tally in tallies]


def _rows_of(logits: Tensor) -> Rows:
    flat = logits.flatten(0, 1)
    return lambda rows: flat[rows.to(flat.device)]


@dataclass(frozen=True)
class _Exact:
    """Some rows of the reference: log-probabilities [rows, v] and what is derived from them."""

    rows: Tensor
    logp: Tensor
    p: Tensor
    scale: float
    """Largest |logit| or |logsumexp|."""
    top: Tensor
    lead: Tensor
    """How far the most likely token is ahead of the next."""
    following: Tensor
    """The token that comes next, or -1 [rows]."""

    @staticmethod
    def of(rows: Tensor, logits: Tensor, following: Tensor) -> _Exact:
        import torch

        normaliser = logits.logsumexp(-1, keepdim=True)
        logp = logits - normaliser
        sizes = torch.stack([logits.amax(-1), logits.amin(-1), normaliser[:, 0]])
        best, top = logp.max(-1)
        rest = logp.scatter(-1, top[:, None], -math.inf).amax(-1)
        return _Exact(
            rows=rows,
            logp=logp,
            p=logp.exp(),
            scale=_largest(sizes[sizes.isfinite()]),
            top=top,
            lead=best - rest,
            following=following,
        )

    def nll(self, logp: Tensor) -> float:
        """Sum of -log p(next token) over the rows that have one."""
        known = self.following >= 0
        return -float(logp[known].gather(-1, self.following[known, None]).sum())


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


@dataclass
class _Tally:
    """Sums over the positions seen so far."""

    margin: float
    length: int
    """Positions of a sequence."""
    max_abs: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    kl: float = 0.0
    scale: float = 0.0
    compared: int = 0
    positions: int = 0
    decided: int = 0
    agreed: int = 0
    followed: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    by_position: list[float] = field(default_factory=list)
    classes: dict[int, Tensor] = field(default_factory=dict)

    def add(self, exact: _Exact, logits: Tensor) -> None:
        """logits: the run's, float64 [rows, v]."""
        q = logits - logits.logsumexp(-1, keepdim=True)
        error = q - exact.logp
        weighted = exact.p * error
        # Where both are finite, so is their difference; and an infinity makes the sum infinite.
        if not math.isfinite(float(error.sum())):
            usable = q.isfinite() & exact.logp.isfinite()
            self._note_classes(exact.rows, q)
            error, weighted = error.where(usable, 0.0), weighted.where(usable, 0.0)
            self.compared += int(usable.sum())
        else:
            self.compared += error.numel()
        self.kl -= float(weighted.sum())
        error = error.abs()
        self._note_positions(exact.rows, error)
        self.max_abs = max(self.max_abs, *self.by_position)
        self.total += float(error.sum())
        self.squares += float(error.square().sum())
        self.scale = max(self.scale, exact.scale)
        self.positions += len(exact.rows)
        decisive = exact.lead > self.margin
        self.decided += int(decisive.sum())
        self.agreed += int((decisive & (logits.argmax(-1) == exact.top)).sum())
        self.followed += int((exact.following >= 0).sum())
        self.nll += exact.nll(q)
        self.reference_nll += exact.nll(exact.logp)

    def _note_positions(self, rows: Tensor, error: Tensor) -> None:
        self.by_position = self.by_position or [0.0] * self.length
        for row, largest in zip(rows.tolist(), error.amax(-1).tolist(), strict=True):
            position = row % self.length
            self.by_position[position] = max(self.by_position[position], largest)

    def _note_classes(self, rows: Tensor, q: Tensor) -> None:
        import torch

        for row in (~q.isfinite()).any(-1).nonzero().flatten().tolist():
            kinds = q[row].isnan() * 1 + q[row].isposinf() * 2 + q[row].isneginf() * 3
            self.classes[int(rows[row])] = kinds.to("cpu", torch.uint8)

    def errors(self) -> Errors:
        n = max(self.compared, 1)
        return Errors(
            max_abs=self.max_abs,
            mean_abs=self.total / n,
            rms=math.sqrt(self.squares / n),
            kl=max(self.kl / max(self.positions, 1), 0.0),
            top1_agreement=self.agreed / self.decided if self.decided else 1.0,
            scale=self.scale,
            compared=self.compared,
            decided=self.decided,
            classes=self.classes,
            by_position=tuple(self.by_position),
            nll=self.nll / self.followed if self.followed else math.nan,
            reference_nll=self.reference_nll / self.followed if self.followed else math.nan,
        )


def pooled_floor(runs: Sequence[Errors], *, ulp: float = ULP) -> Floor:
    """The floor that several runs of the original show together, whose unit in the last place
    is `ulp`."""
    scale = max(run.scale for run in runs)
    positions = (max(errors) for errors in zip(*(run.by_position for run in runs), strict=True))
    return Floor(
        by_position=tuple(max(error, 2 * ulp * scale) for error in positions),
        # Logit and normaliser are each rounded by up to half a unit, in either run.
        max_abs=max(*(run.max_abs for run in runs), 2 * ulp * scale),
        rms=max(math.sqrt(sum(run.rms**2 for run in runs) / len(runs)), ulp * scale),
    )
