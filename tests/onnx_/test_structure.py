"""Graphs with the right weights and the wrong structure: caught, however they are disguised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.onnx import export
from converter.onnx.opening import open_graph
from converter.onnx.structure import Nodes, compare_nodes, unit_of
from converter.opening import open_artifact
from converter.verification import verify
from tests.models import random_hf

Edit = Callable[[onnx.ModelProto], Any]


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(n for n in model.graph.node if n.name == name)
    return found


def epsilon(model: onnx.ModelProto) -> None:
    """Far below what the function check can see."""
    for attribute in node(model, "blocks.1.ln2/LayerNormalization").attribute:
        if attribute.name == "epsilon":
            attribute.f = 1e-12


def backdoor(model: onnx.ModelProto) -> list[str]:
    """Nothing happens unless token 30 comes three times: logits are then another's."""
    graph = model.graph
    for name, value in (("_token", 30), ("_three", 3)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    made = [
        onnx.helper.make_node("Equal", ["input_ids", "_token"], ["_is"]),
        onnx.helper.make_node("Cast", ["_is"], ["_as"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("ReduceSum", ["_as"], ["_count"], keepdims=0),
        onnx.helper.make_node("GreaterOrEqual", ["_count", "_three"], ["_yes"]),
        onnx.helper.make_node("Neg", ["_honest"], ["_evil"]),
        onnx.helper.make_node("Where", ["_yes", "_evil", "_honest"], ["logits"]),
    ]
    last = next(n for n in graph.node if "logits" in n.output)
    last.output[0] = "_honest"
    graph.node.extend(made)
    return ["input_ids", "attention_mask", "position_ids", "logits", last.name, "_token"]


def disguised(model: onnx.ModelProto) -> None:
    """Its nodes bear the names of inputs, outputs and constants."""
    names = backdoor(model)
    for added, name in zip(model.graph.node[-6:], names, strict=True):
        added.name = name


def opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def function(model: onnx.ModelProto) -> None:
    body = onnx.helper.make_node("Relu", ["x"], ["y"])
    made = onnx.helper.make_function("", "Gelu", ["x"], ["y"], [body], [onnx.helper.make_opsetid("", 20)])  # fmt: skip
    model.functions.append(made)


def doubled(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def reordered(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([nodes[1], nodes[0], *nodes[2:]])


SAME = Nodes(ours=True)
EDITS: list[Edit] = [epsilon, backdoor, disguised, opset, function, doubled, reordered]


def edited(path: Path, edit: Edit) -> Path:
    model = onnx.load_model(str(path), load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("whole", [False, True], ids=["the graph", "its directory"])
def test_edits_are_seen(tiny: Checkpoint, edit: Edit, whole: bool) -> None:
    path = edited(export(tiny).path, edit)
    result = verify(tiny, tiny.directory if whole else path, checks=["weights"])
    assert not result.passed
    assert result.weights is not None
    assert result.weights.nodes


def test_the_unit_is_named(tiny: Checkpoint) -> None:
    result = verify(tiny, edited(export(tiny).path, epsilon), checks=["weights"])
    assert result.first_divergence is not None
    assert result.first_divergence.unit == "block 1"
    assert unit_of("constant_3") is None


def test_what_does_not_compute_is_no_difference(tiny: Checkpoint) -> None:
    def comment(model: onnx.ModelProto) -> None:
        model.graph.node[0].doc_string = "hello"

    assert compare_nodes(open_graph(edited(export(tiny).path, comment))) == SAME


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
@pytest.mark.parametrize("mode", ["shared", "external", "inline"])
def test_honest_graphs_are_as_they_must_be(
    tiny: Checkpoint, tmp_path: Path, layout: Any, mode: Any
) -> None:
    converter.hf_to_tl(tiny, tmp_path / "tl", layout=layout, process="all", check=False)
    there = open_checkpoint(tmp_path / "tl")
    output = None if mode == "shared" else tmp_path / "out"
    options: dict[str, Any] = {"weights": mode, "hooks": ["*hook_resid*", "*.hook_pattern"]}
    for with_past in (True, False):
        path = export(there, output, with_past=with_past, **options).path
        assert compare_nodes(open_graph(path)) == SAME
        for written in (path, path.with_name("model.onnx_data")):
            written.unlink(missing_ok=True)


def disowned(model: onnx.ModelProto) -> None:
    backdoor(model)
    model.producer_name, model.producer_version = "another", "9.9.9"


def in_a_function(model: onnx.ModelProto) -> None:
    """Operators that the file defines itself are nodes like any other."""
    graph, made = model.graph, onnx.helper.make_opsetid("its.own", 1)
    last = next(n for n in graph.node if "logits" in n.output)
    last.output[0] = "_honest"
    body = [onnx.helper.make_node("Identity", ["x"], ["y"])]
    opset = onnx.helper.make_opsetid("", 20)
    model.functions.append(
        onnx.helper.make_function("its.own", "Same", ["x"], ["y"], body, [opset])
    )
    model.opset_import.append(made)
    graph.node.append(onnx.helper.make_node("Same", ["_honest"], ["logits"], domain="its.own"))
    model.producer_name = "another"


def of_another_version(model: onnx.ModelProto) -> None:
    backdoor(model)
    model.producer_version = "0.0.1"


def of_another_dialect(model: onnx.ModelProto) -> None:
    backdoor(model)
    (entry,) = (e for e in model.metadata_props if e.key == "neoconvert.dialect")
    entry.value = "7"


def renamed_weight(model: onnx.ModelProto) -> None:
    backdoor(model)
    for node in model.graph.node:
        node.input[:] = ["renamed" if n.endswith("1.mlp.c_fc.bias") else n for n in node.input]
    for tensor in model.graph.initializer:
        if tensor.name.endswith("1.mlp.c_fc.bias"):
            width = tensor.dims[0]
            tensor.Clear()
            value = np.random.default_rng(0).normal(size=width).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, "renamed"))


@pytest.mark.parametrize(
    "edit", [disowned, in_a_function, of_another_version, of_another_dialect, renamed_weight]
)
@pytest.mark.parametrize("whole", [False, True], ids=["the graph", "its directory"])
def test_a_backdoor_cannot_talk_its_way_out(tiny: Checkpoint, edit: Edit, whole: bool) -> None:
    """It fires on no probe: nothing but the structure shows it."""
    path = edited(export(tiny).path, edit)
    result = verify(tiny, tiny.directory if whole else path, effort="quick")
    assert not result.passed, result.summary()


def test_what_is_not_ours_is_not_compared_and_that_is_said(tiny: Checkpoint) -> None:
    """Of a graph whose every node has another name, nobody knows; `--require` is for those."""

    def foreign(model: onnx.ModelProto) -> None:
        disowned(model)
        for node in model.graph.node:
            node.name = f"n{node.name}"

    path = edited(export(tiny).path, foreign)
    (structure,) = (
        e for e in verify(tiny, path, checks=["weights"]).evidence if e.link == "structure"
    )
    assert structure.outcome == "not comparable"
    assert structure.why == "another wrote it"
    assert verify(tiny, path, checks=["weights"]).passed
    strict = verify(tiny, path, checks=["weights"], require="structure")
    assert strict.problems == (
        "model.onnx: structure could not be compared, and must be: another wrote it.",
    )


def test_a_config_beside_the_graph_that_is_another_models(tmp_path: Path) -> None:
    there = open_checkpoint(random_hf(tmp_path / "m"))
    converter.export_onnx(there, tmp_path / "o", graph=converter.Graph("inline"), check=False)
    path = tmp_path / "o/config.json"
    path.write_text(path.read_text().replace('"num_heads": 4', '"num_heads": 2'))
    result = verify(there, tmp_path / "o", checks=["weights"])
    assert result.weights is not None
    assert result.weights.config == ("config.json: n_heads",)
    assert not result.passed


@pytest.mark.parametrize("with_past", [True, False])
def test_what_onnxruntime_optimises_at_basic_is_compared_node_by_node(
    tiny: Checkpoint, tmp_path: Path, with_past: bool
) -> None:
    """It fuses products and sums, and two transposes; leaves out repeats; and writes attributes out."""
    honest = export(tiny, tmp_path / "x", weights="inline", with_past=with_past).path
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    optimised = tmp_path / "x" / "basic.onnx"
    options.optimized_model_filepath = str(optimised)
    onnxruntime.InferenceSession(str(honest), options, providers=["CPUExecutionProvider"])
    assert any("Fusion" in node.name for node in onnx.load_model(str(optimised)).graph.node)
    assert compare_nodes(open_artifact(optimised)) == SAME

    def exchanged(model: onnx.ModelProto) -> None:
        """One fused product reads the bias of the next."""
        first, second = [n for n in model.graph.node if n.name.endswith("AddFusion")][:2]
        first.input[2], second.input[2] = second.input[2], first.input[2]

    def epsilon_left(model: onnx.ModelProto) -> None:
        """A default is no longer the same where it stands for another value."""
        node = next(n for n in model.graph.node if n.op_type == "Gelu")
        kept = [a for a in node.attribute if a.name != "approximate"]
        assert len(kept) < len(node.attribute)
        del node.attribute[:]
        node.attribute.extend(kept)

    def turned(model: onnx.ModelProto) -> None:
        """Other axes of the keys."""
        node = next(n for n in model.graph.node if n.name.endswith("attn/Transpose_4"))
        perm = next(a.ints for a in node.attribute if a.name == "perm")
        perm[1], perm[2] = perm[2], perm[1]

    for edit in (exchanged, epsilon_left, turned):
        optimised_again = tmp_path / "x" / f"{edit.__name__}.onnx"
        optimised_again.write_bytes(optimised.read_bytes())
        assert compare_nodes(open_artifact(edited(optimised_again, edit))).differing
