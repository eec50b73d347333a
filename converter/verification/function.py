"""The second layer of verification: the artifact, run in its software, within the noise floor."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from converter.verification.result import ProbeResult, RuntimeInfo, probe_result
from converter.verification.runtimes import Runtime, exact_float32, open_runtime
from converter.verification.subjects import Subject

_SMALL = 1e10
"""Multiply-adds that are over before anything clever pays."""
_FEW = 64
"""Positions up to which a probe is cheap for any model."""


@dataclass(frozen=True)
class Comparison:
    """What running both models showed."""

    runtimes: tuple[RuntimeInfo, ...]
    probes: tuple[ProbeResult, ...]
    problems: tuple[str, ...]
    failed: tuple[Probe, Subject] | None
    """The first probe that failed, and the artifact that failed it."""

    @property
    def vacuous(self) -> bool:
        """No log-probability is finite in both, so that nothing could be compared."""
        return not any(result.compared for result in self.probes)


@dataclass(frozen=True)
class Standard:
    """What artifacts of certain dtypes are held to."""

    reference: Forward
    """float64, of the weights as these dtypes round them."""
    floors: Sequence[Floor]
    honest: Sequence[Errors]
    """A float32 run of the original for each probe: where NaN and infinity belong."""
    costs: Sequence[Errors | None]
    """What rounding alone does to each probe; None where nothing is rounded."""


def compare_function(
    route: Route,
    subjects: Sequence[Subject],
    probes: Sequence[Probe],
    *,
    device: str,
    max_ratio: float,
    seed: int,
    say: Progress,
) -> Comparison:
    """Run the original and then each artifact, and judge every probe.

    Raises: see `converter.verification.verify`.
    """
    original, where = route.source, resolve_device(device)
    work = cost(original.config, sum(probe.tokens.size for probe in probes))
    with threads_for(work):
        say("reference: float64")
        true = forward(original, probes, dtype=torch.float64, device=where)
        first = open_runtime(original, device)
        ran = [info(first, "original")]
        own = _run(first, true, [0.0] * len(probes), say, original=True)
        del first
        _release(work)
        problems: list[str] = []
        results: list[ProbeResult] = []
        failed: tuple[Probe, Subject] | None = None
        standards: dict[tuple[str, ...], Standard] = {}
        for subject in subjects:
            codes = tuple(map(subject.checkpoint.code, subject.checkpoint.slots))
            if codes not in standards:
                standard, noise = _standard(route, subject.checkpoint, true, own, seed, say)
                if not standards:
                    if standard.reference is not true:
                        noise = _noise(original, true, seed)
                    problems += _strange_original(own, noise, probes, ran[0], max_ratio)
                standards[codes] = standard
                problems += _changed_function(route, true, standard, max_ratio, say)
            standard = standards[codes]
            runtime = _open(subject)
            ran.append(info(runtime, "artifact"))
            margins = [2 * floor.max_abs for floor in standard.floors]
            found = _run(runtime, standard.reference, margins, say)
            for index, run in enumerate(found):
                if run is None:
                    continue
                result = probe_result(
                    probes[index], ran[-1].what, run, standard.honest[index],
                    standard.floors[index], max_ratio, standard.costs[index],
                )  # fmt: skip
                results.append(result)
                if not result.passed:
                    failed = failed or (probes[index], subject)
            problems += _off([r for r in results if r.runtime == ran[-1].what])
            del runtime
            _release(work)
    return Comparison(tuple(ran), tuple(results), tuple(problems), failed)


@contextlib.contextmanager
def threads_for(work: float) -> Iterator[None]:
    """One thread for small models: on a busy machine, threads that wait for one another cost
    more than all the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < _SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(subject: Subject) -> Runtime:
    try:
        return subject.open()
    except BadInput as error:
        raise VerificationFailed(error.what, where=error.where, do=error.do) from error


def _standard(
    route: Route,
    artifact: Checkpoint,
    true: Forward,
    own: Sequence[Errors | None],
    seed: int,
    say: Progress,
) -> tuple[Standard, list[list[Errors]]]:
    """What this artifact is held to, and the noise that went into it."""
    probes, device = true.probes, true.final[0].device
    rounded, reference = rounding(route, artifact), true
    costs: list[Errors | None] = [None] * len(probes)
    if rounded is not None:
        say("reference: float64, weights rounded")
        reference = forward(rounded, probes, dtype=torch.float64, device=device)
        pairs = (partial(reference.at, index) for index in range(len(probes)))
        costs = [measure(true, index, [rows])[0] for index, rows in enumerate(pairs)]
    say("noise floor")
    noise = _noise(rounded or route.source, reference, seed)
    draws = [[*([run] if run else []), *more] for run, more in zip(own, noise, strict=True)]
    floors = [pooled_floor(runs) for runs in draws]
    return Standard(reference, floors, [runs[0] for runs in draws], costs), noise


def rounding(route: Route, artifact: Checkpoint) -> Expected | None:
    """The weights as the artifact's dtype rounds them; None where it is no coarser than the
    original's, so that all the rounding there is belongs to the judged error. Weights that are
    computed, not moved, are rounded by a 16-bit dtype even if it is the original's own."""
    original = route.source

    def rounds(key: str) -> bool:
        a, b = original.code(key), artifact.code(key)
        computed = route.whole_units and CODES[b].itemsize < 4
        return CODES[b].itemsize <= CODES[a].itemsize and (a != b or computed)

    absorbs = route.absorbs and bool(original.config.score_divisors)
    if not absorbs and not any(rounds(key) for key in original.stored):
        return None
    return Expected(route, {key: artifact.code(key) for key in artifact.slots})


def _changed_function(
    route: Route, true: Forward, standard: Standard, limit: float, say: Progress
) -> list[str]:
    """Rounding would hide a fault of processing: without it, the function must be the same.

    But for undoing what was stored in 16 bits: the original that comes back is not what the
    rounded file computes, and the difference is what storing that file had cost.
    """
    undone = route.name == "undoing" and CODES[route.source.dtype].itemsize < 4
    if standard.reference is true or not route.whole_units or undone:
        return []
    say("processing: float64")
    device = true.final[0].device
    made = forward(Expected(route, "F64"), true.probes, dtype=torch.float64, device=device)
    for index, (probe, floor) in enumerate(zip(true.probes, standard.floors, strict=True)):
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
    total = sum(cost(source.config, p.tokens.size) for p in probes)
    draws = [_draws(probe, total) for probe in probes]
    many = [probe for probe, count in zip(probes, draws, strict=True) for _ in range(count)]
    results, first = [], 0
    with exact_float32():
        jittered = forward(
            source, many, dtype=torch.float32,
            device=reference.final[0].device, jitter=[seed * 1000 + i for i in range(len(many))],
        )  # fmt: skip
        for index, count in enumerate(draws):
            rows = [partial(jittered.at, copy) for copy in range(first, first + count)]
            results.append(measure(reference, index, rows))
            first += count
    return results


def _draws(probe: Probe, total: float) -> int:
    """Few positions say little of the noise, and cost little: they are drawn more often.
    `total`: what running all probes once costs."""
    if probe.tokens.size <= _FEW:
        return 8
    return 4 if total < AFFORDABLE / 10 else 2


def _run(
    runtime: Runtime,
    reference: Forward,
    margins: Sequence[float],
    say: Progress,
    *,
    original: bool = False,
) -> list[Errors | None]:
    """Every probe that the runtime can run; None for the others. The original needs no cache
    of its own to be the standard of those that have one."""
    results: list[Errors | None] = []
    for index, (probe, margin) in enumerate(zip(reference.probes, margins, strict=True)):
        if original:
            probe = replace(probe, prefill=None)
        if not runtime.runs(probe):
            results.append(None)
            continue
        say(f"{runtime.what}: {probe.name}")
        results += measure(reference, index, [runtime.logits(probe)], margin=margin)
    return results


def _strange_original(
    own: Sequence[Errors | None],
    noise: Sequence[Sequence[Errors]],
    probes: Sequence[Probe],
    ran: RuntimeInfo,
    max_ratio: float,
) -> list[str]:
    """The original must itself run as its file says, or its error is no measure of noise."""
    for run, more, probe in zip(own, noise, probes, strict=True):
        ratio = run.ratio(pooled_floor(more)) if run else 0.0
        if ratio > max_ratio:
            return [
                f"The original, run in {ran.what}, departs from its own file and config"
                f" (probe {probe.name!r}, {ratio:.3g} times float32's noise)."
            ]
    return []


def _off(results: Sequence[ProbeResult]) -> list[str]:
    """One sentence for all probes that one runtime failed."""
    off = [r for r in results if not r.passed]
    if not off:
        return []
    worst = max(off, key=lambda r: r.ratio)
    return [
        f"{len(off)} of {len(results)} probes failed in {worst.runtime}, first {off[0].name!r}:"
        f" {off[0].reason}"
        + (f"; worst {worst.name!r}: {worst.reason}." if worst is not off[0] else ".")
    ]


def info(runtime: Runtime, role: str) -> RuntimeInfo:
    version = runtime.version or installed(runtime.name)
    # exact_float32() for torch, use_tf32=0 for onnxruntime's provider
    tf32 = False if runtime.device.type == "cuda" else None
    return RuntimeInfo(runtime.name, runtime.what, version, str(runtime.device), role, tf32)


def _release(work: float) -> None:
    """Give a model's memory back before the next is loaded. (Small ones can wait: collecting
    takes longer than running them.)"""
    if work >= _SMALL:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
