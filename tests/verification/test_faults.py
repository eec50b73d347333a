"""Every deliberate fault is caught, alone by what the artifact computes where that changes, and
blamed on the unit that it touches. One artifact for each here; `scripts/faults` has them all."""

from __future__ import annotations

import pytest

from tests.verification.fault import ALL, Artifact, Fault
from tests.verification.faults import FAULTS
from tests.verification.faulty import VISIBLE, Workshop, for_fault, here

pytestmark = pytest.mark.usefixtures("quick_collection")


def hardest(fault: Fault) -> Artifact | None:
    """A wrong architecture is hardest to see in a graph, which claims the right one and has the
    right weights. All else is alike in all artifacts (most within a few
    per cent, none by more than ten times), so these take turns."""
    possible = [artifact for artifact in fault.on if artifact in here()]
    if fault.config and not fault.harmless:
        return "onnx"
    return possible[FAULTS.index(fault) % len(possible)] if possible else None


CASES = [(fault, artifact) for fault in FAULTS if (artifact := hardest(fault))]


@pytest.mark.parametrize(("fault", "artifact"), CASES, ids=[f"{f.name}, {a}" for f, a in CASES])
def test_each_fault_is_caught_and_located_and_no_control_flagged(
    workshops: dict[str, Workshop], fault: Fault, artifact: Artifact
) -> None:
    outcome = for_fault(workshops, fault, artifact).judge(fault, artifact)
    assert outcome.wrong is None, outcome
    if fault.harmless:
        return
    assert outcome.function or outcome.weights
    assert outcome.function or (outcome.change is not None and outcome.change <= VISIBLE)
    assert outcome.weights or not fault.weights
    if fault.unit and outcome.unit:
        assert outcome.unit == fault.unit


def test_the_list_is_declared_soundly() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    for fault in FAULTS:
        assert set(fault.on) <= set(ALL)
        assert any((fault.weights, fault.config, fault.document, fault.graph, fault.software))
    assert {artifact for fault in FAULTS if fault.harmless for artifact in fault.on} == set(ALL)
