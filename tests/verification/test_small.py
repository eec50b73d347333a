"""A thousandth of a fault, and one unit in the last place of one weight: caught by what is measured
in float64 alone, in the right unit. A few here; `scripts/small_faults` has them all."""

from __future__ import annotations

import pytest

from tests.verification.fault import Artifact, Fault
from tests.verification.faults import BY_NAME
from tests.verification.faulty import Workshop, here
from tests.verification.small import ULPS, judge, smaller

SCALED: tuple[tuple[str, Artifact], ...] = (
    ("heads of W_K permuted", "hf"),
    ("b_out dropped", "baked"),
    ("a token's embedding is its neighbour's", "baked"),
    ("NaN in a token's embedding", "hf"),
    ("epsilon 1e-6", "onnx"),
    ("graph: scores halved", "onnx"),
    ("graph: epsilon 1e-6 in one LayerNorm", "onnx"),
    ("software: HookedTransformer scales scores", "hooked"),
    ("software: TransformerBridge with another epsilon", "bridge"),
    ("ln2 bias folded twice", "processed"),
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("small"), "tied")


@pytest.mark.parametrize(("name", "artifact"), SCALED)
def test_a_thousandth_is_caught(workshop: Workshop, name: str, artifact: Artifact) -> None:
    if artifact not in here():
        pytest.skip("its software is for another TransformerLens")
    fault = smaller(BY_NAME[name])
    assert fault is not None
    found = judge(workshop, fault, artifact)
    assert found is not None
    assert found.times > 1
    assert found.wrong is None, found


@pytest.mark.parametrize("fault", ULPS, ids=lambda fault: fault.name)
def test_one_unit_in_the_last_place_is_caught(workshop: Workshop, fault: Fault) -> None:
    number = ULPS.index(fault)
    possible = [a for a in fault.on if a in here() and workshop.applies(fault, a)]
    if not possible:
        pytest.skip("no artifact here stores it")
    found = judge(workshop, fault, possible[number % len(possible)])
    assert found is not None
    assert found.wrong is None, found
