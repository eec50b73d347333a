"""Graphs as artifacts: weights known by their names, foreign graphs, metadata that lies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import BadInput, ConfigError, MissingTensor, VerificationFailed
from converter.onnx import export
from converter.onnx.opening import CONFIG, open_graph
from converter.verification import verify
from tests.models import random_hf, write_as

QUICK: dict[str, Any] = {"effort": "quick"}


def edited(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load_model(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def renamed(model: onnx.ModelProto) -> None:
    """As another exporter would write it: no metadata, weights under names of its own."""
    del model.metadata_props[:]
    model.producer_name = "pytorch"
    names = {t.name: f"onnx::MatMul_{i}" for i, t in enumerate(model.graph.initializer)}
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def test_onnxruntime_sends_nothing_home(tiny: Checkpoint, tmp_path: Path) -> None:
    """It would keep what it is to send in a database under HOME."""
    graph = export(tiny, tmp_path / "graph", weights="external").path
    (tmp_path / "home").mkdir()
    code = "import sys; from converter.onnx.session import Session; Session(__import__('pathlib').Path(sys.argv[1]))"
    variables = os.environ | {"HOME": str(tmp_path / "home")}
    variables.pop("ORT_DISABLE_TELEMETRY", None)  # what this process was told
    subprocess.run([sys.executable, "-c", code, str(graph)], check=True, env=variables)
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("mode", ["shared", "external", "inline"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_read_as_they_are(tmp_path: Path, mode: Any, dtype: str) -> None:
    there = open_checkpoint(random_hf(tmp_path / "m", dtype=dtype, tied=False))
    graph = open_graph(export(there, None if mode == "shared" else tmp_path / "o", weights=mode).path)  # fmt: skip
    assert graph.config == there.config
    assert graph.complete
    for key in there.slots:
        assert np.array_equal(graph.tensor(key, "F64"), there.tensor(key, "F64")), key
        assert graph.code(key) == there.code(key)


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
@pytest.mark.parametrize("mode", ["shared", "external"])
def test_processed_weights(tiny: Checkpoint, tmp_path: Path, layout: Any, mode: Any) -> None:
    converter.hf_to_tl(tiny, tmp_path / "tl", layout=layout, process="all", check=False)
    there = open_checkpoint(tmp_path / "tl")
    graph = open_graph(export(there, None if mode == "shared" else tmp_path / "o", weights=mode).path)  # fmt: skip
    for key in there.slots:
        assert np.array_equal(graph.tensor(key), there.tensor(key)), key
    result = verify(tiny, graph, **QUICK)
    assert result.passed, result.summary()
    assert result.weights is not None
    assert result.weights.compared == len(there.slots)


def test_scaled_attention_of_a_graph_beside_its_weights(tiny: Checkpoint, tmp_path: Path) -> None:
    scaled = {"use_attn_scale": True, "attn_scale": 3.0, "scale_attn_by_inverse_layer_idx": True}
    there = open_checkpoint(write_as(tiny, tmp_path / "tl", "hooked", config=scaled))
    added = converter.export_onnx(there)
    assert added.verification is not None
    assert added.verification.passed
    result = verify(there, open_graph(tmp_path / "tl/model.onnx"), **QUICK)
    assert result.passed, result.summary()


def test_another_exporters_graph_is_judged_by_its_function(tmp_path: Path) -> None:
    there = open_checkpoint(random_hf(tmp_path / "m", scale=1.5))
    path = edited(export(there, tmp_path / "o", weights="inline").path, renamed)
    with pytest.raises(ConfigError, match="does not say what model it is"):
        open_graph(path)
    shutil.copy(tmp_path / "m/config.json", tmp_path / "o")
    graph = open_graph(path)
    assert not graph.complete
    result = verify(there, graph, **QUICK)
    assert result.passed, result.summary()
    assert result.weights is None
    links = {e.link: (e.outcome, e.why) for e in result.evidence}
    assert links["weights"] == ("same", "found by their bits, under other names")
    assert links["structure"] == ("not comparable", "pytorch wrote it")
    assert links["program"][0] == links["route"][0] == links["arithmetic"][0] == "same"
    unseen = verify(there, graph, checks=["function"], **QUICK)
    (route,) = (e for e in unseen.evidence if e.link == "route")
    assert route.outcome == "not comparable"  # nobody has looked for its weights
    with pytest.raises(MissingTensor):
        verify(graph, there)


def test_another_exporters_wrong_graph_fails(tmp_path: Path) -> None:
    there = open_checkpoint(random_hf(tmp_path / "m", scale=1.5))
    other = open_checkpoint(
        write_as(there, tmp_path / "w", "hf", edit=lambda k, x: x * (1 + (k == "blocks.1.ln2.w")))
    )
    path = edited(export(other, tmp_path / "o", weights="inline").path, renamed)
    shutil.copy(tmp_path / "m/config.json", tmp_path / "o")
    result = verify(there, open_graph(path), **QUICK)
    assert not result.passed
    assert result.first_divergence is not None


def test_our_graph_without_one_of_its_weights_fails(tmp_path: Path) -> None:
    there = open_checkpoint(random_hf(tmp_path / "m", scale=1.5))

    def drop(model: onnx.ModelProto) -> None:
        name = "transformer.h.1.mlp.c_fc.bias"
        kept = [t for t in model.graph.initializer if t.name != name]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        for node in model.graph.node:
            node.input[:] = [i for i in node.input if i != name]

    graph = open_graph(edited(export(there).path, drop))
    result = verify(there, graph, **QUICK)
    assert result.weights is not None
    assert result.weights.mismatched == ("transformer.h.1.mlp.c_fc.bias",)
    result = verify(there, graph, checks=["function"], **QUICK)
    assert not result.passed
    assert result.first_divergence is not None
    assert result.first_divergence.unit == "block 1"


@pytest.mark.parametrize(
    "lie",
    [
        {"n_layers": 0}, {"n_layers": 2**40}, {"n_heads": 3}, {"attn_types": "global"},
        {"attn_types": ["global", "lokal"]}, {"eps": "small"}, {"score_divisors": [1.0]},
        {"score_divisors": [0.0, 1.0]}, {"d_vocab": True},
    ],
)  # fmt: skip
def test_metadata_that_makes_no_sense(tiny: Checkpoint, lie: dict[str, Any]) -> None:
    def change(model: onnx.ModelProto) -> None:
        entry = next(p for p in model.metadata_props if p.key == CONFIG)
        entry.value = json.dumps(json.loads(entry.value) | lie)

    with pytest.raises(BadInput):
        open_graph(edited(export(tiny).path, change))


def test_a_graph_that_cannot_run_fails(tiny: Checkpoint) -> None:
    """Sound as a graph, but it reshapes to a size that never fits."""

    def misshape(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.name == "embed/Reshape")
        wrong = onnx.numpy_helper.from_array(np.array([3, tiny.config.d_model]), "wrong")
        model.graph.initializer.append(wrong)
        node.input[1] = "wrong"

    graph = open_graph(edited(export(tiny).path, misshape))
    with pytest.raises(VerificationFailed, match="onnxruntime cannot run the artifact"):
        verify(tiny, graph, checks=["function"])
