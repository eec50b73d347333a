"""The second layer of verification: the artifact, run in its software, within the noise floor."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from converter.errors import BadInput, NeoconvertError, VerificationFailed
from converter.progress import Progress
from converter.route import Expected, Route
from converter.verification.criterion import Criterion
from converter.verification.evidence import Evidence
from converter.verification.judge import MAX_RATIO, pooled_floor
from converter.verification.loading import installed, resolve_device
from converter.verification.measuring import Errors, Rows, measure, measure_rows
from converter.verification.probes import Probe, cost
from converter.verification.program import examine_program, few_of, part_of
from converter.verification.reference import Forward, Source, forward
from converter.verification.result import ProbeResult, RuntimeInfo, probe_result
from converter.verification.route_link import examine_route
from converter.verification.runtimes import Runtime, open_runtime
from converter.verification.standard import Standard, noise_of, standard_for
from converter.verification.subjects import Subject

_SMALL = 1e10
"""Multiply-adds that are over before anything clever pays."""


@dataclass(frozen=True)
class Comparison:
    """What running both models showed."""

    runtimes: tuple[RuntimeInfo, ...]
    probes: tuple[ProbeResult, ...]
    evidence: tuple[Evidence, ...]
    problems: tuple[str, ...]
    """Beyond those of the evidence: of the original, and of limits that were stated."""
    failed: tuple[tuple[Probe, Subject], ...]
    """The probes that failed, and what failed them."""

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
    same: Collection[str] = (),
    explained: Sequence[str] | None = None,
    criterion: Criterion | None = None,
) -> Comparison:
    """Run the original and then each artifact, and judge every probe.

    Args:
        same: names of subjects whose stored weights are known to be what the route makes.
        explained: they are that by these steps, within the rounding of other arithmetic than
            ours, and are judged as they are stored.
        criterion: what the artifact is held to instead of the noise floor.

    Raises: see `converter.verification.verify`.
    """
    original, where = route.source, resolve_device(device)
    work = cost(original.config, sum(probe.tokens.size for probe in probes))
    with threads_for(work):
        say("reference: float64")
        true = forward(original, probes, dtype=torch.float64, device=where).keeping()
        software = open_runtime(original, device)
        ran = [info(software, "original")]
        own = _own(software, true, say)
        first: Runtime | None = software
        del software
        problems: list[str] = []
        results: list[ProbeResult] = []
        evidence: list[Evidence] = []
        failed: list[tuple[Probe, Subject]] = []
        standards: dict[tuple[str, ...], Standard] = {}
        for subject in subjects:
            itself = explained is not None and subject.checkpoint.complete
            key = tuple(map(subject.checkpoint.code, subject.checkpoint.slots))
            if itself:
                key += tuple(sorted({str(s.file) for s in subject.checkpoint.stored.values()}))
            if key not in standards:
                standards[key], noise = standard_for(
                    route, subject.checkpoint, true, own, seed, say, itself=itself
                )
            if first is not None:
                if standards[key].reference is not true:
                    noise = noise_of(original, true, seed)
                problems += _strange_original(
                    first, true, own, noise, max(max_ratio, MAX_RATIO), seed, say
                )
                first = None
                _release(work)
            standard = standards[key]
            if criterion is not None:  # lossy in any way: against the original itself
                standard = replace(standard, reference=true, costs=[None] * len(probes))
            runtime = _open(subject)
            ran.append(info(runtime, "artifact"))
            margins = [2 * floor.max_abs for floor in standard.floors]
            found = _run(runtime, standard.reference, margins, say)
            judged = [
                probe_result(
                    probes[index], ran[-1].what, run, standard.honest[index],
                    standard.floors[index], max_ratio, standard.costs[index], criterion,
                )
                for index, run in enumerate(found)
                if run is not None
            ]  # fmt: skip
            results += judged
            names = {result.name for result in judged if not result.passed}
            failed += [(probe, subject) for probe in probes if probe.name in names]
            if criterion is not None:
                problems += [sentence for sentence in [_off(judged)] if sentence]
                texts = sum(
                    p.text and run is not None for p, run in zip(probes, found, strict=True)
                )
                problems += criterion.exceeded_by_all([run for run in found if run], texts)
            else:
                evidence += _links(
                    route, subject, runtime, true, standard, judged, subject.name in same,
                    None if not itself else explained, max_ratio, seed, say,
                    told=[e.subject for e in evidence if e.link == "route"],
                )  # fmt: skip
            del runtime
            _release(work)
    return Comparison(tuple(ran), tuple(results), tuple(evidence), tuple(problems), tuple(failed))


def _links(
    route: Route,
    subject: Subject,
    runtime: Runtime,
    true: Forward,
    standard: Standard,
    judged: Sequence[ProbeResult],
    same: bool,
    explained: Sequence[str] | None,
    max_ratio: float,
    seed: int,
    say: Progress,
    *,
    told: Collection[str],
) -> list[Evidence]:
    """The three links of a subject that take running it. `told`: subjects whose route is known."""
    artifact = subject.checkpoint
    name = runtime.what if artifact.graph is None else f"{subject.name} (onnxruntime)"
    found = [_arithmetic(name, judged, max_ratio)]
    say(f"{runtime.what}: float64")
    few = few_of(artifact.config, true.probes)
    expected = part_of(standard.reference, few)
    moved = not route.whole_units and not route.rescales
    if explained is not None or (same and (moved or standard.reference is not true)):
        stored = expected
    else:
        # Where a graph does not say which its weights are, those that the route makes.
        codes = {key: artifact.code(key) for key in artifact.slots}
        source: Source = artifact if artifact.complete else Expected(route, codes)
        stored = forward(source, list(few.values()), dtype=torch.float64)
    found.append(examine_program(runtime, stored, standard.floors, name, seed=seed))
    if subject.name not in told:
        rounded = None if same or stored is expected or not artifact.complete else stored
        if rounded is not None and not moved and standard.reference is true:
            codes = {key: artifact.code(key) for key in artifact.slots}
            made = Expected(route, codes)
            expected = forward(made, list(few.values()), dtype=torch.float64)
        found.append(
            examine_route(
                route, subject.name, artifact, true, standard, expected, rounded,
                explained=explained, limit=max_ratio, seed=seed, say=say,
            )
        )  # fmt: skip
    # Where no software here runs the layout, or nothing but NaN comes out, there is no program to see.
    seen = runtime.name != "neoconvert" and any(result.compared for result in judged)
    return [
        replace(item, required=subject.whole and (seen or item.link != "program")) for item in found
    ]


def _arithmetic(subject: str, judged: Sequence[ProbeResult], max_ratio: float) -> Evidence:
    """The float32 run that users see."""
    if not judged:
        return Evidence.not_comparable(subject, "arithmetic", "it has not what the probes need")
    if not any(result.compared for result in judged) and all(result.passed for result in judged):
        why = "NaN and infinities alone, where the original has them"
        return Evidence(subject, "arithmetic", "same", why=why)
    worst = max(judged, key=lambda r: (not r.passed, r.ratio))
    times = worst.ratio / max_ratio
    if not worst.passed and times <= 1:  # NaN and infinities in the wrong places
        times = math.inf
    return Evidence.measured(
        subject, "arithmetic", worst.name, worst.max_abs_logprob_diff, times, _off(judged) or ""
    )


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


def _own(runtime: Runtime, true: Forward, say: Progress) -> list[Errors | None]:
    """The original's own run, of whole probes: what float32 costs it there. It needs no cache to
    be the standard of those that have one."""
    of = true.wholes
    found: dict[int, Rows] = {}
    for index in sorted(set(of)):
        probe = replace(true.probes[index], prefill=None)
        if runtime.runs(probe):
            logits = _logits(runtime, probe, say, original=True)
            (found[index],) = measure_rows(true, index, [logits])
    shapes = (probe.tokens.shape for probe in true.probes)
    return [
        found[whole].part(*shape).errors() if whole in found else None
        for whole, shape in zip(of, shapes, strict=True)
    ]


def _run(
    runtime: Runtime, reference: Forward, margins: Sequence[float], say: Progress
) -> list[Errors | None]:
    """Every probe that the runtime can run; None for the others."""
    results: list[Errors | None] = []
    for index, (probe, margin) in enumerate(zip(reference.probes, margins, strict=True)):
        if not runtime.runs(probe):
            results.append(None)
            continue
        logits = _logits(runtime, probe, say)
        results += measure(reference, index, [logits], margin=margin)
    return results


def _logits(
    runtime: Runtime, probe: Probe, say: Progress, *, original: bool = False
) -> torch.Tensor:
    say(f"{runtime.what}: {probe.name}")
    try:
        return runtime.logits(probe)
    except (NeoconvertError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # of any library that runs what a file tells it to
        raise _stopped(runtime, probe, error, original) from error


def _stopped(
    runtime: Runtime, probe: Probe, error: Exception, original: bool
) -> BadInput | VerificationFailed:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"{runtime.what} cannot run the {'original' if original else 'artifact'}: {reason[:200]}"
    kind = BadInput if original else VerificationFailed
    do = "Convert or export it again; its config or graph does not fit its weights."
    return kind(what, where=f"probe {probe.name!r}, tokens {list(probe.tokens.shape)}", do=do)


def _strange_original(
    runtime: Runtime,
    true: Forward,
    own: Sequence[Errors | None],
    noise: Sequence[Sequence[Errors]],
    max_ratio: float,
    seed: int,
    say: Progress,
) -> list[str]:
    """The original must itself run as its file says, or its error is no measure of noise. What
    is strange in float32 may be bad luck: float64 decides, where the software runs in it."""
    ratios = [
        run.ratio(pooled_floor(more)) if run else 0.0 for run, more in zip(own, noise, strict=True)
    ]
    worst = max(range(len(ratios)), key=ratios.__getitem__)
    if ratios[worst] <= max_ratio:
        return []
    say(f"{runtime.what}: float64")
    few = few_of(true.weights.source.config, true.probes)
    floors = [pooled_floor(more) for more in noise]
    exact = examine_program(runtime, part_of(true, few), floors, runtime.what, seed=seed)
    if exact.outcome == "same":
        return []
    return [
        f"The original, run in {runtime.what}, departs from its own file and config"
        f" (probe {true.probes[worst].name!r}, {ratios[worst]:.3g} times float32's noise)."
    ]


def _off(results: Sequence[ProbeResult]) -> str | None:
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
