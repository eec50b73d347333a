"""After every subset of steps, the function is the original's in the software users run."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from converter.convert import bake, hf_to_tl, tl_to_hf
from converter.processing import STEPS
from tests.models import random_hf

SUBSETS = [c for n in range(1, 6) for c in combinations([step.name for step in STEPS], n)]
LAYOUTS = ("hooked", "bridge", "hf")


@pytest.mark.parametrize(("subset", "layout"), [
    (subset, LAYOUTS[i % 3]) for i, subset in enumerate(SUBSETS)
] + [(SUBSETS[-1], layout) for layout in LAYOUTS])  # fmt: skip
def test_function_there_and_back(subset: tuple[str, ...], layout: Any, tmp_path: Path) -> None:
    """Each conversion verifies itself: HookedTransformer under TL 3, TransformerBridge, HF."""
    random_hf(tmp_path / "hf", seed=len(subset), vocab_size=23)
    options: dict[str, Any] = {"process": ",".join(subset), "ledger": "none"}
    if layout == "hf":
        done = bake(tmp_path / "hf", tmp_path / "out", **options)
    else:
        done = hf_to_tl(tmp_path / "hf", tmp_path / "out", layout=layout, **options)
    assert done.verification is not None
    assert len(done.verification.probes) >= 8
    assert done.plan.steps == subset
    if layout != "hf":
        back = tl_to_hf(tmp_path / "out", tmp_path / "back")
        assert back.verification is not None
        assert back.verification.passed
