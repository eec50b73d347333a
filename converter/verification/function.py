"""The links that take running an artifact: program, route and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from converter.errors import BadInput, VerificationFailed
from converter.parallel import memory_kept
from converter.progress import Progress
from converter.route import Route
from converter.verification.criterion import Criterion
from converter.verification.evidence import Evidence
from converter.verification.exact import Truth
from converter.verification.measuring import Errors, measure
from converter.verification.original import Original
from converter.verification.passes import info, logits_of, release, threads_for
from converter.verification.probes import Probe, cost
from converter.verification.program import examine_program, few_of
from converter.verification.reference import forward
from converter.verification.result import ProbeResult, RuntimeInfo
from converter.verification.route_link import examine_route
from converter.verification.runtime import Runtime
from converter.verification.standard import Standard, standard_for
from converter.verification.subjects import Subject
from converter.verification.verdicts import failures, of_other_weights, probe_result


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
    remarks: tuple[str, ...] = ()

    @property
    def vacuous(self) -> bool:
        """No log-probability is finite in both, so that nothing could be compared."""
        return not any(result.compared for result in self.probes)


def compare_function(
    route: Route,
    original: Original,
    subjects: Sequence[Subject],
    probes: Sequence[Probe],
    *,
    device: str,
    max_ratio: float,
    seed: int,
    say: Progress,
    same: Collection[str] = (),
    alike: Collection[str] = (),
    explained: Sequence[str] | None = None,
    criterion: Criterion | None = None,
) -> Comparison:
    """Run the original, unless that is known, and then each artifact, and judge every probe.

    Args:
        same: names of subjects whose stored weights are known to be what the route makes.
        alike: names of graphs whose nodes are known to be what their config makes.
        explained: they are that by these steps, within the rounding of other arithmetic than
            ours, and are judged as they are stored.
        criterion: what the artifact is held to instead of the noise floor.

    Raises: see `converter.verification.verify`.
    """
    work = cost(route.source.config, sum(probe.tokens.size for probe in probes))
    with threads_for(work), memory_kept():
        known = original.run(probes, device, seed, say)
        true, ran = known.true, [known.info]
        problems: list[str] = []
        if known.strange and known.strange[0] > max_ratio:
            problems.append(known.strange[1])
        results: list[ProbeResult] = []
        evidence: list[Evidence] = []
        failed: list[tuple[Probe, Subject]] = []
        remarks: list[str] = []
        standards: dict[tuple[str, ...], Standard] = {}
        for subject in subjects:
            steps = (
                original.judged_as_stored(subject.checkpoint) if explained is None else explained
            )
            itself = steps is not None and subject.checkpoint.complete
            key = tuple(map(subject.checkpoint.code, subject.checkpoint.slots))
            if itself:
                key += tuple(sorted({str(s.file) for s in subject.checkpoint.stored.values()}))
            if key not in standards:
                standards[key] = standard_for(
                    route, subject.checkpoint, true, known.own, known.noise, seed, say,
                    itself=itself,
                )  # fmt: skip
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
            if criterion is not None:
                problems += [sentence for sentence in [failures(judged)] if sentence]
                texts = sum(
                    p.text and run is not None for p, run in zip(probes, found, strict=True)
                )
                problems += criterion.exceeded_by_all([run for run in found if run], texts)
            else:
                evidence += _links(
                    route, subject, runtime, true, standard, judged, subject.name in same,
                    None if not itself else steps, max_ratio, seed, say,
                    routed=[e.subject for e in evidence if e.link == "route"],
                    examined=original.examined(subject.checkpoint),
                )  # fmt: skip
            if itself and any((e.link, e.outcome) == ("route", "differs") for e in evidence):
                judged = [of_other_weights(result, max_ratio) for result in judged]
            results += judged
            names = {result.name for result in judged if not result.passed}
            failed += [(probe, subject) for probe in probes if probe.name in names]
            if subject.checkpoint.graph is not None and subject.name not in alike:
                from converter.verification.outputs import compare_outputs

                off, left = compare_outputs(
                    route, subject, runtime, true, seed,
                    same=subject.name in same, lossy=criterion is not None,
                )  # fmt: skip
                passed = [(e.subject, e.link, "same") for e in off]  # of the logits, and no more
                evidence = [e for e in evidence if (e.subject, e.link, e.outcome) not in passed]
                evidence += off
                remarks += left
            del runtime
            release(work)
    return Comparison(
        tuple(ran), tuple(results), tuple(evidence), tuple(problems), tuple(failed), tuple(remarks)
    )


def _links(
    route: Route,
    subject: Subject,
    runtime: Runtime,
    true: Truth,
    standard: Standard,
    judged: Sequence[ProbeResult],
    same: bool,
    explained: Sequence[str] | None,
    max_ratio: float,
    seed: int,
    say: Progress,
    *,
    routed: Collection[str],
    examined: Evidence | None,
) -> list[Evidence]:
    """The three links of a subject that take running it. `routed`: subjects whose route is known.
    `examined`: it is known as this."""
    artifact = subject.checkpoint
    name = runtime.what if artifact.graph is None else f"{subject.name} (onnxruntime)"
    found = [_arithmetic(name, judged, max_ratio)]
    say(f"{runtime.what}: float64")
    few = few_of(artifact.config, true.probes)
    expected = standard.reference.part(few)
    moved = not route.whole_units and not route.rescales
    # Where a graph does not say which its weights are, those that the route makes.
    made = same or not artifact.complete
    stored = None
    if not (explained is not None or (made and (moved or standard.reference is not true))):
        source = artifact if artifact.complete else route.into(artifact)
        stored = forward(source, list(few.values()), dtype=torch.float64)
    found.append(
        examine_program(
            runtime,
            stored or expected,
            standard.floors,
            name,
            source=artifact if artifact.complete else None,
            seed=seed,
        )
    )
    if subject.name not in routed and examined is not None:
        found.append(replace(examined, subject=subject.name))
    elif subject.name not in routed:
        rounded = stored if artifact.complete and not same else None
        if rounded is not None and not moved and standard.reference is true:
            expected = forward(route.into(artifact), list(few.values()), dtype=torch.float64)
        found.append(
            examine_route(
                route, subject.name, artifact, true, standard, expected, rounded,
                same=same, explained=explained, known=subject.ours, limit=max_ratio, seed=seed, say=say,
            )
        )  # fmt: skip
    # Where no software here runs the layout, or nothing but NaN comes out, there is no program to see.
    seen = runtime.name != "neoconvert" and any(result.compared for result in judged)
    return [
        replace(item, required=subject.ours and (seen or item.link != "program")) for item in found
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
        subject, "arithmetic", worst.name, worst.max_abs_logprob_diff, times, failures(judged) or ""
    )


def _open(subject: Subject) -> Runtime:
    """
    Raises:
        BadInput: the software refuses a file that was given.
        VerificationFailed: it refuses one that was made from what was given.
    """
    try:
        return subject.open()
    except BadInput as error:
        if not subject.just_written:
            raise
        raise VerificationFailed(error.what, where=error.where, do=error.do) from error


def _run(
    runtime: Runtime, reference: Truth, margins: Sequence[float], say: Progress
) -> list[Errors | None]:
    """Every probe that the runtime can run; None for the others."""
    results: list[Errors | None] = []
    for index, (probe, margin) in enumerate(zip(reference.probes, margins, strict=True)):
        if not runtime.runs(probe):
            results.append(None)
            continue
        logits = logits_of(runtime, probe, say)
        results += measure(reference, index, [logits], margin=margin)
    return results
