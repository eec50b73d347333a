"""The second layer of verification: the artifact, run in its software, within the noise floor."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from converter.checkpoint import Checkpoint
from converter.dtypes import CODES
from converter.errors import BadInput, VerificationFailed
from converter.progress import Progress
from converter.route import Expected, Route
from converter.verification.judge import Errors, Floor, measure, pooled_floor
from converter.verification.loading import installed, resolve_device
from converter.verification.probes import AFFORDABLE, Probe, cost
from converter.verification.reference import Forward, Source, forward
from converter.verification.result import ProbeResult, RuntimeInfo
from converter.verification.runtimes import Runtime, exact_float32, open_runtime


@dataclass(frozen=True)
class Comparison:
    """What running both models showed."""

    runtimes: tuple[RuntimeInfo, ...]
    probes: tuple[ProbeResult, ...]
    problems: tuple[str, ...]

    @property
    def vacuous(self) -> bool:
        """No log-probability is finite in both, so that nothing could be compared."""
        return not any(result.compared for result in self.probes)


def compare_function(
    route: Route,
    artifact: Checkpoint,
    probes: Sequence[Probe],
    *,
    device: str,
    runtime: str | None,
    max_ratio: float,
    seed: int,
    say: Progress,
) -> Comparison:
    """Run original and artifact, one after the other, and judge every probe.

    Raises: see `converter.verification.verify`.
    """
    with _threads_for(cost(artifact.config, sum(probe.tokens.size for probe in probes))):
        return _compare(
            route, artifact, probes, device=device, runtime=runtime,
            max_ratio=max_ratio, seed=seed, say=say,
        )  # fmt: skip


@contextlib.contextmanager
def _threads_for(work: float) -> Iterator[None]:
    """One thread for small models: on a busy machine, threads that wait for one another cost
    more than all the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < 1e10 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(
    route: Route,
    artifact: Checkpoint,
    probes: Sequence[Probe],
    *,
    device: str,
    runtime: str | None,
    max_ratio: float,
    seed: int,
    say: Progress,
) -> Comparison:
    original, where = route.source, resolve_device(device)
    say("reference: float64")
    true = forward(original, probes, dtype=torch.float64, device=where)
    rounded = rounding(route, artifact)
    stored = true
    if rounded is not None:
        say("reference: float64, weights rounded")
        stored = forward(rounded, probes, dtype=torch.float64, device=where)
    say("noise floor")
    noise = _noise(rounded or original, stored, seed)
    first = open_runtime(original, device, runtime)
    ran = [_info(first, "original")]
    own = _measure_all(first, true, [0.0] * len(probes), say)
    del first
    _release()
    problems = _strange_original(own, noise, probes, ran[0], max_ratio)
    floors = [pooled_floor([run, *more]) for run, more in zip(own, noise, strict=True)]
    if rounded is not None and route.whole_units:
        # Rounding would hide a fault of processing: without it, the function must be the same.
        say("processing: float64")
        made = forward(Expected(route, "F64"), probes, dtype=torch.float64, device=where)
        problems += _changed_function(true, made, floors, probes, max_ratio)
    try:
        second = open_runtime(artifact, device, runtime)
    except BadInput as error:
        raise VerificationFailed(error.what, where=error.where, do=error.do) from error
    ran.append(_info(second, "artifact"))
    found = _measure_all(second, stored, [2 * floor.max_abs for floor in floors], say)
    what = ran[1].name
    del second
    _release()
    costs: list[float | None] = [None] * len(probes)
    if rounded is not None:
        pairs = ((true, stored, index) for index in range(len(probes)))
        costs = [measure(a, i, [partial(b.at, i)])[0].max_abs for a, b, i in pairs]
    results = tuple(
        _judge(probe, what, run, before, floor, max_ratio, storage_cost)
        for probe, run, before, floor, storage_cost in zip(
            probes, found, own, floors, costs, strict=True
        )
    )
    problems += [f"Probe {r.name!r}: {r.reason}." for r in results if not r.passed]
    return Comparison(tuple(ran), results, tuple(problems))


def rounding(route: Route, artifact: Checkpoint) -> Expected | None:
    """The weights as the artifact's dtype rounds them; None where it is no coarser than the
    original's, so that all the rounding there is belongs to the judged error."""
    original = route.source

    def rounds(key: str) -> bool:
        a, b = original.code(key), artifact.code(key)
        return a != b and CODES[b].itemsize <= CODES[a].itemsize

    absorbs = route.absorbs and bool(original.config.score_divisors)
    if not absorbs and not any(rounds(key) for key in original.stored):
        return None
    return Expected(route, {key: artifact.code(key) for key in artifact.slots})


def _changed_function(
    true: Forward, made: Forward, floors: Sequence[Floor], probes: Sequence[Probe], limit: float
) -> list[str]:
    for index, (probe, floor) in enumerate(zip(probes, floors, strict=True)):
        ratio = measure(true, index, [partial(made.at, index)])[0].ratio(floor)
        if not ratio <= limit:
            return [
                f"Before rounding, the processed weights compute another function (probe"
                f" {probe.name!r}, {ratio:.3g} times float32's own noise)."
            ]
    return []


def _noise(source: Source, reference: Forward, seed: int) -> list[list[Errors]]:
    """For each probe, our own float32 runs with jittered embeddings, against the reference."""
    probes = reference.probes
    runs = 4 if sum(cost(source.config, p.tokens.size) for p in probes) < AFFORDABLE / 10 else 2
    many = [probe for _ in range(runs) for probe in probes]
    results = []
    with exact_float32():
        jittered = forward(
            source, many, dtype=torch.float32,
            device=reference.final[0].device, jitter=[seed * 1000 + i for i in range(len(many))],
        )  # fmt: skip
        for index in range(len(probes)):
            copies = range(index, len(many), len(probes))
            rows = [partial(jittered.at, copy) for copy in copies]
            results.append(measure(reference, index, rows))
    return results


def _measure_all(
    runtime: Runtime, reference: Forward, margins: Sequence[float], say: Progress
) -> list[Errors]:
    results = []
    for index, (probe, margin) in enumerate(zip(reference.probes, margins, strict=True)):
        say(f"{runtime.what}: {probe.name}")
        results += measure(reference, index, [runtime.logits(probe)], margin=margin)
    return results


def _strange_original(
    own: Sequence[Errors],
    noise: Sequence[Sequence[Errors]],
    probes: Sequence[Probe],
    ran: RuntimeInfo,
    max_ratio: float,
) -> list[str]:
    """The original must itself run as its file says, or its error is no measure of noise."""
    for run, more, probe in zip(own, noise, probes, strict=True):
        ratio = run.ratio(pooled_floor(more))
        if ratio > max_ratio:
            return [
                f"The original, run in {ran.what}, departs from its own file and config"
                f" (probe {probe.name!r}, {ratio:.3g} times float32's noise)."
            ]
    return []


def _judge(
    probe: Probe,
    runtime: str,
    run: Errors,
    original: Errors,
    floor: Floor,
    max_ratio: float,
    storage_cost: float | None,
) -> ProbeResult:
    ratio = run.ratio(floor)
    reason = None
    if not run.same_classes(original):
        reason = "NaN or infinity where the original has none, or the reverse"
    elif not ratio <= max_ratio:
        reason = f"{ratio:.3g} times float32's own noise, more than {max_ratio:g}"
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
        storage_max_abs_logprob_diff=storage_cost,
    )


def _info(runtime: Runtime, role: str) -> RuntimeInfo:
    version = runtime.version or installed(runtime.name)
    return RuntimeInfo(runtime.name, runtime.what, version, str(runtime.device), role)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_divergent_unit(route: Route, artifact: Checkpoint, probe: Probe) -> str | None:
    """The first unit after which the residual streams of the artifact and of what it must be
    differ, both by our own float64 forward. None: the weights compute the same, so the software
    or the route itself differs."""

    def stream(source: Source) -> dict[str, torch.Tensor]:
        units: dict[str, torch.Tensor] = {}

        def keep(unit: str, residuals: Sequence[torch.Tensor]) -> None:
            units[unit] = residuals[0]

        forward(source, [probe], dtype=torch.float64, watch=keep)
        return units

    found = stream(artifact)
    codes = {key: artifact.code(key) for key in artifact.slots}
    for unit, expected in stream(Expected(route, codes)).items():
        error = (found[unit] - expected).abs().max()
        if not error <= 1e-9 * expected.abs().max():
            return unit
    return None
