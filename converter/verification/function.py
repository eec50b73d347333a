"""The links that take running an artifact: program, route and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from converter.checkpoint import Checkpoint
from converter.errors import BadInput, VerificationFailed
from converter.parallel import memory_kept
from converter.progress import Progress
from converter.route import Route
from converter.verification.criterion import Criterion
from converter.verification.evidence import Evidence
from converter.verification.measuring import Errors, measure
from converter.verification.original import Original, Pass
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
        comparing = _Comparing(
            route=route, original=original, known=known, max_ratio=max_ratio, seed=seed, say=say,
            same=same, alike=alike, explained=explained, criterion=criterion,
        )  # fmt: skip
        for subject in subjects:
            comparing.compare(subject)
            release(work)
    return Comparison(
        tuple(comparing.ran), tuple(comparing.probes), tuple(comparing.evidence),
        tuple(comparing.problems), tuple(comparing.failed), tuple(comparing.remarks),
    )  # fmt: skip


@dataclass(kw_only=True)
class _Comparing:
    """What all subjects are compared with, and what has been found of them."""

    route: Route
    original: Original
    known: Pass
    max_ratio: float
    seed: int
    say: Progress
    same: Collection[str]
    alike: Collection[str]
    explained: Sequence[str] | None
    criterion: Criterion | None
    ran: list[RuntimeInfo] = field(default_factory=list)
    probes: list[ProbeResult] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    failed: list[tuple[Probe, Subject]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    standards: dict[tuple[str, ...], Standard] = field(default_factory=dict)
    """By the dtypes that the artifact stores, and by its files if it is held to itself."""

    def __post_init__(self) -> None:
        self.ran.append(self.known.info)
        if self.known.strange and self.known.strange[0] > self.max_ratio:
            self.problems.append(self.known.strange[1])

    def compare(self, subject: Subject) -> None:
        """Run it, and add what that shows."""
        artifact = subject.checkpoint
        explained = self.explained
        if explained is None:
            explained = self.original.judged_as_stored(artifact)
        if not artifact.complete:
            explained = None
        standard = self._standard(artifact, itself=explained is not None)
        runtime = _open(subject)
        self.ran.append(info(runtime, "artifact"))
        runs = self._run(runtime, standard)
        judged = self._judged(runs, standard)
        if self.criterion is not None:
            self._hold_to(self.criterion, runs, judged)
        else:
            links = self._links(subject, runtime, standard, judged, explained)
            self.evidence += links
            stored_differs = any((e.link, e.outcome) == ("route", "differs") for e in self.evidence)
            if explained is not None and stored_differs:
                judged = [of_other_weights(result, self.max_ratio) for result in judged]
        self.probes += judged
        names = {result.name for result in judged if not result.passed}
        self.failed += [(probe, subject) for probe in self.known.true.probes if probe.name in names]
        if artifact.graph is not None and subject.name not in self.alike:
            self._compare_outputs(subject, runtime)

    def _standard(self, artifact: Checkpoint, *, itself: bool) -> Standard:
        key = tuple(map(artifact.code, artifact.slots))
        if itself:
            key += tuple(sorted({str(stored.file) for stored in artifact.stored.values()}))
        if key not in self.standards:
            true, own, noise = self.known.true, self.known.own, self.known.noise
            self.standards[key] = standard_for(
                self.route, artifact, true, own, noise, self.seed, self.say, itself=itself
            )
        standard = self.standards[key]
        if self.criterion is None:
            return standard
        # What is lossy in any way is held to the original itself.
        return replace(standard, reference=self.known.true, costs=[None] * len(standard.costs))

    def _run(self, runtime: Runtime, standard: Standard) -> list[Errors | None]:
        """Every probe that the runtime can run; None for the others."""
        runs: list[Errors | None] = []
        for index, probe in enumerate(standard.reference.probes):
            if not runtime.runs(probe):
                runs.append(None)
                continue
            logits = logits_of(runtime, probe, self.say)
            margin = 2 * standard.floors[index].max_abs
            runs += measure(standard.reference, index, [logits], margin=margin)
        return runs

    def _judged(self, runs: Sequence[Errors | None], standard: Standard) -> list[ProbeResult]:
        return [
            probe_result(
                self.known.true.probes[index], self.ran[-1].what, run, standard.honest[index],
                standard.floors[index], self.max_ratio, standard.costs[index], self.criterion,
            )
            for index, run in enumerate(runs)
            if run is not None
        ]  # fmt: skip

    def _hold_to(
        self, criterion: Criterion, runs: Sequence[Errors | None], judged: Sequence[ProbeResult]
    ) -> None:
        """The limits that were stated, which no link is needed for."""
        self.problems += [sentence for sentence in [failures(judged)] if sentence]
        pairs = zip(self.known.true.probes, runs, strict=True)
        texts = sum(probe.text and run is not None for probe, run in pairs)
        self.problems += criterion.exceeded_by_all([run for run in runs if run], texts)

    def _links(
        self,
        subject: Subject,
        runtime: Runtime,
        standard: Standard,
        judged: Sequence[ProbeResult],
        explained: Sequence[str] | None,
    ) -> list[Evidence]:
        """The three links of a subject that take running it."""
        route, artifact, true = self.route, subject.checkpoint, self.known.true
        same = subject.name in self.same
        name = runtime.what if artifact.graph is None else f"{subject.name} (onnxruntime)"
        found = [_arithmetic(name, judged, self.max_ratio)]
        self.say(f"{runtime.what}: float64")
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
                seed=self.seed,
            )
        )
        routed = any((e.subject, e.link) == (subject.name, "route") for e in self.evidence)
        examined = None if routed else self.original.examined(artifact)
        if examined is not None:
            found.append(replace(examined, subject=subject.name))
        elif not routed:
            rounded = stored if artifact.complete and not same else None
            if rounded is not None and not moved and standard.reference is true:
                expected = forward(route.into(artifact), list(few.values()), dtype=torch.float64)
            found.append(
                examine_route(
                    route, subject.name, artifact, true, standard, expected, rounded, same=same,
                    explained=explained, known=subject.ours, limit=self.max_ratio, seed=self.seed,
                    say=self.say,
                )
            )  # fmt: skip
        # Where no software here runs the layout, or nothing but NaN comes out, there is no program to see.
        seen = runtime.name != "neoconvert" and any(result.compared for result in judged)
        return [
            replace(item, required=subject.ours and (seen or item.link != "program"))
            for item in found
        ]

    def _compare_outputs(self, subject: Subject, runtime: Runtime) -> None:
        """A graph's outputs beside the logits, for which its program link then stands too."""
        from converter.verification.outputs import compare_outputs

        off, left = compare_outputs(
            self.route, subject, runtime, self.known.true, self.seed,
            same=subject.name in self.same, lossy=self.criterion is not None,
        )  # fmt: skip
        passed = [(e.subject, e.link, "same") for e in off]
        kept = [e for e in self.evidence if (e.subject, e.link, e.outcome) not in passed]
        self.evidence = [*kept, *off]
        self.remarks += left


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
