"""An artifact against its original: both layers, and where they part."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converter.checkpoint import Checkpoint
from converter.choices import flags, of_kind, one_of
from converter.errors import MissingTensor, UsageError
from converter.opening import Given, open_artifact
from converter.progress import Progress, silent
from converter.route import Route
from converter.routing import between, unprocessed
from converter.verification.criterion import STATE_IT, Criterion
from converter.verification.judge import MAX_RATIO
from converter.verification.probes import (
    EFFORTS,
    Effort,
    Probe,
    standard_probes,
    text_probes,
)
from converter.verification.result import Divergence, Layers, Verification
from converter.verification.subjects import (
    RUNTIMES,
    Subject,
    graph_name,
    graphs_of,
    subjects_of,
)
from converter.verification.weights import (
    WeightCheck,
    compare_structure,
    compare_weights,
    joined,
    require_same_sizes,
)

if TYPE_CHECKING:
    import torch

CHECKS = ("weights", "function")


def verify(
    original: Given,
    artifact: Given,
    *,
    route: Route | None = None,
    checks: Collection[str] | str = CHECKS,
    device: str | torch.device = "auto",
    runtime: str | None = None,
    pythons: Sequence[str | Path] | str | Path = (),
    max_ratio: float | None = None,
    effort: Effort = "standard",
    text: str | Path | None = None,
    layers: bool = False,
    seed: int = 0,
    probes: Sequence[Probe] | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_perplexity_ratio: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare an artifact with the checkpoint it was made from.

    An artifact is a checkpoint of any layout or an ONNX file (`converter.open_artifact`). A
    directory that holds weights and a graph is checked in torch and in onnxruntime, and so is each
    graph of a directory that holds several.

    For artifacts that are lossy on purpose, limits may be stated (`Criterion`). They take the place
    of float32's noise: weights are compared and told, and decide nothing.

    Args:
        route: how the artifact was made from the original; None: as its provenance says.
        checks: any of "weights" (bit for bit, config included) and "function".
        device: "auto", "cpu", "cuda" or "cuda:N".
        runtime: "torch" or "onnxruntime" alone; None: whatever the artifact has something for.
        pythons: interpreters of other environments that run the artifact too.
        max_ratio: how many times float32's own noise the artifact may be off (MAX_RATIO).
        effort: how much is run; see `standard_probes`.
        text: a file of the user's own, probed as well.
        layers: measure the error after each layer even where nothing failed.
        probes: instead of the standard ones.
        max_kl: the largest KL(original || artifact) of a probe, in nats.
        min_top1: the least share of positions with the same most likely token.
        max_perplexity_ratio: the artifact's perplexity over the original's, on texts.

    Raises:
        TensorMismatch: the sizes differ: these cannot be the same model.
        UsageError: no check, or no probe, was asked for.
        CannotDoHere: the device or runtime asked for is not here.
        VerificationFailed: the artifact does not even load in its software.
        BadInput: the original does not; a text without a tokenizer to read it.
    """
    of_kind(checks, Collection, "--check", f"Name {' or '.join(CHECKS)}.")
    checks = (checks,) if isinstance(checks, str) else checks
    pythons = (pythons,) if isinstance(pythons, (str, Path)) else pythons
    of_kind(seed, int, "seed", "Give a whole number.")
    flags({"layers": layers})
    if not checks or set(checks) - set(CHECKS):
        raise UsageError(
            f"Nothing to check: {', '.join(sorted(checks)) or 'no check'}.",
            where="--check",
            do=f"Name {' or '.join(CHECKS)}.",
        )
    original, artifact = open_artifact(original), open_artifact(artifact)
    one_of(effort, EFFORTS, "--effort")
    if runtime is not None:
        one_of(runtime, RUNTIMES, "--runtime")
    limit = MAX_RATIO if max_ratio is None else max_ratio
    of_kind(limit, (int, float), "--max-ratio", "Give a number above 0.")
    if text is not None:
        of_kind(text, (str, Path), "--text", "Give a file of UTF-8 text.")
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
    say = progress or silent
    _require_readable(original)
    require_same_sizes(original, artifact)
    told = route is not None  # else a claim, which may be about another original
    route = route or between(original, artifact)
    result = Verification(
        passed=False, runtimes=(), probes=(), weights=None, first_divergence=None,
        max_ratio=limit, effort=effort,
        original=original.source.given, artifact=artifact.source.given, criterion=criterion,
    )  # fmt: skip
    if "weights" in checks:
        graphs = [] if runtime == "torch" else graphs_of(artifact)
        result, route = _with_weights(result, route, artifact, graphs, told, say)
    if "function" in checks:
        if probes is None:
            probes = standard_probes(original.config, _tokenizer(original, artifact), seed, effort)
        if text is not None:
            probes = [
                *probes,
                *text_probes(original.config, _tokenizer(original, artifact), Path(text)),
            ]
        if not probes:
            raise UsageError("There is no probe to run.", where="probes", do="Give at least one.")
        subjects = subjects_of(artifact, str(device), runtime, [Path(python) for python in pythons])
        result = _with_function(result, route, subjects, probes, str(device), seed, layers, say)
    return replace(result, passed=not result.problems)


def _with_weights(
    result: Verification,
    route: Route,
    artifact: Checkpoint,
    graphs: Sequence[Checkpoint],
    told: bool,
    say: Progress,
) -> tuple[Verification, Route]:
    """The artifact's weights, and those of each graph that has weights of its own; and the route
    that they show. `told`: the route is known, and no claim.
    """
    lossy = result.criterion is not None
    others = [graph for graph in graphs if graph is not artifact]
    known = [artifact, *(graph for graph in others if not _shares(graph, artifact))]
    remarks: list[str] = list(result.remarks)
    checked: list[WeightCheck] = []
    problems: list[str] = []
    for one in known:
        if one.graph and not one.complete and one.source.provenance is None:
            remarks.append(
                f"{one.graph_file}: another exporter's graph, whose weights have no names that"
                " could be compared. Its function was."
            )
        else:
            checked.append(compare_weights(route, one, say, partial=lossy))
            if one is artifact and not (checked[0].passed or told or lossy):
                checked[0], route, more = _by_weights_alone(checked[0], route, artifact, say)
                remarks += more
            if one is not artifact:
                name = graph_name(one, artifact)
                problems += [f"{name}: {p}" for p in _weight_problems(checked[-1])]
    for graph in graphs if checked else ():
        checked.append(compare_structure(route, graph))
        remarks += _unknown_nodes(graph)
    if not checked:
        return replace(result, remarks=tuple(remarks)), route
    weights = joined(checked)
    if not problems or weights.config or weights.nodes:
        problems += _weight_problems(weights)
    if lossy:
        remarks += _left_to_limits(weights, known)
        problems = (
            _weight_problems(replace(weights, mismatches=(), nodes=())) if weights.compared else []
        )
    result = replace(
        result,
        weights=weights,
        problems=(*result.problems, *problems),
        remarks=tuple(remarks),
        first_divergence=None if lossy else _first(weights),
    )
    return result, route


def _left_to_limits(check: WeightCheck, known: Sequence[Checkpoint]) -> list[str]:
    """What the weights show where limits decide."""
    remarks = ["With limits stated, weights are not held to the original's bits."]
    absent = sum(
        sum(key not in one.stored and not slot.absence for key, slot in one.slots.items())
        for one in known
        if not one.complete
    )
    if absent:
        remarks.append(f"{absent} tensors are quantised or renamed, and could not be compared.")
    if check.mismatches:
        remarks.append(
            f"{len(check.mismatches)} tensors that are there by name differ from the original's,"
            f" first {check.mismatches[0].tensor}."
        )
    if check.nodes:
        remarks.append(f"{len(check.nodes)} nodes of the graph are not what its config makes them.")
    return remarks


def _by_weights_alone(
    check: WeightCheck, route: Route, artifact: Checkpoint, say: Progress
) -> tuple[WeightCheck, Route, list[str]]:
    """The artifact is not what it says, or does not say what it is. It may be the original
    unprocessed, or by other steps, ours or TransformerLens's; what these do not account for stays a
    mismatch."""
    claims = bool((artifact.source.provenance or {}).get("route"))
    wrong = "Its neoconvert.json does not lead from this original to it. " if claims else ""
    raw = unprocessed(route.source, artifact)
    same = compare_weights(raw, artifact, say)
    if same.passed:
        return same, raw, [wrong + "It has the original's own weights."] if claims else []
    if not artifact.complete:
        return check, route, []
    from converter.explaining import account

    with np.errstate(invalid="ignore", over="ignore"):  # NaN is what may be wrong
        found = account(route.source, artifact, say)
    if found is None:
        return check, route, []
    made = compare_weights(found.route, artifact, say)
    if found.ours(len(made.mismatches)):
        return made, found.route, [wrong + found.remark] if made.passed else []
    left = tuple(m for m in made.mismatches if {m.key, m.tensor} & found.left)
    if left and len(left) >= len(check.mismatches):
        return check, route, []  # other weights altogether
    remark = (wrong or "The artifact does not say how it was made. ") + found.remark
    config = made.config
    return (
        replace(made, mismatches=left, config=config, explained=found.steps),
        found.route,
        [remark],
    )


def _unknown_nodes(graph: Checkpoint) -> list[str]:
    from converter.onnx.opening import reader_of
    from converter.onnx.structure import written_here

    if written_here(graph):
        return []
    file = reader_of(graph).file
    producer = file.producer or "an unknown program"
    return [
        f"{graph.graph_file} says that {producer} wrote it, so its nodes were not compared; what it"
        " computes is judged by its function alone."
    ]


def _shares(graph: Checkpoint, artifact: Checkpoint) -> bool:
    """Whether a graph's weights are the artifact's own bytes."""
    return {s.file for s in graph.stored.values()} <= {s.file for s in artifact.stored.values()}


def _with_function(
    result: Verification,
    route: Route,
    subjects: Sequence[Subject],
    probes: Sequence[Probe],
    device: str,
    seed: int,
    layers: bool,
    say: Progress,
) -> Verification:
    from converter.verification.function import compare_function
    from converter.verification.locate import layers_of, locate

    checked = result.weights
    same = checked is not None and checked.passed and checked.explained is None
    ran = compare_function(
        route, subjects, probes, device=device, max_ratio=result.max_ratio, seed=seed, say=say,
        same_weights=same, explained=checked.explained if checked else None,
        criterion=result.criterion,
    )  # fmt: skip
    problems, remarks = list(ran.problems), list(result.remarks)
    for graph in (s.checkpoint for s in subjects if s.checkpoint.graph):
        from converter.verification.onnx_runtime import left_out

        remarks += left_out(graph, probes)
    if ran.failed is not None and result.criterion is None:
        remarks += _how_to_state_limits(ran.failed[1].checkpoint)
    if ran.vacuous and (
        result.criterion is not None or not (result.weights is not None and result.weights.passed)
    ):
        problems.append("No log-probability is finite: nothing could be compared.")
    divergence = result.first_divergence
    measured: list[Layers] = []
    if ran.failed is not None and result.criterion is None:
        say("finding where they part")
        probe, subject = ran.failed
        measured.append(layers_of(route, subject, probe, seed))
        divergence = divergence or locate(route, subject.checkpoint, measured[0], result.max_ratio)
    elif layers:
        say("error by layer")
        probe = max(probes, key=lambda p: (p.tokens.size <= 600, p.tokens.size))
        measured += [layers_of(route, subject, probe, seed) for subject in subjects]
    return replace(
        result,
        runtimes=ran.runtimes,
        probes=ran.probes,
        program=ran.program,
        remarks=tuple(remarks),
        problems=(*result.problems, *problems),
        first_divergence=divergence,
        layers=tuple(measured),
    )


def _how_to_state_limits(artifact: Checkpoint) -> list[str]:
    """What to do about a failed graph that is lossy on purpose."""
    if artifact.graph is None:
        return []
    from converter.onnx.opening import reader_of
    from converter.onnx.structure import written_here

    if written_here(artifact):
        return []
    count = reader_of(artifact).file.quantised
    what = f"is quantised ({count} nodes), and" if count else "may be lossy on purpose: if so,"
    return [
        f"{artifact.graph_file} {what} float32's noise is no measure for it. State limits that it"
        f" must keep, such as {STATE_IT}."
    ]


def _require_readable(original: Checkpoint) -> None:
    if not original.complete:
        raise MissingTensor(
            "The original is a graph whose weights have no names that say what they are.",
            where=original.source.given,
            do="Give the checkpoint that the graph was exported from.",
        )


def _tokenizer(*checkpoints: Checkpoint) -> Path | None:
    """The directory of the first tokenizer there is."""
    return next((c.source.path for c in checkpoints if c.source.tokenizer_files()), None)


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
    if check.nodes:
        problems.append(
            f"{len(check.nodes)} node(s) of the graph are not what its config makes them,"
            f" first {check.nodes[0]}."
        )
    if check.config:
        problems.append(f"The config differs in {', '.join(check.config)}.")
    return problems


def _first(check: WeightCheck) -> Divergence | None:
    if check.mismatches:
        return Divergence(check.mismatches[0].unit, check.mismatches[0].tensor)
    if check.nodes:
        from converter.onnx.structure import unit_of

        unit = unit_of(check.nodes[0])
        return Divergence(unit, None) if unit else None
    return None
