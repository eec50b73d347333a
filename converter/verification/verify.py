"""An artifact against its original: every link of every subject, and where they part."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from converter.checkpoint import Checkpoint
from converter.choices import Check, Effort, RuntimeName, flags, of_kind, one_of, place, seed_of
from converter.errors import MissingTensor, UsageError
from converter.opening import Given, open_artifact
from converter.progress import Progress, silent
from converter.route import Route
from converter.verification.criterion import Criterion
from converter.verification.evidence import LINKS, Evidence, problems
from converter.verification.judge import MAX_RATIO
from converter.verification.original import Original, original_of
from converter.verification.probes import Probe
from converter.verification.reach import reach_of
from converter.verification.remarks import how_to_state_limits, what_is_astray, where_it_runs
from converter.verification.result import Divergence, Layers, Verification
from converter.verification.subjects import Subject, graphs_of, subjects_of
from converter.verification.weighing import Weighing, weigh
from converter.verification.weights import require_same_sizes

if TYPE_CHECKING:
    import torch

CHECKS: tuple[Check, ...] = get_args(Check)


def verify(
    original: Given | Original,
    artifact: Given,
    *,
    route: Route | None = None,
    checks: Collection[str] | str = CHECKS,
    device: str | torch.device = "auto",
    runtime: str | None = None,
    pythons: Sequence[str | Path] | str | Path = (),
    max_ratio: float | None = None,
    effort: Effort | None = None,
    text: str | Path | None = None,
    layers: bool = False,
    seed: int = 0,
    probes: Sequence[Probe] | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_perplexity_ratio: float | None = None,
    require: Collection[str] | str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare an artifact with the checkpoint it was made from.

    An artifact is a checkpoint of any layout or an ONNX file (`converter.open_artifact`). A
    directory that holds weights and a graph is checked in torch and in onnxruntime, and so is each
    graph of a directory that holds several.

    For artifacts that are lossy on purpose, limits may be stated (`Criterion`). They take the place
    of float32's noise: weights are compared, and decide nothing.

    Args:
        original: as an `Original`, it is run once for all artifacts that are verified with it.
        route: how the artifact was made from the original; None: as its provenance says.
        checks: any of "weights" (bit for bit, config included) and "function".
        device: "auto", "cpu", "cuda" or "cuda:N".
        runtime: "torch" or "onnxruntime" alone; None: whatever the artifact has something for.
        pythons: interpreters of other environments that run the artifact's weights too.
        max_ratio: how many times float32's own noise the artifact may be off (MAX_RATIO).
        effort: how much is run, see `standard_probes`; None: "standard", or what a reference file holds.
        text: a file of the user's own, probed as well.
        layers: measure the error after each layer even where nothing failed.
        probes: instead of the standard ones.
        max_kl: the largest KL(original || artifact) of a probe, in nats.
        min_top1: the least share of positions with the same most likely token.
        max_perplexity_ratio: the artifact's perplexity over the original's, on texts.
        require: links that must be compared (`evidence.LINKS`); None: all of what neoconvert wrote.

    Raises:
        TensorMismatch: the sizes differ: these cannot be the same model.
        UsageError: no check, or no probe, was asked for; or an interpreter, where no weights are run.
        CannotDoHere: the device or runtime asked for is not here.
        BadInput: its software does not load the original, or the artifact; a text without a
            tokenizer to read it.
        VerificationFailed: the artifact stops while it runs; or it does not load, and `route` says
            that it was made just now.
    """
    of_kind(checks, Collection, "--check", f"Name {' or '.join(CHECKS)}.")
    checks = (checks,) if isinstance(checks, str) else checks
    require = None if require is None else _links(require)
    pythons = (pythons,) if isinstance(pythons, (str, Path)) else pythons
    seed = seed_of(seed)
    flags({"layers": layers})
    if not checks or set(checks) - set(CHECKS):
        raise UsageError(
            f"Nothing to check: {', '.join(sorted(checks)) or 'no check'}.",
            where="--check",
            do=f"Name {' or '.join(CHECKS)}.",
        )
    known = original if isinstance(original, Original) else original_of(original)
    original, artifact = known.checkpoint, open_artifact(artifact)
    effort = known.effort if effort is None else effort
    one_of(effort, get_args(Effort), "--effort")
    if runtime is not None:
        one_of(runtime, get_args(RuntimeName), "--runtime")
    limit = MAX_RATIO if max_ratio is None else max_ratio
    of_kind(limit, (int, float), "--max-ratio", "Give a number above 0.")
    words = None if text is None else place(text, "--text", "Give a file of UTF-8 text.")
    if not 0 < limit < math.inf:
        raise UsageError(
            f"{limit} is no multiple of the noise floor.", where="--max-ratio", do="Give a number above 0."
        )  # fmt: skip
    criterion = Criterion.of(max_kl, min_top1, max_perplexity_ratio)
    if criterion is not None and "function" not in checks:
        raise UsageError(
            "Limits are for the function, which is not checked.",
            where="--check weights",
            do="Leave --check out.",
        )
    if pythons and "function" not in checks:
        raise UsageError(
            "Other interpreters run the function, which is not checked.",
            where="--check weights",
            do="Leave --check or --python out.",
        )
    say = progress or silent
    require_readable(original)
    require_same_sizes(original, artifact)
    stated = route is not None  # else a claim, which may be about another original
    route = route or known.route(artifact)
    result = Verification(
        passed=False, runtimes=(), probes=(), weights=None, max_ratio=limit, effort=effort,
        original=original.source.given, artifact=artifact.source.given, criterion=criterion,
        remarks=(*known.remarks, *what_is_astray(artifact, checks)),
    )  # fmt: skip
    weighing = None
    if "weights" in checks:
        graphs = [] if runtime == "torch" else graphs_of(artifact)
        weighing = weigh(
            route,
            artifact,
            graphs,
            known=stated or not known.here,
            lossy=criterion is not None,
            say=say,
        )
        route, check = weighing.route, weighing.check
        result = replace(
            result, weights=check, evidence=weighing.evidence,
            remarks=(*result.remarks, *weighing.remarks),
            divergences=() if criterion else weighing.divergences,
        )  # fmt: skip
    if "function" in checks:
        probes = known.probes(artifact, seed, effort, words, probes)
        if not probes:
            raise UsageError("There is no probe to run.", where="probes", do="Give at least one.")
        subjects = subjects_of(
            artifact,
            str(device),
            runtime,
            [place(python, "--python", "Name an interpreter.") for python in pythons],
            just_written=stated,
        )
        if stated and not any(subject.takes_positions for subject in subjects):
            # No other artifact of this original is verified with it, which might run them.
            probes = [probe for probe in probes if not probe.start]
        result = _run(
            result, route, known, subjects, probes, weighing, str(device), seed, layers, say
        )
    evidence = tuple(
        item if require is None else replace(item, required=item.link in require)
        for item in result.evidence
    )
    found = (*result.problems, *problems(evidence, require or ()))
    remarks = (*result.remarks, *where_it_runs(artifact.layout, result, evidence))
    return replace(result, evidence=evidence, remarks=remarks, problems=found, passed=not found)


def _links(require: Collection[str] | str) -> list[str]:
    """Of "weights,structure", or of several such."""
    of_kind(require, Collection, "--require", f"Name any of {', '.join(LINKS)}.")
    given = (require,) if isinstance(require, str) else require
    names = [name.strip() for some in given for name in str(some).split(",")]
    for name in names:
        one_of(name, LINKS, "--require")
    return names


def _run(
    result: Verification,
    route: Route,
    original: Original,
    subjects: Sequence[Subject],
    probes: Sequence[Probe],
    weighing: Weighing | None,
    device: str,
    seed: int,
    layers: bool,
    say: Progress,
) -> Verification:
    """The function: what running the subjects adds to what is known."""
    from converter.verification.function import compare_function
    from converter.verification.locate import faulty_units, layers_of

    checked = result.weights
    ran = compare_function(
        route, original, subjects, probes, device=device, max_ratio=result.max_ratio, seed=seed, say=say,
        same=weighing.same if weighing else (),
        alike=[e.subject for e in result.evidence if (e.link, e.outcome) == ("structure", "same")],
        explained=checked.explained if checked else None, criterion=result.criterion,
    )  # fmt: skip
    more, remarks = list(ran.problems), [*result.remarks, *ran.remarks]
    for graph in (s.checkpoint for s in subjects if s.checkpoint.graph):
        from converter.verification.onnx_runtime import inputs_lacking

        remarks += inputs_lacking(graph, probes)
    evidence = (*result.evidence, *ran.evidence)
    lossy = result.criterion is not None
    if ran.failed and not lossy:
        remarks += how_to_state_limits(ran.failed[0][1].checkpoint)
    if ran.vacuous and (lossy or not (checked is not None and checked.passed)):
        more.append("No log-probability is finite: nothing could be compared.")
    divergences = result.divergences
    measured: list[Layers] = []
    if not original.here:
        if ran.failed or layers:
            what = "In which layer they part" if ran.failed else "What each layer adds"
            remarks.append(f"{what} is not told by a reference file; the original itself tells.")
    elif not lossy and (ran.failed or any(e.outcome == "differs" for e in ran.evidence)):
        say("finding where they part")
        longest = max(probes, key=lambda p: (p.tokens.size <= 600, p.tokens.size))
        failed = ran.failed or [(longest, subject) for subject in subjects]
        probe, subject = failed[0]
        measured.append(layers_of(route, subject, probe, seed))
        found = faulty_units(
            route,
            failed,
            measured[0],
            result.max_ratio,
            exact=not ran.failed and not (checked and checked.explained is not None),
        )
        weighed = {d.unit: d for d in divergences}
        divergences = tuple(d if d.tensor else weighed.get(d.unit, d) for d in found) or divergences
        divergences = divergences or _at_outputs(ran.evidence)
    elif layers:
        say("error by layer")
        probe = max(probes, key=lambda p: (p.tokens.size <= 600, p.tokens.size))
        measured += [layers_of(route, subject, probe, seed) for subject in subjects]
    pairs = [(found.runtime, found.name) for found in ran.probes]
    return replace(
        result, runtimes=ran.runtimes, probes=ran.probes, reached=reach_of(original.checkpoint.config, probes, pairs),
        evidence=evidence, remarks=tuple(remarks),
        problems=(*result.problems, *more), divergences=divergences, layers=tuple(measured),
    )  # fmt: skip


def _at_outputs(evidence: Sequence[Evidence]) -> tuple[Divergence, ...]:
    """Where the outputs of graphs part that have hook points' names."""
    from converter.onnx.structure import unit_of

    wrong = [e.where for e in evidence if (e.link, e.outcome) == ("program", "differs") and e.where]
    units = dict.fromkeys(unit for unit in map(unit_of, wrong) if unit)
    return tuple(Divergence(unit, None) for unit in units)


def require_readable(original: Checkpoint) -> None:
    if not original.complete:
        raise MissingTensor(
            "The original is a graph whose weights have no names that say what they are.",
            where=original.source.given,
            do="Give the checkpoint that the graph was exported from.",
        )
