"""Weights of graphs that name them as they like, and of graphs that share them: no run is needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.numpy_helper import from_array, to_array

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import TensorMismatch
from converter.onnx import export
from converter.verification import Verification, verify
from converter.verification.evidence import Evidence
from tests.models import random_hf
from tests.onnx_.test_opening import renamed

Change = Callable[[onnx.ModelProto], Any]
WEIGHTS: dict[str, Any] = {"checks": ["weights"]}


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    """Its width is not its context's length, nor another of its axes."""
    return open_checkpoint(random_hf(tmp_path / "m", seed=3, scale=1.5, tied=False))


def foreign(tiny: Checkpoint, tmp_path: Path, change: Change | None = None) -> Path:
    """Our graph as another exporter would have written it, changed before its names are lost."""
    path = export(tiny, tmp_path / "o", weights="inline").path
    model = onnx.load_model(str(path))
    if change is not None:
        change(model)
    renamed(model)
    for node in model.graph.node:
        node.name = f"{node.name}, by another"
    path.write_bytes(model.SerializeToString())
    shutil.copy(tiny.directory / "config.json", path.parent)
    return path


def initializer(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(t for t in model.graph.initializer if t.name.endswith(ending))
    return found


def weights_of(result: Verification) -> Evidence:
    (evidence,) = (e for e in result.evidence if e.link == "weights")
    return evidence


def test_found_whatever_they_are_called(tiny: Checkpoint, tmp_path: Path) -> None:
    evidence = weights_of(verify(tiny, foreign(tiny, tmp_path), **WEIGHTS))
    assert (evidence.outcome, evidence.why) == ("same", "found by their bits, under other names")


@pytest.mark.parametrize(
    "ending",
    [
        "transformer.wte.weight",
        "transformer.h.1.attn.attention.v_proj.weight",
        "transformer.h.0.mlp.c_fc.bias",
        "lm_head.weight",
    ],
)
def test_one_bit_in_one_of_them(tiny: Checkpoint, tmp_path: Path, ending: str) -> None:
    """It may be in the row of a token that no probe draws."""

    def flip(model: onnx.ModelProto) -> None:
        tensor = initializer(model, ending)
        array = to_array(tensor).copy()
        array.view(np.uint32).flat[5] ^= 1
        tensor.CopyFrom(from_array(array, tensor.name))

    result = verify(tiny, foreign(tiny, tmp_path, flip), **WEIGHTS)
    assert not result.passed
    assert weights_of(result).where == ending
    assert result.first_divergence is not None
    assert result.first_divergence.unit == next(
        s.place for s in tiny.slots.values() if s.name == ending
    )


def test_the_double_of_a_weight_is_told(tiny: Checkpoint, tmp_path: Path) -> None:
    """All weights are there, but who says that they are what is multiplied?"""

    def double(model: onnx.ModelProto) -> None:
        tensor = initializer(model, "h.1.attn.attention.v_proj.weight")
        other = from_array(-to_array(tensor), "another")
        model.graph.initializer.append(other)
        for node in model.graph.node:
            node.input[:] = ["another" if n == tensor.name else n for n in node.input]

    path = foreign(tiny, tmp_path, double)
    evidence = weights_of(verify(tiny, path, **WEIGHTS))
    assert evidence.outcome == "not comparable"
    assert "might stand in for one" in str(evidence.why)
    assert not verify(tiny, path, require="weights", **WEIGHTS).passed
    assert not verify(tiny, path, effort="quick").passed  # the program is another


@pytest.mark.parametrize("turned", [False, True])
def test_a_wrong_copy_of_a_weight_that_is_there_too(turned: bool, tmp_path: Path) -> None:
    """Of a tied model the head is where it must be, and the embedding apart from it: one row of it,
    which no probe draws, is another."""
    tied = open_checkpoint(random_hf(tmp_path / "m", seed=3, scale=1.5))

    def apart(model: onnx.ModelProto, factor: int = 1) -> None:
        tensor = initializer(model, "wte.weight")
        array = to_array(tensor).copy()
        array[11] *= factor
        array = array.T.copy() if turned else array
        model.graph.initializer.append(from_array(array, "another"))
        for node in model.graph.node:
            if node.op_type == "Gather":
                node.input[:] = ["another" if n == tensor.name else n for n in node.input]

    assert verify(tied, foreign(tied, tmp_path / "right", apart), **WEIGHTS).passed
    result = verify(tied, foreign(tied, tmp_path / "wrong", lambda m: apart(m, -30)), **WEIGHTS)
    assert not result.passed
    assert weights_of(result).where == "transformer.wte.weight"
    assert result.first_divergence is not None
    assert result.first_divergence.unit == "embed"


def test_a_mask_of_a_weights_shape_is_no_fault(tiny: Checkpoint, tmp_path: Path) -> None:
    def mask(model: onnx.ModelProto) -> None:
        side = tiny.config.d_model
        model.graph.initializer.append(from_array(np.tri(side, dtype=np.float32), "mask"))

    assert verify(tiny, foreign(tiny, tmp_path, mask), effort="quick").passed


def test_another_place_of_the_shared_file(tiny: Checkpoint) -> None:
    """Same file, same shapes, and W_K where W_Q should be."""
    path = export(tiny).path
    model = onnx.load_model(str(path), load_external_data=False)
    q, k = (initializer(model, f"h.1.attn.attention.{x}_proj.weight") for x in "qk")
    q.name, k.name = k.name, q.name
    path.write_bytes(model.SerializeToString())
    with pytest.raises(TensorMismatch, match="where the graph expects it"):
        verify(tiny, tiny.directory, **WEIGHTS)


def test_each_graph_has_weights_of_its_own_to_answer_for(tiny: Checkpoint, tmp_path: Path) -> None:
    """Beside good weights and a good graph that shares them, another model's graph."""
    export(tiny)
    other = open_checkpoint(random_hf(tmp_path / "other", seed=4, scale=1.5, tied=False))
    shutil.copytree(export(other, tmp_path / "js", weights="inline").path.parent, tiny.directory / "onnx")  # fmt: skip
    result = verify(tiny, tiny.directory, **WEIGHTS)
    outcomes = {e.subject: e.outcome for e in result.evidence if e.link == "weights"}
    assert outcomes == {"the weights": "same", "model.onnx": "same", "onnx/model.onnx": "differs"}
    assert not result.passed


def test_shared_and_multiplied_the_wrong_way_round(tiny: Checkpoint) -> None:
    """The same bytes, but not the same matrix. Square, so that nothing else tells."""
    path = export(tiny).path
    model = onnx.load_model(str(path), load_external_data=False)
    name = "transformer.h.1.attn.attention.q_proj.weight"
    (product,) = (n for n in model.graph.node if name in n.input)
    (turn,) = (a for a in product.attribute if a.name == "transB")
    turn.i = 0
    path.write_bytes(model.SerializeToString())
    result = verify(tiny, tiny.directory, **WEIGHTS)
    outcomes = {(e.subject, e.link): e.outcome for e in result.evidence}
    assert outcomes["the weights", "weights"] == "same"
    assert outcomes["model.onnx", "weights"] == "differs"
    assert outcomes["model.onnx", "structure"] == "differs"
