"""Processing that is wrong by less than float32 can see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.processing import in_order
from converter.route import Made, Processing, Tensors
from converter.routing import processing
from converter.verification import verify


class Off(Processing):
    """Makes W_in of block 1 too large by one part in a hundred million."""

    def make(self, unit: Tensors, layer: int | None) -> Made:
        made = super().make(unit, layer)
        if layer != 1:
            return made
        return replace(
            made, tensors={**made.tensors, "mlp.W_in": made.tensors["mlp.W_in"] * (1 + 1e-8)}
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_processing_is_looked_at_before_it_is_rounded(
    original: Checkpoint, tmp_path: Path, dtype: str
) -> None:
    converter.hf_to_tl(original, tmp_path / "tl", process="default", dtype=dtype, check=False)
    artifact = open_checkpoint(tmp_path / "tl")
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    right = processing(original, in_order(steps), "hooked")
    wrong = Off(**vars(right))
    for route, outcome in ((right, "same"), (wrong, "differs")):
        result = verify(original, artifact, route=route, checks=["function"], effort="quick")
        assert all(probe.passed for probe in result.probes)
        (evidence,) = (e for e in result.evidence if e.link == "route")
        assert evidence.outcome == outcome, evidence
        assert result.passed == (outcome == "same")
    assert evidence.why is not None
    assert evidence.why.startswith("Before rounding, ")
