"""A reference file judges as its original does: every fault is caught, no honest artifact flagged."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.honest import KINDS, honest
from tests.verification.fault import Artifact, Fault
from tests.verification.faulty import Workshop, for_fault
from tests.verification.test_faults import CASES

pytestmark = pytest.mark.usefixtures("quick_collection")


@pytest.mark.parametrize(("fault", "artifact"), CASES, ids=[f"{f.name}, {a}" for f, a in CASES])
def test_each_fault_is_caught_and_no_control_flagged(
    workshops: dict[str, Workshop], fault: Fault, artifact: Artifact
) -> None:
    outcome = for_fault(workshops, fault, artifact).judge(fault, artifact, recorded=True)
    assert outcome.wrong is None, outcome


@pytest.mark.parametrize("seed", [*range(len(KINDS)), 12, 54, 97])
def test_an_honest_conversion_is_not_flagged(tmp_path: Path, seed: int) -> None:
    found = honest(seed, tmp_path, recorded=True)
    assert found.result is not None, f"refused: {found.what}"
    assert found.result.passed, f"{found.what}\n{found.result.summary()}"
    assert found.ratios
