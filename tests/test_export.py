"""ONNX on the command line: what lands on disk, what is verified, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from converter.cli import main
from tests.models import random_hf

ROW = {"name", "runtime", "ratio", "passed"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def as_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf(tmp_path_factory.mktemp("export") / "m", seed=11, scale=1.5)


@pytest.fixture
def here(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "m"))


def runtimes(verification: dict[str, Any]) -> set[str]:
    return {r["name"] for r in verification["runtimes"] if r["role"] == "artifact"}


def test_beside_its_own_weights(here: Path) -> None:
    before = contents(here)
    document = as_json("export-onnx", here)
    after = contents(here)
    graph = after.pop("model.onnx")
    assert after.pop("genai_config.json")
    assert after == before
    assert len(graph) < 60_000
    assert document["output"] == str(here / "model.onnx")
    assert document["onnx"]["weights"] == "shared"
    assert document["onnx"]["weight_files"] == ["model.safetensors"]
    assert document["verification"]["passed"]
    assert runtimes(document["verification"]) == {"onnxruntime"}
    names = {p["name"] for p in document["verification"]["probes"]}
    assert {"cache, step by step", "cache and padding", "window + 1"} <= names


def test_the_graph_has_its_own_name_in_all_that_is_said(here: Path) -> None:
    """And not the one that its file has until it is verified."""
    document = as_json("export-onnx", here)
    (evidence,) = (e for e in document["verification"]["evidence"] if e["link"] == "program")
    assert evidence["subject"].startswith("model.onnx (")
    assert ".new" not in json.dumps(document)
    again = run("export-onnx", here, "--overwrite")
    assert ".new" not in again.output


def test_a_graph_that_is_there_is_kept(here: Path) -> None:
    (here / "model.onnx").write_bytes(b"mine")
    result = run("export-onnx", here)
    assert result.exit_code == 2
    assert (here / "model.onnx").read_bytes() == b"mine"
    assert run("export-onnx", here, "--overwrite", "--no-verify").exit_code == 2
    assert (here / "model.onnx").read_bytes() == b"mine"
    (here / "model.onnx").unlink()
    assert run("export-onnx", here, "--no-verify").exit_code == 0
    assert run("export-onnx", here, "--no-verify").exit_code == 2
    assert run("export-onnx", here, "--overwrite", "--no-verify").exit_code == 0
    assert not [name for name in os.listdir(here) if "partial" in name]


def test_nothing_is_added_where_verification_fails(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that is wrong: every layer sees everything."""
    from converter.onnx import attention

    real = attention.geometry

    def blind(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        found.penalty["local"] = found.penalty["global"]
        return found

    monkeypatch.setattr("converter.onnx.graph.geometry", blind)
    before = contents(here)
    document = as_json("export-onnx", here, code=1)
    assert contents(here) == before
    assert document["verification"]["first_divergence"] == {"unit": "block 1", "tensor": None}
    assert as_json("hf-to-tl", here, here.parent / "tl", "--format", "onnx", code=1)
    assert not (here.parent / "tl").exists()


def test_both_runtimes_of_one_directory(here: Path) -> None:
    assert run("export-onnx", here, "--no-verify").exit_code == 0
    document = as_json("verify", here, here, "--effort", "quick")
    assert runtimes(document) == {"transformers", "onnxruntime"}
    for name, library in (("torch", "transformers"), ("onnxruntime", "onnxruntime")):
        document = as_json("verify", here, here, "--effort", "quick", "--runtime", name)
        assert runtimes(document) == {library}
    inspected = as_json("inspect", here)
    assert inspected["layout"] == "hf"
    assert inspected["onnx"]["with_past"] is True
    assert as_json("inspect", here / "model.onnx")["layout"] == "onnx"


def test_a_runtime_with_nothing_to_run(here: Path) -> None:
    assert run("verify", here, here, "--runtime", "onnxruntime").exit_code == 4
    assert run("export-onnx", here, "--no-verify").exit_code == 0
    assert run("verify", here, here / "model.onnx", "--runtime", "torch").exit_code == 4


@pytest.mark.parametrize("command", ["hf-to-tl", "bake"])
@pytest.mark.parametrize("weights", ["shared", "external", "inline"])
def test_with_processing(model: Path, tmp_path: Path, command: str, weights: str) -> None:
    out = tmp_path / "out"
    options = ["--process", "default", "--format", "onnx", "--weights", weights]
    document = as_json(command, model, out, *options, "--effort", "quick")
    assert document["verification"]["passed"]
    assert "onnxruntime" in runtimes(document["verification"])
    names = set(os.listdir(out))
    assert {"config.json", "generation_config.json", "model.onnx", "neoconvert.json"} <= names
    assert ("model.safetensors" in names) == (weights == "shared")
    assert ("model.onnx_data" in names) == (weights == "external")
    # The original is still what it is judged by, now that the conversion is over.
    for artifact in (out, out / "model.onnx"):
        document = as_json("verify", model, artifact, "--effort", "quick")
        assert document["passed"], document["problems"]
        assert document["weights"]["compared"] > 30


def test_back_from_tl(model: Path, tmp_path: Path) -> None:
    assert run("hf-to-tl", model, tmp_path / "tl", "--no-verify").exit_code == 0
    options = ["--format", "safetensors", "--format", "onnx", "--weights", "external"]
    document = as_json("tl-to-hf", tmp_path / "tl", tmp_path / "back", *options)
    assert {"transformers", "onnxruntime"} == runtimes(document["verification"])
    assert {"model.safetensors", "model.onnx", "model.onnx_data"} <= set(os.listdir(tmp_path / "back"))  # fmt: skip


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_beside_tl_weights(model: Path, tmp_path: Path, layout: str) -> None:
    tl = tmp_path / "tl"
    assert run("hf-to-tl", model, tl, "--layout", layout, "--process", "default", "--no-verify").exit_code == 0  # fmt: skip
    document = as_json("export-onnx", tl, "--hook", "blocks.*.hook_resid_post")
    assert document["onnx"]["hooks"] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert as_json("verify", model, tl / "model.onnx")["passed"]


def test_an_output_holds_all_that_clients_need(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = as_json("export-onnx", model, out, "--max-shard-size", "3KB", "--dtype", "bfloat16")
    assert len(document["onnx"]["weight_files"]) > 1
    assert {"transformers", "onnxruntime"} == runtimes(document["verification"])
    assert document["verification"]["probes"][0]["storage_max_abs_logprob_diff"] > 0


def test_for_transformers_js(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    as_json("export-onnx", model, out, "--for", "transformers-js", "--effort", "quick")
    assert sorted(contents(out)) == [
        "config.json", "genai_config.json", "generation_config.json", "neoconvert.intoto.jsonl", "neoconvert.json",
        "onnx/model.onnx", "onnx/model.onnx_data",
    ]  # fmt: skip
    statement = (out / "neoconvert.intoto.jsonl").read_text()
    assert "arithmetic: onnx/model.onnx (onnxruntime)" in statement
    assert "arithmetic: GPTNeo" not in statement  # which could not run what is there
    facts = as_json("inspect", out)
    assert facts["provenance"]["source"]["given"] == model.name
    config = json.loads((out / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"]
    assert as_json("verify", model, out, "--effort", "quick")["passed"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--weights", "external"], 2),
        (["--for", "transformers-js"], 2),
        (["--dtype", "float16"], 2),
        (["--max-shard-size", "1MB"], 2),
        (["--hook", "blocks.0.hook_residual"], 2),
        (["--hook", "blocks.9.hook_resid_post"], 2),
    ],
)
def test_what_cannot_be_beside(here: Path, options: list[str], code: int) -> None:
    before = contents(here)
    result = run("export-onnx", here, *options)
    assert result.exit_code == code, result.output
    assert len(result.stderr.splitlines()) == 3
    assert contents(here) == before


def test_options_of_a_graph_need_a_graph(model: Path, tmp_path: Path) -> None:
    result = run("hf-to-tl", model, tmp_path / "tl", "--hook", "*")
    assert result.exit_code == 2
    assert "--format onnx" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_adds_nothing(here: Path) -> None:
    before = contents(here)
    assert as_json("export-onnx", here, "--dry-run")["published"] is False
    assert contents(here) == before


def _location(value: str) -> Callable[[Path], None]:
    def edit(graph: Path) -> None:
        model = onnx.load_model(str(graph), load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = value
        graph.write_bytes(model.SerializeToString())

    return edit


def _weights(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda graph: change(graph.parent / "model.safetensors")


def _foreign(graph: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:]))
    graph.write_bytes(model.SerializeToString())


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "outside": _location("../m/model.safetensors"),
    "absolute": _location("/etc/passwd"),
    "missing": _location("gone.safetensors"),
    "truncated": _weights(lambda f: os.truncate(f, f.stat().st_size - 100)),
    "removed": _weights(lambda f: f.rename(f.with_name("elsewhere.bin"))),
    "not onnx": lambda g: g.write_bytes(b"\x00garbage" * 9),
    "empty": lambda g: g.write_bytes(b""),
    "another graph": _foreign,
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_unsound_graphs_are_refused_before_a_runtime_opens_them(
    model: Path, here: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    assert run("export-onnx", here, "--no-verify").exit_code == 0
    HOSTILE[fault](here / "model.onnx")
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    for command in (["inspect", here / "model.onnx"], ["verify", model, here / "model.onnx"]):
        result = run(*command)
        assert result.exit_code == 3, result.output
        assert len(result.stderr.splitlines()) == 3
    if fault not in ("truncated", "removed"):
        assert run("verify", model, here).exit_code == 3
