"""The command line's contract: exit codes, JSON keys, what is on stdout, what is on disk."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.numpy import load_file, save_file

import converter
from converter import parallel, piecewise
from converter.checkpoint import open_checkpoint
from converter.cli import main
from converter.demo import MODEL
from converter.display import Display
from tests.checkpoints import read_all, same
from tests.models import random_hf, write_as
from tests.test_schema import faults


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _json(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)  # exactly one document
    assert document["exit_code"] == code
    assert document["command"] == arguments[0]
    assert document["schema_version"] == 1
    return document


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    document = _json("hf-to-tl", MODEL, root / "tl", "--process", "default", "--ledger", "exact")
    assert document["layout"] == "hooked"
    assert document["steps"] == [
        "fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases",
    ]  # fmt: skip
    assert document["reverse"] == "none"
    assert document["verification"]["passed"] is True
    assert document["output"] == str(root / "tl")
    return root


def test_jobs_is_how_many_cores_are_used_and_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(piecewise, "PIECE", 512)
    written = []
    for jobs in (1, 3, 20):
        monkeypatch.setattr(parallel, "_most_cores", None)
        monkeypatch.setattr(parallel, "_pool", None)
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        output = tmp_path / str(jobs)
        options = ("--process", "all", "--ledger", "exact", "--no-verify", "--jobs", jobs)
        assert _run("hf-to-tl", MODEL, output, *options).exit_code == 0
        assert (parallel.cores(), os.environ["OMP_NUM_THREADS"]) == (min(jobs, 8), str(jobs))
        written.append(
            [(output / f"{name}.safetensors").read_bytes() for name in ("model", "ledger")]
        )
    assert written[0] == written[1] == written[2]
    assert _run("hf-to-tl", MODEL, tmp_path / "none", "--jobs", 0).exit_code == 2


def test_exact_and_back(converted: Path) -> None:
    document = _json("tl-to-hf", converted / "tl", converted / "back", "--reverse", "exact")
    assert document["reverse"] == "exact"
    assert same(read_all(converted / "back"), read_all(MODEL))
    config = json.loads((converted / "back/config.json").read_text())
    assert config == json.loads((MODEL / "config.json").read_text())


def test_verify_keys(converted: Path) -> None:
    document = _json("verify", MODEL, converted / "tl")
    assert document["passed"] is True
    assert {"name", "version", "device"} <= set(document["runtimes"][0])
    assert {
        "name", "runtime", "max_abs_logprob_diff", "mean_abs_logprob_diff", "kl",
        "top1_agreement", "noise_floor", "ratio", "passed",
    } <= set(document["probes"][0])  # fmt: skip
    assert document["weights"]["compared"] == 70
    assert document["weights"]["mismatched"] == []
    assert document["first_divergence"] is None
    assert "context" in {probe["name"] for probe in document["probes"]}


@pytest.mark.parametrize("check", ["weights", "function"])
def test_verify_catches_one_flipped_bit(check: str, converted: Path, tmp_path: Path) -> None:
    """The top bit of the mantissa of one element, on top of processing."""
    weights = dict(load_file(converted / "tl/model.safetensors"))
    name = "blocks.2.mlp.W_out"
    array = weights[name].copy()
    position = np.unravel_index(np.abs(array).argmax(), array.shape)
    array.view(np.uint32)[position] ^= np.uint32(1 << 22)
    (tmp_path / "bad").mkdir()
    save_file({**weights, name: array}, tmp_path / "bad/model.safetensors")
    for file in ("cfg.json", "neoconvert.json"):
        (tmp_path / "bad" / file).write_bytes((converted / "tl" / file).read_bytes())
    document = _json("verify", MODEL, tmp_path / "bad", "--check", check, code=1)
    assert document["passed"] is False
    assert document["first_divergence"]["unit"] == "block 2"
    if check == "weights":
        assert document["weights"]["mismatched"] == [name]
        assert document["problems"][0].startswith(f"1 of 70 tensors differs: {name} (")
        assert document["first_divergence"]["tensor"] == name


def test_several_artifacts_share_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own verdict; the original runs once."""
    from converter.verification import passes

    source = random_hf(tmp_path / "m", scale=1.5)
    original = open_checkpoint(source)
    same_ = write_as(original, tmp_path / "same", "bridge")
    spoilt = write_as(
        original, tmp_path / "bad", "hf",
        edit=lambda key, array: array * (1 + (key == "blocks.1.attn.b_O")),
    )  # fmt: skip
    runs: list[Any] = []
    run_original = passes.run_original

    def counted(*arguments: Any) -> Any:
        runs.append(arguments)
        return run_original(*arguments)

    monkeypatch.setattr(passes, "run_original", counted)
    quick = ("--effort", "quick")
    document = _json("verify", source, same_, spoilt, source, *quick, code=1)
    assert faults(document) == []
    assert document["passed"] is False
    each = document["verifications"]
    assert [found["passed"] for found in each] == [True, False, True]
    assert [found["artifact"] for found in each] == [str(same_), str(spoilt), str(source)]
    assert len(runs) == 1
    alone = _json("verify", source, same_, *quick)
    assert alone["probes"] == each[0]["probes"]
    report = tmp_path / "r.html"
    refused = _run("verify", source, same_, spoilt, "--report", report)
    assert refused.exit_code == 2
    assert not report.exists()


def test_links_that_are_required(tmp_path: Path) -> None:
    source = random_hf(tmp_path / "m")
    weights = ("--check", "weights")
    assert _run("verify", source, source, *weights, "--require", "weights").exit_code == 0
    document = _json("verify", source, source, *weights, "--require", "weights,structure", code=1)
    assert document["problems"] == [
        "structure is required, and was not compared: there is no graph, which alone has one."
    ]
    misspelt = _run("verify", source, source, "--require", "weigths")
    assert misspelt.exit_code == 2
    assert "Did you mean weights?" in misspelt.stderr


def test_quiet_tells_a_failure(tmp_path: Path) -> None:
    source = random_hf(tmp_path / "m")
    spoilt = write_as(
        open_checkpoint(source), tmp_path / "bad", "hf",
        edit=lambda key, array: array * (1 + (key == "blocks.1.attn.b_O")),
    )  # fmt: skip
    result = _run("verify", source, spoilt, "--quiet", "--effort", "quick")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "block 1, transformer.h.1.attn.attention.out_proj.bias" in result.stderr
    assert _run("verify", source, source, "--quiet", "--effort", "quick").output == ""


def test_a_report_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    for path in (tmp_path / "no/such/r.html", tmp_path / "place", "/dev/null"):
        for command in (["hf-to-tl", MODEL, tmp_path / "tl"], ["verify", MODEL, MODEL]):
            result = _run(*command, "--report", path)
            assert result.exit_code == 2, result.output
    assert not (tmp_path / "tl").exists()
    assert Path("/dev/null").is_char_device()
    assert _run("verify", MODEL, MODEL, "--max-ratio", "inf").exit_code == 2
    assert _run("verify", MODEL, MODEL, "--max-ratio", "nan").exit_code == 2


def test_an_empty_argument_is_not_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a variable gives it that was never set."""
    random_hf(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "hf")
    for arguments in (["verify", "", "", "--check", "weights"], ["inspect", ""], ["explain", "", "."]):  # fmt: skip
        assert _run(*arguments).exit_code == 2
    monkeypatch.chdir(tmp_path / "empty")
    for arguments in (
        ["hf-to-tl", "../hf", ""], ["export-onnx", "../hf", ""], ["demo", ""], ["batch", ""],
        ["reference", "../hf", ""], ["hf-to-tl", "../hf", "o", "--report", ""],
        ["hf-to-tl", "../hf", "o", "--cfg", ""], ["hf-to-tl", "../hf", "o", "--adapter", ""],
    ):  # fmt: skip
        ran = _run(*arguments)
        assert (ran.exit_code, "names no place" in ran.stderr) == (2, True), arguments
    assert list(Path().iterdir()) == []


def test_a_place_that_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to itself; the home of nobody."""
    random_hf(tmp_path / "hf")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for code, arguments in (
        (3, ["inspect", "~nobody-of-this-name/x"]), (3, ["inspect", "loop"]),
        (3, ["verify", "~nobody-of-this-name/x", "hf"]), (3, ["hf-to-tl", "hf", "loop/x"]),
        (2, ["hf-to-tl", "hf", "loop"]), (2, ["verify", "hf", "hf", "--report", "loop"]),
        (2, ["verify", "hf", "hf", "--report", "loop/r.html"]),
        (2, ["explain", "hf", "hf", "--report", "loop"]), (2, ["reference", "hf", "loop"]),
        (2, ["reference", "hf", "loop/x"]),
    ):  # fmt: skip
        ran = _run(*arguments)
        assert (ran.exit_code, len(ran.stderr.splitlines())) == (code, 3), (arguments, ran.stderr)
    assert sorted(path.name for path in Path().iterdir()) == ["hf", "loop"]


def test_without_a_command_the_help_is_shown_as_it_is() -> None:
    shown, asked = _run(), _run("--help")
    assert (shown.exit_code, asked.exit_code) == (2, 0)
    assert shown.stderr == asked.stdout


def test_a_weight_file_named_alone_is_said_to_come_without_its_ledger(
    converted: Path, tmp_path: Path
) -> None:
    file = converted / "tl" / "model.safetensors"
    asked = ("tl-to-hf", file, tmp_path / "hf", "--dry-run")
    assert "a weight file that is named itself comes without the ledger" in _run(*asked).stdout
    assert "as asked for" in _run(*asked, "--reverse", "functional").stdout


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = _run("hf-to-tl", MODEL, tmp_path / "tl", "--dry-run", "--dtype", "float16")
    assert result.exit_code == 0
    assert "nothing was written" in result.stdout
    assert "blocks.3.attn.W_Q" in result.stdout
    assert "  float16  4 × 128 × 32  " in result.stdout  # as inspect says it
    assert list(tmp_path.iterdir()) == []
    document = _json("hf-to-tl", MODEL, tmp_path / "tl", "--dry-run")
    assert document["published"] is False
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_of_nothing_is_said(tmp_path: Path) -> None:
    asked = ["hf-to-tl", MODEL, tmp_path / "tl", "--ledger", "exact", "--no-verify"]
    said = "--ledger exact keeps nothing"
    assert said in _run(*asked, "--dry-run").stdout
    assert said not in _run(*asked, "--dry-run", "--process", "fold_ln").stdout
    assert said in _run(*asked).stdout


def test_another_name_of_a_dtype(tmp_path: Path) -> None:
    for word, meant in {"fp16": "float16", "torch.half": "float16", "BF16": "bfloat16"}.items():
        refused = _run("hf-to-tl", MODEL, tmp_path / "tl", "--dtype", word)
        assert refused.exit_code == 2
        assert f"Did you mean {meant}?" in refused.stderr
    assert "Did you mean" not in _run("bake", MODEL, tmp_path / "b", "--dtype", "int8").stderr


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_number_is_cut(width: int) -> None:
    result = converter.verify(MODEL, MODEL, effort="quick", device="cpu")
    costs = [replace(probe, storage_max_abs_logprob_diff=8.34e-07) for probe in result.probes]
    result = replace(result, probes=tuple(costs))
    display = Display()
    shown = io.StringIO()
    display.console = Console(file=shown, width=width, highlight=False)
    display.verification(result)
    said = shown.getvalue()
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= width
    for probe in result.probes:
        for number in (
            f"{probe.max_abs_logprob_diff:.2e}",
            f"{probe.noise_floor:.2e}",
            f"{probe.ratio:.2f}",
        ):
            assert number in said
    assert "Rounding the stored weights costs up to 8.34e-07;" in " ".join(said.split())


def test_a_config_that_is_another_is_told_beside_the_weights(tmp_path: Path) -> None:
    converter.hf_to_tl(MODEL, tmp_path / "tl", check=False)
    cfg = json.loads((tmp_path / "tl/cfg.json").read_text())
    (tmp_path / "tl/cfg.json").write_text(json.dumps(cfg | {"eps": 1e-4}))
    said = _run("verify", MODEL, tmp_path / "tl", "--effort", "quick")
    assert said.exit_code == 1
    assert "bit for bit; the config differs in eps" in " ".join(said.stdout.split())
    assert "With its config, which differs in eps, the artifact computes another" in said.stdout
    assert "stored weights are not" not in said.stdout


def test_quiet_says_nothing(tmp_path: Path) -> None:
    result = _run("hf-to-tl", MODEL, tmp_path / "tl", "--quiet", "--no-verify")
    assert (result.exit_code, result.output) == (0, "")


def test_inspect_keys(converted: Path) -> None:
    document = _json("inspect", converted / "tl")
    assert document["layout"] == "hooked"
    assert len(document["steps"]) == 4
    assert {"layout", "steps", "config", "tensors", "n_params"} <= set(document)
    assert document["config"]["normalization_type"] == "LNPre"
    text = _run("inspect", converted / "tl").stdout
    assert "blocks.{0-3}.attn.W_Q" in text


def test_inspect_says_what_undoing_has(converted: Path, tmp_path: Path) -> None:
    assert _json("inspect", converted / "tl")["ledger"] == "exact"
    assert re.search(r"\bledger +exact\b", _run("inspect", converted / "tl").stdout)
    assert _json("inspect", MODEL)["ledger"] is None
    cut = shutil.copytree(converted / "tl", tmp_path / "cut")
    (cut / "ledger.safetensors").write_bytes(b"short")
    assert _json("inspect", cut)["ledger"] == "unreadable"


def test_a_device_that_is_not_here(tmp_path: Path) -> None:
    import torch

    device = "cuda:99" if torch.cuda.is_available() else "cuda"
    result = _run("hf-to-tl", MODEL, tmp_path / "tl", "--device", device)
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run("demo")
    assert result.exit_code == 0, result.output
    for layout in ("hooked", "bridge"):
        assert f"HF → {layout} → HF: all 56 tensors returned, bit for bit" in result.stdout
    assert "2 of 56 tensors differ from the original, the others in no bit" in result.stdout
    assert "out_proj.weight differs by up to 0.19: something else at head 3" in result.stdout
    assert "load_hooked" in result.stdout
    assert (tmp_path / "neoconvert-demo/hf-from-hooked/model.onnx").stat().st_size < 100_000
    assert same(read_all(tmp_path / "neoconvert-demo/hf-from-hooked"), read_all(MODEL))


def test_demo_really_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round trip that loses a bit, and a verification that looks away."""
    from converter.demo import tour

    def damaging(place: Path) -> Any:
        if place.name == "hf-from-bridge":
            path = place / "model.safetensors"
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
        return open_checkpoint(place)

    monkeypatch.setattr(tour, "open_checkpoint", damaging)
    result = _run("demo", tmp_path / "d")
    assert result.exit_code == 1
    assert "1 of 56 tensors differ" in result.stdout


def test_demo_fails_where_the_edit_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.demo import tour

    monkeypatch.setattr(tour, "ablate", lambda *_: None)
    result = _run("demo", tmp_path / "d")
    assert result.exit_code == 1
    assert "0 of 56 tensors differ" in result.stdout
