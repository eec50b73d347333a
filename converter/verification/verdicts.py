"""The verdict on one probe in one runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from converter.verification.criterion import Criterion
from converter.verification.judge import Floor
from converter.verification.measuring import Errors
from converter.verification.probes import Probe
from converter.verification.result import ByPosition, Perplexity, ProbeResult


def probe_result(
    probe: Probe,
    runtime: str,
    run: Errors,
    honest: Errors,
    floor: Floor,
    max_ratio: float,
    rounded: Errors | None,
    criterion: Criterion | None = None,
) -> ProbeResult:
    """The verdict on one probe.

    Args:
        honest: a run of the original: where NaN and infinity belong.
        rounded: what rounding the weights does; None where they are not rounded.
        criterion: decides instead of the floor.
    """
    ratio = run.ratio(floor)
    reason = None
    if not run.same_classes(honest):
        reason = "NaN or infinity where the original has none, or the reverse"
    elif criterion is not None:
        reason = criterion.exceeded(run, text=probe.text)
    elif not ratio <= max_ratio:
        reason = f"{ratio:.3g} times float32's own noise, more than {max_ratio:g}"
    texts = (rounded.reference_nll if rounded else run.reference_nll, run.reference_nll, run.nll)
    return ProbeResult(
        name=probe.name,
        runtime=runtime,
        max_abs_logprob_diff=run.max_abs,
        mean_abs_logprob_diff=run.mean_abs,
        kl=run.kl,
        top1_agreement=run.top1_agreement,
        noise_floor=floor.max_abs,
        ratio=ratio,
        compared=run.compared,
        passed=reason is None,
        reason=reason,
        storage_max_abs_logprob_diff=rounded.max_abs if rounded else None,
        storage_kl=rounded.kl if rounded else None,
        storage_top1_agreement=rounded.top1_agreement if rounded else None,
        perplexity=Perplexity(*map(_exp, texts)) if probe.text else None,
        by_position=ByPosition.of(run.by_position, floor.by_position) if run.by_position else None,
    )


def of_other_weights(result: ProbeResult, max_ratio: float) -> ProbeResult:
    """What the stored weights do is no cost of rounding where they are not the original's."""
    off = result.storage_max_abs_logprob_diff
    if off is None or not result.passed or off <= max_ratio * result.noise_floor:
        return result
    return replace(
        result,
        max_abs_logprob_diff=off,
        kl=result.storage_kl or 0.0,
        top1_agreement=result.storage_top1_agreement or 0.0,
        ratio=off / result.noise_floor if result.noise_floor else math.inf,
        passed=False,
        reason=f"the weights that are stored compute something else, by {off:.3g}",
        storage_max_abs_logprob_diff=None,
        storage_kl=None,
        storage_top1_agreement=None,
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def failures(results: Sequence[ProbeResult]) -> str | None:
    """One sentence for all probes that one runtime failed."""
    off = [r for r in results if not r.passed]
    if not off:
        return None
    worst = max(off, key=lambda r: r.ratio)
    return (
        f"{len(off)} of {len(results)} probes failed in {worst.runtime}, first {off[0].name!r}:"
        f" {off[0].reason}"
        + (f"; worst {worst.name!r}: {worst.reason}." if worst is not off[0] else ".")
    )
