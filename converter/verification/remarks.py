"""What a person should know beside the verdict, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from converter.checkpoint import Checkpoint
from converter.layout import Layout
from converter.verification.criterion import STATE_IT
from converter.verification.evidence import Evidence
from converter.verification.loading import NEEDS
from converter.verification.result import Verification
from converter.verification.subjects import written_here
from converter.verification.weights import astray


def what_is_astray(artifact: Checkpoint, checks: Collection[str]) -> list[str]:
    """What transformers would not find in the artifact, unless it is a difference of weights."""
    lost = astray(artifact)
    return [lost.said] if lost and not (lost.fails and "weights" in checks) else []


def how_to_state_limits(artifact: Checkpoint) -> list[str]:
    """What to do about a failed graph that is lossy on purpose."""
    if artifact.graph is None or written_here(artifact):
        return []
    from converter.onnx.opening import reader_of

    count = reader_of(artifact).file.quantised
    what = f"is quantised ({count} nodes), and" if count else "may be lossy on purpose: if so,"
    return [
        f"{artifact.graph_file} {what} float32's noise is no measure for it. State limits that it"
        f" must keep, such as {STATE_IT}."
    ]


def where_it_runs(layout: Layout, result: Verification, evidence: Sequence[Evidence]) -> list[str]:
    """What to do where the software is required, and was not there."""
    missing = {ran.what for ran in result.runtimes if ran.name == "neoconvert"}
    if not any(e.problem and e.link == "program" and e.subject in missing for e in evidence):
        return []
    return [
        f"The {layout} layout needs {NEEDS[layout]}: name the python of an environment that has it"
        " with --python, and none that has not."
    ]
