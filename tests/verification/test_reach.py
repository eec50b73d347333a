"""What the probes reach is counted for every runtime, and padding reaches nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import converter
from converter.checkpoint import open_checkpoint
from converter.verification.probes import Probe
from converter.verification.reach import Reach, reach_of
from tests.models import random_hf


def test_tokens_and_positions_are_counted(tmp_path: Path) -> None:
    config = open_checkpoint(random_hf(tmp_path / "hf")).config  # 37 tokens, 32 positions
    short = Probe("short", np.array([[3, 4, 3]]))
    last = Probe("last", np.array([[5, 6]]), start=30)
    padded = Probe("padded", np.array([[9, 9, 7, 8]]), mask=np.array([[False, False, True, True]]))
    probes = [short, last, padded]
    both = [("torch", "short"), ("onnx", "short"), ("onnx", "last"), ("torch", "padded")]
    assert reach_of(config, probes, both[:1]) == Reach(2, 37, 3, 32)
    assert reach_of(config, probes, both[1:3]) == Reach(4, 37, 5, 32)
    assert reach_of(config, probes, [("torch", "padded")]) == Reach(2, 37, 2, 32)
    assert reach_of(config, probes, both) == Reach(2, 37, 3, 32)  # in both
    fewest = reach_of(config, probes, both[:3])
    assert fewest == Reach(2, 37, 3, 32, "torch")
    assert str(fewest).endswith(" and 3 of 32 positions in torch, and more elsewhere.")
    assert reach_of(config, probes, []) is None
    assert str(Reach(2, 37, 3, 32)) == "The probes reach 2 of 37 tokens and 3 of 32 positions."
    assert str(Reach(37, 37, 3, 32)) == "The probes reach every token and 3 of 32 positions."


def test_a_verification_says_what_it_reached(tmp_path: Path) -> None:
    source = random_hf(tmp_path / "hf")
    quick = converter.verify(source, source, effort="quick", device="cpu").reached
    standard = converter.verify(source, source, device="cpu").reached
    assert quick is not None
    assert quick.tokens < quick.vocabulary == 37
    assert standard == Reach(37, 37, 32, 32)
    weights = converter.verify(source, source, checks=("weights",))
    assert weights.reached is None
    assert weights.to_json()["reached"] is None
