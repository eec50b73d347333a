"""One run against the reference: errors of each position, and of a probe's all together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converter.verification.exact import Exact, Truth, nll

if TYPE_CHECKING:
    from torch import Tensor

    from converter.verification.judge import Floor

CACHE = 2**17
"""Elements worked on at a time: what a processor's cache holds."""
_EXP = 600.0
"""Beyond it the exponential is not finite."""
Logits = Callable[["Tensor"], "Tensor"]
_COLUMNS = (
    "worst",
    "total",
    "squares",
    "kl",
    "scale",
    "compared",
    "lead",
    "agrees",
    "nll",
    "true_nll",
)


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
    misplaced: bool = False
    """Whether NaN and infinities are elsewhere than in the reference."""
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


@dataclass(frozen=True)
class Rows:
    """The errors of a run at each position that was compared, by index into [batch · pos]."""

    length: int
    """Positions of a sequence."""
    rows: NDArray[np.int64]
    columns: NDArray[np.float64]
    """[rows, _COLUMNS]: the largest |error|, sums over the vocabulary of |error| and its square;
    KL; the largest |logit| or |logsumexp|; how many elements were compared; how far the reference's
    most likely token is ahead, and whether the run agrees; -log p(next token) of both."""
    classes: dict[int, Tensor]
    misplaced: set[int]
    """Rows whose NaN and infinities are elsewhere than the reference's."""

    def part(self, batch: int, length: int) -> Rows:
        """Of the first `batch` sequences, the first `length` positions."""
        row, position = np.divmod(self.rows, self.length)
        wanted = (row < batch) & (position < length)
        rows = row * length + position
        kept = dict(zip(self.rows[wanted].tolist(), rows[wanted].tolist(), strict=True))
        classes = {kept[r]: kinds for r, kinds in self.classes.items() if r in kept}
        misplaced = {kept[r] for r in self.misplaced if r in kept}
        return Rows(length, rows[wanted], self.columns[wanted], classes, misplaced)

    def errors(self, margin: float = 0.0) -> Errors:
        """All positions together. `margin`: see `Errors.top1_agreement`."""
        of = dict(zip(_COLUMNS, self.columns.T, strict=True))
        compared = int(of["compared"].sum())
        n, decisive = max(compared, 1), of["lead"] > margin
        # The last token of a sequence has none that follows.
        followed = self.rows % self.length < self.length - 1
        by_position = np.zeros(self.length)
        np.maximum.at(by_position, self.rows % self.length, of["worst"])
        return Errors(
            max_abs=float(of["worst"].max(initial=0.0)),
            mean_abs=float(of["total"].sum()) / n,
            rms=math.sqrt(float(of["squares"].sum()) / n),
            kl=max(float(of["kl"].sum()) / max(len(self.rows), 1), 0.0),
            top1_agreement=float(of["agrees"][decisive].mean()) if decisive.any() else 1.0,
            scale=float(of["scale"].max(initial=0.0)),
            compared=compared,
            decided=int(decisive.sum()),
            classes=self.classes,
            misplaced=bool(self.misplaced),
            by_position=tuple(by_position.tolist()),
            nll=float(of["nll"][followed].mean()) if followed.any() else math.nan,
            reference_nll=float(of["true_nll"][followed].mean()) if followed.any() else math.nan,
        )


def measure(
    reference: Truth, index: int, runs: Sequence[Tensor | Logits], *, margin: float = 0.0
) -> list[Errors]:
    """Compare runs of probe `index` with the reference: `measure_rows`, put together.

    `margin`: see `Errors.top1_agreement`.
    """
    return [rows.errors(margin) for rows in measure_rows(reference, index, runs)]


def measure_rows(reference: Truth, index: int, runs: Sequence[Tensor | Logits]) -> list[Rows]:
    """Compare runs of probe `index` with the reference, some positions at a time.

    `runs`: a run's logits [batch, pos, v], or a function from indices into the flattened
    [batch · pos] to these rows' logits.
    """
    import torch

    sources = [_rows_of(run) if isinstance(run, torch.Tensor) else run for run in runs]
    tokens = torch.from_numpy(reference.probes[index].tokens)
    tallies = [_Tally() for _ in runs]
    compared = []
    following = tokens.roll(-1, 1)
    following[:, -1] = -1  # the last token has none
    with torch.inference_mode():
        for rows, expected in reference.rows(index):
            found = [source(rows).to(reference.device) for source in sources]
            compared.append(rows)
            if isinstance(expected, Exact):
                for tally, other in zip(tallies, found, strict=True):
                    tally.add(expected, other.to(torch.float64))
                continue
            few = max(1, CACHE // expected.shape[1])
            pieces = zip(*(x.split(few) for x in (rows, expected, *found)), strict=True)  # type: ignore[no-untyped-call]
            for row, logits, *others in pieces:
                exact = Exact.of(row, logits, following.flatten()[row].to(logits.device))
                for tally, other in zip(tallies, others, strict=True):
                    tally.add(exact, other.to(torch.float64))
    every = torch.cat(compared).numpy()
    return [
        Rows(tokens.shape[1], every, np.concatenate(tally.columns), tally.classes, tally.misplaced)
        for tally in tallies
    ]


def _rows_of(logits: Tensor) -> Logits:
    flat = logits.flatten(0, 1)
    return lambda rows: flat[rows.to(flat.device)]


@dataclass
class _Tally:
    """What is known of the positions seen so far."""

    columns: list[NDArray[np.float64]] = field(default_factory=list)
    classes: dict[int, Tensor] = field(default_factory=dict)
    misplaced: set[int] = field(default_factory=set)

    def add(self, exact: Exact, logits: Tensor) -> None:
        """logits: the run's, float64 [rows, v]."""
        import torch

        q = logits - logits.logsumexp(-1, keepdim=True)
        some = q if exact.columns is None else q.gather(-1, exact.columns)
        error = some - exact.logp
        weighted = -exact.p * error
        if exact.weights is not None:
            # With the terms that cancel over the whole vocabulary none is negative, so that some
            # of them speak for all.
            weighted = exact.p * (error.clamp(max=_EXP).expm1() - error) * exact.weights
        compared = torch.full((len(q),), error.shape[1], dtype=torch.float64)
        # Where both are finite, so is their difference; and an infinity makes the sum infinite.
        if not math.isfinite(float((error if exact.weights is None else q).sum())):
            usable = some.isfinite() & exact.logp.isfinite()
            self._note_classes(exact, q)
            error, weighted = error.where(usable, 0.0), weighted.where(usable, 0.0)
            compared = usable.sum(-1).to("cpu", torch.float64)
        error = error.abs()
        # Sums over the vocabulary, of which `compared` elements are all or stand for all.
        share = 1.0 if exact.weights is None else exact.weights * (error.shape[1] / q.shape[1])
        columns = (
            error.amax(-1), (error * share).sum(-1), (error.square() * share).sum(-1),
            weighted.sum(-1), exact.scale, compared, exact.lead, logits.argmax(-1) == exact.top,
            nll(q, exact.following), exact.nll,
        )  # fmt: skip
        stacked = torch.stack([column.to("cpu", torch.float64) for column in columns], -1)
        self.columns.append(stacked.numpy())

    def _note_classes(self, exact: Exact, q: Tensor) -> None:
        import torch

        kinds = _kinds(q)
        for row in kinds.any(-1).nonzero().flatten().tolist():
            self.classes[int(exact.rows[row])] = kinds[row].to("cpu", torch.uint8)
        # Where only some columns are known of the reference, all of it is finite.
        expected = _kinds(exact.logp) if exact.columns is None else 0
        elsewhere = (kinds != expected).any(-1)
        self.misplaced |= set(exact.rows[elsewhere.to(exact.rows.device)].tolist())


def _kinds(values: Tensor) -> Tensor:
    """1 NaN, 2 +inf, 3 -inf, 0 finite."""
    return values.isnan() * 1 + values.isposinf() * 2 + values.isneginf() * 3
