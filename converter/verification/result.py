"""What a verification found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converter.layout import ALSO_HEAD, HEAD, is_tied_head
from converter.verification.criterion import Criterion
from converter.verification.evidence import Evidence
from converter.verification.reach import Reach
from converter.verification.weights import WeightCheck

MAX_BINS = 256
"""Bins of positions in a result: more than a plot has room for."""


@dataclass(frozen=True)
class RuntimeInfo:
    """The software that a checkpoint ran in."""

    name: str
    """ "transformers", "transformer_lens", "onnxruntime" or "neoconvert"."""
    what: str
    version: str
    device: str
    role: str
    """ "original" or "artifact"."""
    tf32: bool | None = None
    """Whether float32 products were computed in TF32; None: the device has no such thing."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean of -log p(next token) over a text."""

    original: float
    """In float64."""
    stored: float
    """In float64, of the weights as the artifact's dtype rounds them."""
    artifact: float


@dataclass(frozen=True)
class ByPosition:
    """The largest |Δ log p| in bins of positions: bin i from start[i] to before start[i + 1]."""

    start: tuple[int, ...]
    error: tuple[float, ...]
    floor: tuple[float, ...]

    @staticmethod
    def of(error: Sequence[float], floor: Sequence[float]) -> ByPosition:
        width = -(-len(error) // MAX_BINS)
        starts = tuple(range(0, len(error), width))
        bins = [[max(v[s : s + width]) for s in starts] for v in (error, floor)]
        return ByPosition(starts, tuple(bins[0]), tuple(bins[1]))


@dataclass(frozen=True)
class UnitError:
    """The residual stream after a unit, centred: the largest difference from the float64
    reference, and what float32 alone makes it, both relative to the stream's largest element."""

    unit: str
    error: float
    floor: float

    @property
    def ratio(self) -> float:
        if not math.isfinite(self.error):
            return math.inf
        return self.error / self.floor


@dataclass(frozen=True)
class Layers:
    """How the error grows from unit to unit, on one probe, in one runtime."""

    runtime: str
    probe: str
    units: tuple[UnitError, ...]


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
    where they are not rounded. So with the two that follow."""
    storage_kl: float | None = None
    storage_top1_agreement: float | None = None
    perplexity: Perplexity | None = None
    """Of a text."""
    by_position: ByPosition | None = None


@dataclass(frozen=True)
class Divergence:
    """A unit in which artifact and original part, and the tensor of it most likely at fault."""

    unit: str
    tensor: str | None

    @property
    def named(self) -> str | None:
        """The tensor, for people."""
        return self.tensor and self.tensor + (
            ALSO_HEAD if self.unit == "final" and is_tied_head(self.tensor, HEAD) else ""
        )

    def __str__(self) -> str:
        return self.unit + (f": {self.named}" if self.named else "")


@dataclass(frozen=True)
class Verification:
    """The verdict with its evidence. `weights` is None, `probes` empty, where not asked for."""

    passed: bool
    runtimes: tuple[RuntimeInfo, ...]
    probes: tuple[ProbeResult, ...]
    weights: WeightCheck | None
    max_ratio: float
    problems: tuple[str, ...] = ()
    """Sentences: each thing that made it fail."""
    remarks: tuple[str, ...] = ()
    """Sentences: what a reader should know, though it is no fault."""
    effort: str = "standard"
    original: str = ""
    artifact: str = ""
    layers: tuple[Layers, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    """What is known of each subject, link by link; with a criterion, of the files alone."""
    reached: Reach | None = None
    """What the probes reach of the model, in every runtime; None where none ran."""
    divergences: tuple[Divergence, ...] = ()
    """The units at fault, in forward order: each by itself, whatever those before it do."""
    criterion: Criterion | None = None
    """The limits that a user stated for what is lossy on purpose, instead of float32's noise."""

    @property
    def first_divergence(self) -> Divergence | None:
        return self.divergences[0] if self.divergences else None

    @property
    def verdict(self) -> str:
        """In words. What is within limits that someone chose has not been verified."""
        if self.criterion is None:
            return "verified" if self.passed else "NOT VERIFIED"
        return f"{'within' if self.passed else 'NOT WITHIN'} the stated limits: {self.criterion}"

    def __repr__(self) -> str:
        verdict = "passed" if self.passed else f"failed: {' '.join(self.problems[:2])}"
        compared = f"{self.weights.compared} tensors, " if self.weights else ""
        pair = f"{self.artifact} against {self.original}"
        return f"<Verification of {pair}: {compared}{len(self.probes)} probes, {verdict}>"

    def summary(self) -> str:
        """A few lines for people."""
        lines = []
        if self.weights is not None:
            w = self.weights
            same = w.compared - len(w.mismatches)
            how = (
                "identical, bit for bit" if w.explained is None else "accounted for by their steps"
            )
            if self.criterion is not None:
                how = "as in the original"
            lines.append(f"weights   {same} of {w.compared} tensors {how}")
        if self.probes:
            worst = max(self.probes, key=lambda p: (not p.passed, p.ratio))
            good = sum(p.passed for p in self.probes)
            ran = next((r for r in self.runtimes if r.role == "artifact"), None)
            allowed = f"{self.max_ratio:g} times float32's own noise"
            if self.criterion is not None:
                allowed = "the stated limits"
            lines.append(
                f"function  {good} of {len(self.probes)} probes within {allowed}"
                + (f", run in {ran.what} on {ran.device}" if ran else "")
            )
            lines.append(
                f"          worst: {worst.name}, ratio {worst.ratio:.3g}, max |Δ log p|"
                f" {worst.max_abs_logprob_diff:.2e} (noise {worst.noise_floor:.2e})"
            )
        if self.reached is not None:
            lines.append(f"          {self.reached}")
        lines += [f"{e.link:<11}{e.subject}: {e}" for e in self.evidence]
        lines += [f"diverges  at {where}" for where in self.divergences]
        lines += [f"problem   {problem}" for problem in self.problems]
        lines.append(self.verdict)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The documented keys, as plain JSON. A number that is not finite becomes null."""
        where = self.first_divergence
        weights = self.weights
        return {
            "passed": self.passed,
            "original": self.original,
            "artifact": self.artifact,
            "effort": self.effort,
            "max_ratio": self.max_ratio,
            "criterion": dataclasses.asdict(self.criterion) if self.criterion else None,
            "runtimes": [dataclasses.asdict(r) for r in self.runtimes],
            "probes": [_plain(dataclasses.asdict(p)) for p in self.probes],
            "reached": dataclasses.asdict(self.reached) if self.reached else None,
            "evidence": [evidence.to_json() for evidence in self.evidence],
            "layers": [_plain(dataclasses.asdict(layers)) for layers in self.layers],
            "weights": None
            if weights is None
            else {
                "compared": weights.compared,
                "mismatched": list(weights.mismatched),
                "mismatches": [dataclasses.asdict(m) for m in weights.mismatches],
                "config": list(weights.config),
                "nodes": list(weights.nodes),
                "explained": None if weights.explained is None else list(weights.explained),
                **({"absent": weights.absent} if weights.absent else {}),
            },
            "first_divergence": None if where is None else dataclasses.asdict(where),
            "divergences": [dataclasses.asdict(d) for d in self.divergences],
            "problems": list(self.problems),
            "remarks": list(self.remarks),
        }

    def kept(self) -> dict[str, Any]:
        """What is worth keeping beside the artifact: no curves, and no names of places, so that
        the same conversion writes the same bytes anywhere."""
        document = self.to_json()
        for name in ("original", "artifact", "layers"):
            del document[name]
        for probe in document["probes"]:
            del probe["by_position"]
        return document


def _plain(value: Any) -> Any:
    """Plain JSON: no NaN and no infinity, and no more digits than mean something."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
