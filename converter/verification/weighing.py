"""The weights link and the structure link: what the files hold, without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from converter.checkpoint import Checkpoint
from converter.layout import is_tied_head
from converter.progress import Progress
from converter.route import Route
from converter.routing import unprocessed
from converter.verification.evidence import Evidence, NotComparable
from converter.verification.result import Divergence
from converter.verification.subjects import THE_WEIGHTS, graph_name, written_here
from converter.verification.weights import (
    Mismatch,
    WeightCheck,
    astray,
    compare_structure,
    compare_weights,
    joined,
    rounded_when_loaded,
)

if TYPE_CHECKING:
    from converter.verification.by_value import ByValue


@dataclass(frozen=True)
class Weighing:
    """What the files show."""

    route: Route
    """The one that they show."""
    check: WeightCheck | None
    """All that was compared by name, together."""
    evidence: tuple[Evidence, ...]
    remarks: tuple[str, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    """The units in which they part, each with its first tensor."""
    same: frozenset[str] = frozenset()
    """Subjects whose stored weights are known to be what the route makes, bit for bit."""


def weigh(
    route: Route,
    artifact: Checkpoint,
    graphs: Sequence[Checkpoint],
    *,
    known: bool,
    lossy: bool,
    say: Progress,
) -> Weighing:
    """Compare the artifact's weights and those of each graph, and each graph's nodes.

    Args:
        graphs: of the artifact, which may be one itself.
        known: the route is known, and no claim.
        lossy: limits were stated; weights are compared, and decide nothing.
    """
    evidence: list[Evidence] = []
    remarks: list[str] = []
    checks: list[WeightCheck] = []
    wrong: list[Mismatch] = []
    check: WeightCheck | None = None
    if artifact.graph is None or artifact.complete:
        check = _compared(route, artifact, lossy, say)
        if not (check.passed or known or lossy):
            check, route, more = _by_weights_alone(check, route, artifact, say)
            remarks += more
        # Of the weights in their own library: a graph that shares them is loaded as it is.
        loaded = replace(check, config=(*check.config, *rounded_when_loaded(route, artifact)))
        checks.append(loaded)
        name = THE_WEIGHTS if artifact.graph is None else graph_name(artifact, artifact)
        ours = known or written_here(artifact)
        ours &= check.unknown is None and not lossy
        own = replace(_weights(name, loaded, lossy), required=ours)
        if (lost := astray(artifact)) and lost.fails and own.outcome != "differs":
            own = Evidence.differing(name, "weights", lost.where, lost.said)
        evidence.append(own)
    for graph in graphs:
        name = graph_name(graph, artifact)
        nodes = compare_structure(route, graph)
        if check is not None and graph is not artifact and _shares(graph, artifact):
            evidence.append(_weights(name, check, lossy))
        elif not (graph.complete or nodes.ours or lossy):
            from converter.verification.by_value import compare_by_value

            try:
                found = compare_by_value(route, graph, say)
            except NotComparable as error:
                evidence.append(Evidence.not_comparable(name, "weights", error.why))
            else:
                wrong += found.wrong
                evidence.append(_by_value(found, name, graph))
        elif graph is not artifact or check is None:
            checks.append(_compared(route, graph, lossy, say))
            evidence.append(_weights(name, checks[-1], lossy))
        checks.append(nodes)
        evidence.append(replace(_structure(name, nodes, lossy), required=nodes.ours and not lossy))
    informative = [c for c in checks if c.compared or c.nodes or c.config]
    joint = joined(informative) if informative or check is not None else None
    if lossy and joint is not None:
        others = [graph for graph in graphs if graph is not artifact]
        joint = replace(joint, absent=_absent([artifact, *others]))
        remarks += _left_to_limits(joint)
    same = {e.subject for e in evidence if e.link == "weights" and e.outcome == "same"}
    if check is not None and check.explained is not None:
        same -= {THE_WEIGHTS, *(graph_name(g, artifact) for g in graphs)}
    return Weighing(
        route, joint, tuple(evidence), tuple(remarks), _parting(wrong, joint), frozenset(same)
    )


def _compared(route: Route, checkpoint: Checkpoint, lossy: bool, say: Progress) -> WeightCheck:
    if route.unknown is None:
        return compare_weights(route, checkpoint, say, partial=lossy)
    config = route.target_config.differences(checkpoint.config)
    return WeightCheck(0, (), config, explained=route.steps, unknown=route.unknown)


def _weights(subject: str, check: WeightCheck, lossy: bool) -> Evidence:
    name = f"{subject}: " if subject != THE_WEIGHTS else ""
    if check.config:
        why = f"{name}The config differs in {', '.join(check.config)}."
        return Evidence.differing(subject, "weights", f"config: {check.config[0]}", why)
    if lossy:
        return Evidence.not_comparable(subject, "weights", "limits decide, not the original's bits")
    if check.unknown is not None:
        return Evidence.not_comparable(subject, "weights", check.unknown)
    if not check.compared:
        return Evidence.differing(subject, "weights", "nothing", f"{name}No tensor was compared.")
    if check.mismatches:
        first, count = check.mismatches[0], len(check.mismatches)
        why = (
            f"{name}{count} of {check.compared} tensors"
            f" {'differs:' if count == 1 else 'differ, first'} {first.tensor}"
            f" ({first.unit}{', as the head' if is_tied_head(first.tensor, first.key) else ''})."
        )
        return Evidence.differing(subject, "weights", first.tensor, why)
    how = None if check.explained is None else "accounted for by their steps, beyond rounding"
    return Evidence(subject, "weights", "same", why=how)


def _parting(wrong: Sequence[Mismatch], check: WeightCheck | None) -> tuple[Divergence, ...]:
    units: dict[str, Divergence] = {}
    for mismatch in (*(check.mismatches if check else ()), *wrong):
        if mismatch.unit:
            units.setdefault(mismatch.unit, Divergence(mismatch.unit, mismatch.tensor))
    if not units and check is not None and check.nodes:
        from converter.onnx.structure import unit_of

        places = [unit_of(node) for node in check.nodes]
        # What serves several units, as a mask does, says nothing of any.
        units = {unit: Divergence(unit, None) for unit in places if unit} if all(places) else {}
    return tuple(units.values())


def _by_value(found: ByValue, subject: str, graph: Checkpoint) -> Evidence:
    total = found.found + len(found.missing)
    if found.wrong:
        first = found.wrong[0]
        key = graph.slots[first.key].name or first.key if first.key else None
        place = f", where {key} ({first.unit}) belongs" if key else ""
        why = (
            f"{subject}: {len(found.wrong)} of its weights are none of the original's, first"
            f" {first.tensor}{place}."
        )
        return Evidence.differing(subject, "weights", key or first.tensor, why)
    if found.missing:
        why = (
            f"{len(found.missing)} of {total} weights are not in it as they are, first"
            f" {found.missing[0]}; it may hold them fused or rounded"
        )
        return Evidence.not_comparable(subject, "weights", why)
    if found.more:
        why = f"beside the weights it holds {found.more[0]}, which might stand in for one"
        return Evidence.not_comparable(subject, "weights", why)
    return Evidence(subject, "weights", "same", why="found by their bits, under other names")


def _structure(subject: str, check: WeightCheck, lossy: bool) -> Evidence:
    if check.nodes and not lossy:
        why = (
            f"{subject}: {len(check.nodes)} node(s) of the graph are not what its config makes"
            f" them, first {check.nodes[0]}."
        )
        return Evidence.differing(subject, "structure", check.nodes[0], why)
    if check.config:
        why = f"{subject}: The config differs in {', '.join(check.config)}."
        return Evidence.differing(subject, "structure", f"config: {check.config[0]}", why)
    if check.unlike is not None or lossy:
        why = check.unlike or "limits decide, not its nodes"
        return Evidence.not_comparable(subject, "structure", why)
    return Evidence(subject, "structure", "same")


def _absent(known: Sequence[Checkpoint]) -> int:
    return sum(
        sum(key not in one.stored and not slot.absence for key, slot in one.slots.items())
        for one in known
        if not one.complete
    )


def _left_to_limits(check: WeightCheck) -> list[str]:
    """What the weights show where limits decide."""
    remarks = ["With limits stated, weights are not held to the original's bits."]
    if check.absent:
        remarks.append(
            f"{check.absent} tensors are quantised or renamed, and could not be compared."
        )
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
    from converter.verification.account import account

    with np.errstate(invalid="ignore", over="ignore"):  # NaN is what may be wrong
        found = account(route.source, artifact, say)
    if found is None:
        return check, route, []
    made = compare_weights(found.route, artifact, say)
    if found.ours(len(made.mismatches), claims=claims):
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


def _shares(graph: Checkpoint, artifact: Checkpoint) -> bool:
    """Whether a graph's weights are the artifact's own bytes. A graph that points elsewhere in a
    safetensors file than its names say does not open."""
    from converter.onnx.opening import reader_of

    if not graph.complete or graph.layout != artifact.layout or reader_of(graph).turned:
        return False
    own = artifact.stored
    return all(
        key in own and (mine.name, mine.file) == (own[key].name, own[key].file)
        for key, mine in graph.stored.items()
    )
