"""Limits stated for artifacts that are lossy on purpose: what keeps to them, and what does not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.cli import main
from converter.demo import MODEL
from converter.errors import UsageError
from converter.onnx import export
from converter.verification import verify
from converter.verification.criterion import Criterion
from converter.verification.measuring import Errors
from tests.checkpoints import read_all
from tests.models import random_hf
from tests.onnx_.quantising import int8, q4

LIMITS: dict[str, Any] = {"max_kl": 0.1, "min_top1": 0.8}


@pytest.fixture(scope="module")
def js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in transformers.js's folders, at 32, 8 and 4 bits."""
    directory = tmp_path_factory.mktemp("js") / "out"
    graph = converter.Graph.of(None, True, (), "transformers-js")
    converter.export_onnx(MODEL, directory, graph=graph, check=False)
    int8(directory / "onnx/model.onnx")
    q4(directory / "onnx/model.onnx")
    return directory


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(random_hf(tmp_path / "tiny"))


@pytest.mark.parametrize("name", ["model_quantized.onnx", "model_q4.onnx", "model.onnx"])
def test_within_limits_and_never_called_verified(js: Path, name: str) -> None:
    result = verify(MODEL, js / "onnx" / name, effort="quick", **LIMITS)
    assert result.passed, result.problems
    assert result.verdict == "within the stated limits: KL ≤ 0.1, top-1 ≥ 0.8"
    assert "verified" not in result.summary()
    assert result.weights is not None
    assert not result.weights.mismatches
    assert result.weights.compared >= 30
    assert any("not held to the original's bits" in remark for remark in result.remarks)
    assert {e.link for e in result.evidence} <= {"weights", "structure"}


def test_tight_limits_are_not_kept(js: Path) -> None:
    result = verify(MODEL, js / "onnx/model_q4.onnx", effort="quick", max_kl=1e-4)
    assert not result.passed
    assert result.verdict == "NOT WITHIN the stated limits: KL ≤ 0.0001"
    assert "more than 0.0001" in result.problems[0]
    alone = verify(MODEL, js / "onnx/model_q4.onnx", effort="quick", min_top1=1.0)
    assert not alone.passed


def test_without_limits_it_is_different_and_says_how_to_state_some(js: Path) -> None:
    result = verify(MODEL, js / "onnx/model_quantized.onnx", effort="quick")
    assert not result.passed
    (how,) = (remark for remark in result.remarks if "--max-kl" in remark)
    assert "is quantised" in how


def test_every_graph_of_a_directory_is_judged_and_named(js: Path) -> None:
    result = verify(MODEL, js, effort="quick", **LIMITS)
    assert {ran.what for ran in result.runtimes if ran.role == "artifact"} == {
        "onnxruntime: onnx/model.onnx",
        "onnxruntime: onnx/model_q4.onnx",
        "onnxruntime: onnx/model_quantized.onnx",
    }
    assert result.passed


def test_perplexity(js: Path) -> None:
    path = js / "onnx/model_quantized.onnx"
    assert verify(MODEL, path, max_perplexity_ratio=1.2, **LIMITS).passed
    tight = verify(MODEL, path, max_perplexity_ratio=0.5, **LIMITS)
    assert any("perplexity" in problem for problem in tight.problems)
    untold = verify(MODEL, path, effort="quick", max_perplexity_ratio=1.2, **LIMITS)
    assert untold.problems == ("There is no text whose perplexity could be compared; give --text.",)


def _edited(js: Path, tmp_path: Path, name: str, change: Any) -> Path:
    """Of the unquantised graph: what a fault before quantising does."""
    model = onnx.load_model(str(js / "onnx/model.onnx"))
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(array), name))
    path = tmp_path / "model.onnx"
    onnx.save_model(model, str(path))
    return int8(path)


def test_swapped_heads_are_seen(js: Path, tmp_path: Path) -> None:
    name = "transformer.h.1.attn.attention.out_proj.weight"
    heads = open_checkpoint(MODEL).config.n_heads

    def swap(w: Any) -> Any:
        return np.roll(w.reshape(heads, -1, w.shape[1]), 1, axis=0).reshape(w.shape)

    path = _edited(js, tmp_path, name, swap)
    assert not verify(MODEL, path, effort="quick", **LIMITS).passed


def test_nan_is_seen(js: Path, tmp_path: Path) -> None:
    path = _edited(js, tmp_path, "transformer.ln_f.bias", lambda b: b * np.nan)
    result = verify(MODEL, path, effort="quick", **LIMITS)
    assert not result.passed
    assert any("NaN" in problem for problem in result.problems)


def test_where_nothing_can_be_compared_nothing_is_within(tiny: Checkpoint, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    there = shutil.copytree(tiny.directory, tmp_path / "nan")
    tensors = read_all(there)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"] * np.nan
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    result = verify(there, there, effort="quick", **LIMITS)
    assert not result.passed
    assert any("nothing could be compared" in problem for problem in result.problems)


def run_of(agreement: float, decided: int) -> Errors:
    return Errors(0, 0, 0, 0.01, agreement, 1, 1, decided)


def test_a_probe_is_a_small_sample() -> None:
    limits = Criterion(min_top1=0.9)
    assert limits.exceeded(run_of(0.5, 2), text=False) is None
    assert limits.exceeded(run_of(0.0, 2), text=False) is not None
    assert limits.exceeded(run_of(0.8, 1000), text=False) is not None
    assert Criterion(min_top1=1.0).exceeded(run_of(0.999, 1000), text=False) is not None
    assert limits.exceeded_by_all([run_of(0.5, 2), run_of(0.9, 100)], 0) != []
    assert limits.exceeded_by_all([run_of(0.5, 2), run_of(0.95, 100)], 0) == []
    assert limits.exceeded_by_all([run_of(1.0, 0)], 0) != []
    assert limits.spares(0.5)
    assert not limits.spares(0.9)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_kl": -0.1}, {"max_kl": math.nan}, {"max_kl": math.inf}, {"min_top1": 1.1},
        {"min_top1": -0.1}, {"min_top1": math.nan}, {"max_kl": "much"}, {"min_top1": True},
        {"max_perplexity_ratio": 1.1}, {"max_kl": 1, "max_perplexity_ratio": math.nan},
        {"max_kl": 1, "checks": ["weights"]},
    ],
)  # fmt: skip
def test_what_is_no_limit(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        verify(MODEL, MODEL, **limits)


def test_the_command(js: Path, tmp_path: Path) -> None:
    arguments = ["verify", str(MODEL), str(js / "onnx/model_q4.onnx"), "--effort", "quick"]
    report = tmp_path / "r.html"
    stated = [*arguments, "--max-kl", "0.1", "--min-top1", "0.8"]
    told = CliRunner().invoke(main, [*stated, "--report", str(report)])
    assert told.exit_code == 0
    assert "within the stated limits: KL ≤ 0.1, top-1 ≥ 0.8" in told.output
    assert "Within the stated limits" in report.read_text()
    assert "Verified" not in report.read_text()
    document = json.loads(CliRunner().invoke(main, [*stated, "--json"]).stdout)
    assert document["criterion"] == {"max_kl": 0.1, "min_top1": 0.8, "max_perplexity_ratio": None}
    assert all(probe["kl"] <= 0.1 for probe in document["probes"])
    assert CliRunner().invoke(main, arguments).exit_code == 1
    assert CliRunner().invoke(main, [*arguments, "--min-top1", "2"]).exit_code == 2


@pytest.mark.parametrize("name", ["decoder_model.onnx", "onnx/model_q4.onnx", "int8/model.onnx"])
def test_a_second_graph_is_seen_wherever_it_is(tiny: Checkpoint, name: str) -> None:
    path = export(tiny).path
    other = tiny.directory / name
    other.parent.mkdir(exist_ok=True)
    model = onnx.load_model(str(path))
    (tensor,) = (t for t in model.graph.initializer if t.name == "transformer.ln_f.bias")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(tensor.dims, np.float32), tensor.name))
    onnx.save_model(model, str(other))
    result = verify(tiny, tiny.directory, effort="quick")
    assert not result.passed
    assert any(name in problem for problem in result.problems)


def test_a_graph_that_onnxruntime_optimised(tiny: Checkpoint, tmp_path: Path) -> None:
    import onnxruntime

    path = export(tiny, tmp_path / "o", weights="inline").path
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result = verify(tiny, path.with_name("optimised.onnx"), effort="quick")
    assert result.passed, result.problems


def test_what_a_missing_input_leaves_out_is_said(tiny: Checkpoint, tmp_path: Path) -> None:
    path = export(tiny, tmp_path / "o", weights="inline").path
    model = onnx.load_model(str(path))
    model.producer_name = "another"
    for node in model.graph.node:
        node.name = f"{node.name}, by another"
    (position,) = (i for i in model.graph.input if i.name == "position_ids")
    model.graph.input.remove(position)
    (gather,) = (n for n in model.graph.node if "position_ids" in n.input)
    gather.input[1] = "mask/Range_2"
    path.write_bytes(model.SerializeToString())
    result = verify(tiny, path, effort="quick")
    assert result.passed, result.problems
    assert any("no input position_ids; left out: " in remark for remark in result.remarks)
