"""The outputs of a graph that are no logits: hook points, which the reference shows too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.onnx import export, hook_names
from converter.verification import Verification, verify
from tests.onnx_.test_opening import renamed

QUICK: dict[str, Any] = {"effort": "quick"}
Change = Callable[[onnx.ModelProto], Any]


def graph(
    source: Checkpoint, place: Path, hooks: Sequence[str], change: Change | None = None, *, ours: bool = False
) -> Path:  # fmt: skip
    """Our graph with these outputs, changed; and then as another tool would have saved it."""
    path = export(source, place, weights="inline", hooks=hooks).path
    model = onnx.load_model(str(path))
    if change is not None:
        change(model)
    if not ours:
        renamed(model)
        for node in model.graph.node:
            node.name = f"{node.name}, by another"
    path.write_bytes(model.SerializeToString())
    if (source.directory / "config.json").is_file():
        shutil.copy(source.directory / "config.json", place)
    return path


def scaled(name: str, factor: float) -> Change:
    """The output is a multiple of what it was; all that reads it goes on with what it was."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["as it was" if n == name else n for n in node.output]
            node.input[:] = ["as it was" if n == name else n for n in node.input]
        more = make_node("Add", ["as it was", "as it was"], [name], name="more")
        if factor != 2:
            model.graph.initializer.append(from_array(np.array(factor, np.float32), "factor"))
            more = make_node("Mul", ["as it was", "factor"], [name])
        model.graph.node.append(more)

    return change


def program(result: Verification) -> list[tuple[str, str | None]]:
    return [(e.outcome, e.where) for e in result.evidence if e.link == "program"]


def test_every_hook_point_of_a_graph_that_another_tool_saved(
    original: Checkpoint, tmp_path: Path
) -> None:
    result = verify(original, graph(original, tmp_path / "o", ["*"]), **QUICK)
    assert result.passed, result.problems
    assert [outcome for outcome, _ in program(result)] == ["same"]
    (remark,) = result.remarks
    assert remark == (
        "Outputs of model.onnx that were not compared: blocks.0.attn.hook_attn_scores,"
        " blocks.0.attn.hook_pattern, blocks.1.attn.hook_attn_scores, blocks.1.attn.hook_pattern."
    )


def test_of_processed_weights(original: Checkpoint, tmp_path: Path) -> None:
    """Processing moves the streams: the graph's own weights say where to."""
    converter.hf_to_tl(original, tmp_path / "tl", process="default", check=False)
    source = open_checkpoint(tmp_path / "tl")
    path = graph(source, tmp_path / "o", ["*.hook_resid_*"], ours=True)
    assert verify(original, path, checks="function", **QUICK).passed


@pytest.mark.parametrize("name", [
    "hook_embed", "blocks.0.hook_resid_pre", "blocks.0.ln1.hook_scale", "blocks.1.attn.hook_k",
    "blocks.1.attn.hook_z", "blocks.0.hook_attn_out", "blocks.1.hook_resid_mid",
    "blocks.1.mlp.hook_post", "blocks.0.hook_resid_post", "ln_final.hook_normalized",
])  # fmt: skip
@pytest.mark.parametrize("ours", [False, True])
def test_an_output_that_is_another(
    name: str, ours: bool, original: Checkpoint, tmp_path: Path
) -> None:
    """By a millionth, which float32 would not show."""
    assert name in hook_names(original.config)
    change = scaled(name, 2 if ours else 1 + 2**-20)
    path = graph(original, tmp_path / "o", [name], change, ours=ours)
    result = verify(original, path, **QUICK)
    assert not result.passed
    assert program(result) == [("differs", name)]
    assert all(name in problem for problem in result.problems)
    unit = f"block {name[7]}" if name.startswith("blocks") else "final" if "final" in name else "embed"  # fmt: skip
    assert [d.unit for d in result.divergences] == [unit]
    if ours:
        structure = verify(original, path, checks="weights")
        assert [e.where for e in structure.evidence if e.link == "structure"] == [name]
        assert [d.unit for d in structure.divergences] == [unit]


def test_outputs_that_cannot_be_compared_are_named(original: Checkpoint, tmp_path: Path) -> None:
    def another(model: onnx.ModelProto) -> None:
        model.graph.node.append(make_node("Identity", ["blocks.0.hook_resid_post"], ["hidden.1"]))
        shape = ["batch", "sequence", None]
        kind = onnx.TensorProto.FLOAT
        model.graph.output.append(make_tensor_value_info("hidden.1", kind, shape))

    path = graph(original, tmp_path / "o", ["blocks.0.hook_resid_post"], another)
    assert verify(original, path, **QUICK).remarks == (
        "Outputs of model.onnx that were not compared: hidden.1.",
    )
    unknown = "Outputs of model.onnx that were not compared: blocks.0.hook_resid_post, hidden.1."
    assert verify(original, path, checks="function", **QUICK).remarks == (unknown,)
    limited = verify(original, path, max_kl=1e-3, **QUICK)
    assert limited.passed
    assert unknown in limited.remarks


def test_an_output_of_another_shape_is_not_compared(original: Checkpoint, tmp_path: Path) -> None:
    def another(model: onnx.ModelProto) -> None:
        model.graph.node.append(make_node("ReduceSum", ["logits"], ["hook_embed"], keepdims=0))
        model.graph.output.append(make_tensor_value_info("hook_embed", onnx.TensorProto.FLOAT, []))

    result = verify(original, graph(original, tmp_path / "o", [], another), **QUICK)
    assert result.passed
    assert result.remarks == ("Outputs of model.onnx that were not compared: hook_embed.",)
