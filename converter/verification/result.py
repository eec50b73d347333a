"""What a verification found."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from converter.verification.weights import WeightCheck


@dataclass(frozen=True)
class RuntimeInfo:
    """The software that a checkpoint ran in."""

    name: str
    """ "transformers", "transformer_lens" or "neoconvert"."""
    what: str
    version: str
    device: str
    role: str
    """ "original" or "artifact"."""


@dataclass(frozen=True)
class ProbeResult:
    """One probe. Differences are of the artifact's log-probabilities from those of the float64
    reference, since that is what decides; `noise_floor` is the original's own, in float32."""

    name: str
    runtime: str
    """What ran the artifact."""
    max_abs_logprob_diff: float
    mean_abs_logprob_diff: float
    kl: float
    """Mean over positions of KL(original || artifact), in nats."""
    top1_agreement: float
    """Share of positions with the same most likely token, of those where the original's
    lead is above the noise."""
    noise_floor: float
    """The largest |Δ log p| that float32 arithmetic alone gives."""
    ratio: float
    """How many times its floor the artifact's error is: by maximum or by root mean square,
    whichever is larger."""
    compared: int
    """Log-probabilities compared: those that are finite. NaN and infinities must be where the
    original's are."""
    passed: bool
    reason: str | None = None
    """Why it failed."""
    storage_max_abs_logprob_diff: float | None = None
    """What rounding the weights to the artifact's dtype costs, apart from conversion; None
    where they are not rounded."""


@dataclass(frozen=True)
class Divergence:
    """Where artifact and original part: the first unit in forward order, and a tensor of it."""

    unit: str
    tensor: str | None


@dataclass(frozen=True)
class Verification:
    """The verdict with its evidence. `weights` is None, `probes` empty, where not asked for."""

    passed: bool
    runtimes: tuple[RuntimeInfo, ...]
    probes: tuple[ProbeResult, ...]
    weights: WeightCheck | None
    first_divergence: Divergence | None
    max_ratio: float
    problems: tuple[str, ...] = ()
    """Sentences: each thing that made it fail."""

    def summary(self) -> str:
        """A few lines for people."""
        lines = []
        if self.weights is not None:
            w = self.weights
            same = w.compared - len(w.mismatches)
            lines.append(f"weights   {same} of {w.compared} tensors identical, bit for bit")
        if self.probes:
            worst = max(self.probes, key=lambda p: (not p.passed, p.ratio))
            good = sum(p.passed for p in self.probes)
            ran = next((r for r in self.runtimes if r.role == "artifact"), None)
            lines.append(
                f"function  {good} of {len(self.probes)} probes within {self.max_ratio:g} times float32's own noise"
                + (f", run in {ran.what} on {ran.device}" if ran else "")
            )
            lines.append(
                f"          worst: {worst.name}, ratio {worst.ratio:.3g}, max |Δ log p|"
                f" {worst.max_abs_logprob_diff:.2e} (noise {worst.noise_floor:.2e})"
            )
        if self.first_divergence is not None:
            where = self.first_divergence
            lines.append(
                f"diverges  at {where.unit}" + (f": {where.tensor}" if where.tensor else "")
            )
        lines += [f"problem   {problem}" for problem in self.problems]
        lines.append("verified" if self.passed else "NOT VERIFIED")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The documented keys, as plain JSON. A number that is not finite becomes null."""
        where = self.first_divergence
        weights = self.weights
        return {
            "passed": self.passed,
            "max_ratio": self.max_ratio,
            "runtimes": [dataclasses.asdict(r) for r in self.runtimes],
            "probes": [
                {k: _plain(v) for k, v in dataclasses.asdict(p).items()} for p in self.probes
            ],
            "weights": None
            if weights is None
            else {
                "compared": weights.compared,
                "mismatched": list(weights.mismatched),
                "mismatches": [dataclasses.asdict(m) for m in weights.mismatches],
                "config": list(weights.config),
            },
            "first_divergence": None
            if where is None
            else {"unit": where.unit, "tensor": where.tensor},
            "problems": list(self.problems),
        }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
