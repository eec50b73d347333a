"""An artifact against its original: both layers, and where they part."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from converter.checkpoint import Checkpoint
from converter.errors import UsageError
from converter.progress import Progress, silent
from converter.route import Route
from converter.routing import between
from converter.verification.probes import Probe, standard_probes
from converter.verification.result import Divergence, ProbeResult, RuntimeInfo, Verification
from converter.verification.weights import WeightCheck, compare_weights, require_same_sizes

CHECKS = ("weights", "function")
MAX_RATIO = 8.0
"""How many times float32's own noise an honest artifact may be off.

Measured on 300 random models of 1 to 8 layers, 3 in 8 of them float16 or bfloat16, with weights
and LayerNorm gains up to noise of several nats, 2,700 probes: honest conversions reach 2.7 in
one probe of a thousand and 3.2 at most. (With the original's one run as the floor: 18 and 30.)
A lost window, swapped heads, a shifted position or a dropped bias give 150 to several million,
an epsilon of 1e-6 for 1e-5 gives 10 or more.
"""


def verify(
    original: Checkpoint,
    artifact: Checkpoint,
    *,
    route: Route | None = None,
    checks: Collection[str] = CHECKS,
    device: str = "auto",
    runtime: str | None = None,
    max_ratio: float | None = None,
    seed: int = 0,
    probes: Sequence[Probe] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare an artifact with the checkpoint it was made from.

    Args:
        route: how the artifact was made from the original; None: as its provenance says.
        checks: any of "weights" (bit for bit, config included) and "function".
        device: "auto", "cpu", "cuda" or "cuda:N".
        max_ratio: how many times float32's own noise the artifact may be off (MAX_RATIO).
        probes: instead of the standard ones.

    Raises:
        TensorMismatch: the sizes differ: these cannot be the same model.
        UsageError: no check, or no probe, was asked for.
        CannotDoHere: the device or runtime asked for is not here.
        VerificationFailed: the artifact does not even load in its software.
        BadInput: the original does not.
    """
    if not checks or set(checks) - set(CHECKS):
        raise UsageError(
            f"Nothing to check: {', '.join(sorted(checks)) or 'no check'}.",
            where="--check",
            do=f"Name {' or '.join(CHECKS)}.",
        )
    limit = MAX_RATIO if max_ratio is None else max_ratio
    say = progress or silent
    require_same_sizes(original, artifact)
    route = route or between(original, artifact)
    problems: list[str] = []
    weights: WeightCheck | None = None
    divergence: Divergence | None = None
    if "weights" in checks:
        weights = compare_weights(route, artifact, say)
        problems += _weight_problems(weights)
        if weights.mismatches and "route" not in (artifact.source.provenance or {}):
            problems.append(
                "The artifact does not say how it was made, so its weights were taken for the"
                " original's own: `neoconvert explain` finds processing, `--check function` judges"
                " what it computes."
            )
        divergence = _first(weights)
    runtimes: tuple[RuntimeInfo, ...] = ()
    results: tuple[ProbeResult, ...] = ()
    if "function" in checks:
        if probes is None:
            directory = next(
                (c.source.path for c in (original, artifact) if c.source.tokenizer_files()), None
            )
            probes = standard_probes(original.config, directory, seed)
        if not probes:
            raise UsageError("There is no probe to run.", where="probes", do="Give at least one.")
        from converter.verification.function import compare_function, first_divergent_unit

        ran = compare_function(
            route, artifact, probes, device=device, runtime=runtime,
            max_ratio=limit, seed=seed, say=say,
        )  # fmt: skip
        runtimes, results = ran.runtimes, ran.probes
        problems += ran.problems
        if ran.vacuous and not (weights is not None and weights.passed):
            problems.append("No log-probability is finite: nothing could be compared.")
        failed = next((p for p, r in zip(probes, results, strict=True) if not r.passed), None)
        if failed is not None and divergence is None:
            say("finding where they part")
            unit = first_divergent_unit(route, artifact, failed)
            divergence = None if unit is None else Divergence(unit, None)
    return Verification(
        passed=not problems,
        runtimes=runtimes,
        probes=results,
        weights=weights,
        first_divergence=divergence,
        max_ratio=limit,
        problems=tuple(problems),
    )


def _weight_problems(check: WeightCheck) -> list[str]:
    problems = []
    if not check.compared:
        problems.append("No tensor was compared.")
    if check.mismatches:
        first = check.mismatches[0]
        problems.append(
            f"{len(check.mismatches)} of {check.compared} tensors differ,"
            f" first {first.tensor} ({first.unit})."
        )
    if check.config:
        problems.append(f"The config differs in {', '.join(check.config)}.")
    return problems


def _first(check: WeightCheck) -> Divergence | None:
    if not check.mismatches:
        return None
    return Divergence(check.mismatches[0].unit, check.mismatches[0].tensor)
