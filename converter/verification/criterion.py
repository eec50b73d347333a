"""A criterion that a user states for artifacts that are lossy on purpose: quantised ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from converter.errors import UsageError
from converter.verification.measuring import Errors

STATE_IT = "--max-kl 0.1 --min-top1 0.9"


@dataclass(frozen=True)
class Criterion:
    """Limits to what an artifact may be off. None: no limit."""

    max_kl: float | None = None
    """Of every probe's mean KL(original || artifact), in nats."""
    min_top1: float | None = None
    """Of the share of positions with the same most likely token, over all probes. A probe alone is
    a small sample: it may miss this by two standard deviations, or by less than one position."""
    max_perplexity_ratio: float | None = None
    """Of the artifact's perplexity over the original's, on every text."""

    @staticmethod
    def of(
        max_kl: float | None, min_top1: float | None, max_perplexity_ratio: float | None
    ) -> Criterion | None:
        """None where no limit is stated.

        Raises:
            UsageError: a limit that cannot be one.
        """
        stated = (
            ("--max-kl", max_kl, math.inf, "a number of nats, 0 or more"),
            ("--min-top1", min_top1, 1.0, "a share, from 0 to 1"),
            ("--max-perplexity-ratio", max_perplexity_ratio, math.inf, "a number, such as 1.05"),
        )
        for where, value, most, kind in stated:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= most and value < math.inf):
                raise UsageError(f"{value} is no limit.", where=where, do=f"Give {kind}.")
        if max_kl is None and min_top1 is None:
            if max_perplexity_ratio is None:
                return None
            raise UsageError(
                "Perplexity is of texts alone, and would leave most probes without a limit.",
                where="--max-perplexity-ratio",
                do=f"State another limit too, such as {STATE_IT}, and give a text with --text TEXT.",
            )
        return Criterion(max_kl, min_top1, max_perplexity_ratio)

    def __str__(self) -> str:
        limits = (
            ("KL ≤ ", self.max_kl),
            ("top-1 ≥ ", self.min_top1),
            ("perplexity ratio ≤ ", self.max_perplexity_ratio),
        )
        return ", ".join(f"{name}{limit:g}" for name, limit in limits if limit is not None)

    def spares(self, top1_agreement: float) -> bool:
        """Of a probe that was let pass: whether chance alone lets it."""
        return self.min_top1 is not None and top1_agreement < self.min_top1

    def exceeded(self, run: Errors, *, text: bool) -> str | None:
        """Why a probe is not within the limits; None where it is."""
        if self.max_kl is not None and not run.kl <= self.max_kl:
            return f"KL {run.kl:.3g}, more than {self.max_kl:g}"
        if self.min_top1 is not None:
            beyond = (self.min_top1 - run.top1_agreement) * run.decided
            deviation = math.sqrt(run.decided * self.min_top1 * (1 - self.min_top1))
            if beyond >= max(1.0, 2 * deviation) - 1e-9:
                return f"top-1 {run.top1_agreement:.1%}, less than {self.min_top1:.1%}"
        if self.max_perplexity_ratio is not None and text:
            ratio = _exp(run.nll - run.reference_nll)
            if not ratio <= self.max_perplexity_ratio:
                return f"perplexity {ratio:.4g} times the original's, more than {self.max_perplexity_ratio:g}"
        return None

    def exceeded_by_all(self, runs: Sequence[Errors], texts: int) -> list[str]:
        """What the probes of one runtime show together, as sentences."""
        problems = []
        if self.min_top1 is not None:
            decided = sum(run.decided for run in runs)
            agreed = sum(run.top1_agreement * run.decided for run in runs)
            if not decided:
                problems.append("The original nowhere has one most likely token to agree with.")
            elif agreed < self.min_top1 * decided - 1e-6:
                problems.append(
                    f"top-1 agreement over all probes is {agreed / decided:.1%}, less than"
                    f" {self.min_top1:.1%}."
                )
        if self.max_perplexity_ratio is not None and not texts:
            problems.append("There is no text whose perplexity could be compared; give --text.")
        return problems


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0)) if not math.isnan(value) else math.nan
