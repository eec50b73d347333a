"""The second layer of verification: the artifact, run in its software, within the noise floor."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from converter.errors import BadInput, NeoconvertError, VerificationFailed
from converter.processing import STEPS
from converter.progress import Progress
from converter.route import Expected, Route
from converter.verification.criterion import Criterion
from converter.verification.evidence import Evidence
from converter.verification.judge import MAX_RATIO, Errors, measure, pooled_floor
from converter.verification.loading import installed, resolve_device
from converter.verification.probes import Probe, cost
from converter.verification.program import examine_program
from converter.verification.reference import Forward, Source, forward
from converter.verification.result import ProbeResult, RuntimeInfo, probe_result
from converter.verification.runtimes import Runtime, open_runtime
from converter.verification.standard import (
    Standard,
    changed_function,
    departs,
    noise_of,
    standard_for,
)
from converter.verification.subjects import Subject

_SMALL = 1e10
"""Multiply-adds that are over before anything clever pays."""


@dataclass(frozen=True)
class Comparison:
    """What running both models showed."""

    runtimes: tuple[RuntimeInfo, ...]
    probes: tuple[ProbeResult, ...]
    problems: tuple[str, ...]
    failed: tuple[Probe, Subject] | None
    """The first probe that failed, and the artifact that failed it."""
    program: tuple[Evidence, ...] = ()

    @property
    def vacuous(self) -> bool:
        """No log-probability is finite in both, so that nothing could be compared."""
        return not any(result.compared for result in self.probes)


def compare_function(
    route: Route,
    subjects: Sequence[Subject],
    probes: Sequence[Probe],
    *,
    device: str,
    max_ratio: float,
    seed: int,
    say: Progress,
    same_weights: bool = False,
    explained: Collection[str] | None = None,
    criterion: Criterion | None = None,
) -> Comparison:
    """Run the original and then each artifact, and judge every probe.

    Args:
        same_weights: the stored weights are known to be what the route makes.
        explained: they are that by these steps, within the rounding of other arithmetic than
            ours, and are judged as they are stored.
        criterion: what the artifact is held to instead of the noise floor.

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
        program: list[Evidence] = []
        failed: tuple[Probe, Subject] | None = None
        standards: dict[tuple[str, ...], Standard] = {}
        for subject in subjects:
            codes = tuple(map(subject.checkpoint.code, subject.checkpoint.slots))
            itself = explained is not None and subject.checkpoint.complete
            if itself:
                codes += tuple(sorted({str(s.file) for s in subject.checkpoint.stored.values()}))
            if codes not in standards:
                standard, noise = standard_for(
                    route, subject.checkpoint, true, own, seed, say, itself=itself
                )
                if not standards:
                    if standard.reference is not true:
                        noise = noise_of(original, true, seed)
                    problems += _strange_original(
                        own, noise, probes, ran[0], max(max_ratio, MAX_RATIO)
                    )
                if criterion is not None:  # lossy in any way: against the original itself
                    standard = replace(standard, reference=true, costs=[None] * len(probes))
                standards[codes] = standard
                problems += changed_function(route, true, standard, max_ratio, seed, say)
                if itself and explained is not None and criterion is None:
                    problems += departs(
                        subject.checkpoint, true, standard, max_ratio, seed, say,
                        decomposed=STEPS[-1].name in explained,
                    )  # fmt: skip
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
                    standard.floors[index], max_ratio, standard.costs[index], criterion,
                )  # fmt: skip
                results.append(result)
                if not result.passed:
                    failed = failed or (probes[index], subject)
            problems += _off([r for r in results if r.runtime == ran[-1].what])
            if criterion is not None:
                texts = sum(
                    p.text and run is not None for p, run in zip(probes, found, strict=True)
                )
                problems += criterion.exceeded_by_all([run for run in found if run], texts)
            else:
                say(f"{runtime.what}: float64")
                evidence = _program(
                    runtime, subject, route, true, standard, same_weights, itself, seed
                )
                program.append(evidence)
                if evidence.failed:
                    problems.append(f"The program is not GPT-Neo's: it {evidence}.")
            del runtime
            _release(work)
    return Comparison(tuple(ran), tuple(results), tuple(problems), failed, tuple(program))


def _program(
    runtime: Runtime,
    subject: Subject,
    route: Route,
    true: Forward,
    standard: Standard,
    same_weights: bool,
    itself: bool,
    seed: int,
) -> Evidence:
    """The program link of one subject, on its own stored weights; where a graph does not say
    which they are, on those that the route makes."""
    artifact = subject.checkpoint
    source: Source = artifact
    if not artifact.complete:
        source = Expected(route, {key: artifact.code(key) for key in artifact.slots})
    moved = not route.whole_units and not route.rescales
    known = itself or (same_weights and (moved or standard.reference is not true))
    name = runtime.what if artifact.graph is None else f"{artifact.graph_file} ({runtime.what})"
    return examine_program(
        runtime, source, true.probes, standard.floors, name,
        exact=standard.reference if known else None, seed=seed,
    )  # fmt: skip


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
        try:
            logits = runtime.logits(probe)
        except (NeoconvertError, MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # of any library that runs what a file tells it to
            raise _stopped(runtime, probe, error, original) from error
        results += measure(reference, index, [logits], margin=margin)
    return results


def _stopped(
    runtime: Runtime, probe: Probe, error: Exception, original: bool
) -> BadInput | VerificationFailed:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"{runtime.what} cannot run the {'original' if original else 'artifact'}: {reason[:200]}"
    kind = BadInput if original else VerificationFailed
    do = "Convert or export it again; its config or graph does not fit its weights."
    return kind(what, where=f"probe {probe.name!r}, tokens {list(probe.tokens.shape)}", do=do)


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
