"""A reference file: what it holds, what it does not settle, and that it is read as hostile input."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save

import converter
from converter.checkpoint import open_checkpoint
from converter.checkpoint.record import UNSEALED, bears_seal, sealed
from converter.cli import main
from converter.errors import BadInput, CorruptFile, OutputExists, UsageError
from converter.recorded import file
from converter.recorded.sampled import LIKELIEST, Sampled, columns_of, tables_of
from converter.verification.measuring import measure
from converter.verification.probes import Probe
from converter.verification.reference import forward
from tests.models import random_hf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf(tmp_path_factory.mktemp("model") / "hf", scale=1.5)


@pytest.fixture(scope="module")
def record(model: Path) -> Path:
    path = model.with_name("neo.reference")
    converter.reference(model, path, effort="quick", device="cpu")
    return path


def verify(record: Path, artifact: Path, **options: Any) -> converter.Verification:
    return converter.verify(record, artifact, effort="quick", device="cpu", **options)


def outcomes(result: converter.Verification) -> dict[str, str]:
    return {evidence.link: evidence.outcome for evidence in result.evidence}


def test_columns_stand_for_the_whole_vocabulary() -> None:
    top = np.stack([np.random.default_rng(row).permutation(1000)[:16] for row in range(60)])
    columns, weights = columns_of(top, 7, 1000, 16 + 50)
    assert np.allclose(weights.sum(1), 1000)
    assert set(columns[weights > 0]) == set(range(1000))
    for row, likely in zip(columns, top, strict=True):
        assert list(row[:16]) == list(likely)
    counted = [
        len(set(row[w > 0])) == (w > 0).sum() for row, w in zip(columns, weights, strict=True)
    ]
    assert all(counted)


def test_some_columns_measure_what_all_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.recorded.sampled._VALUES", 0)  # as few columns as there may be
    checkpoint = open_checkpoint(random_hf(tmp_path / "hf", vocab_size=1501))
    tokens = np.random.default_rng(0).integers(0, 1501, (20, 30))
    probes = [Probe("whole", tokens), Probe("part", tokens[:2, :7])]
    true = forward(checkpoint, probes, dtype=torch.float64)
    known = Sampled.of(probes, tables_of(true), torch.device("cpu"))
    assert known.tables[0].logp.shape[1] < LIKELIEST + 100
    noise = torch.from_numpy(np.random.default_rng(1).normal(0, 0.05, (*tokens.shape, 1501)))
    for index, run in enumerate([true.logits(0) + noise, (true.logits(0) + noise)[:2, :7]]):
        (full,), (some,) = measure(true, index, [run]), measure(known, index, [run])
        assert some.max_abs <= full.max_abs
        assert some.rms == pytest.approx(full.rms, rel=0.05 if index == 0 else 0.2)
        assert some.kl == pytest.approx(full.kl, rel=0.05 if index == 0 else 0.4)
        assert (some.top1_agreement, some.nll) == (full.top1_agreement, full.nll)
        assert some.scale == full.scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("process", ["none", "default", "all"])
@pytest.mark.parametrize("layout", ["hf", "bridge"])
def test_digests_settle_the_usual_artifacts(
    record: Path, model: Path, tmp_path: Path, layout: str, process: str, dtype: str
) -> None:
    make: Callable[..., Any] = converter.bake if layout == "hf" else converter.hf_to_tl
    more = {} if layout == "hf" else {"layout": layout}
    make(model, tmp_path / "out", process=process, dtype=dtype, check=False, **more)
    (tmp_path / "out" / "neoconvert.json").unlink()  # the weights alone tell
    result = verify(record, tmp_path / "out")
    assert result.passed, result.summary()
    assert (outcomes(result)["weights"], outcomes(result)["route"]) == ("same", "same")


def test_what_no_digest_settles_is_said(record: Path, model: Path, tmp_path: Path) -> None:
    converter.hf_to_tl(model, tmp_path / "out", layout="bridge", process="fold_ln", check=False)
    result = verify(record, tmp_path / "out")
    assert result.passed, result.summary()
    assert outcomes(result)["weights"] == "not comparable"
    assert outcomes(result)["route"] == "same"
    assert not verify(record, tmp_path / "out", require="weights").passed
    report = tmp_path / "r.html"
    both = [
        "verify",
        str(record),
        str(tmp_path / "out"),
        "--effort",
        "quick",
        "--report",
        str(report),
    ]
    said = CliRunner().invoke(main, both).stdout
    assert "✗" not in said
    assert "– weights" in said
    assert "verified; not compared: weights" in said
    page = report.read_text("utf-8")
    assert "Not compared: weights." in page
    assert "bit for bit" not in page


def test_another_models_probes_do_not_pass(record: Path, tmp_path: Path) -> None:
    """Though its software computes them as its weights say."""
    other = random_hf(tmp_path / "other", seed=99)
    found = verify(record, other)
    assert not found.passed
    assert not any(probe.passed for probe in found.probes)
    assert max(probe.max_abs_logprob_diff for probe in found.probes) > 0.1
    assert all(probe.storage_max_abs_logprob_diff is None for probe in found.probes)


def test_a_graph_is_judged(record: Path, model: Path, tmp_path: Path) -> None:
    converter.export_onnx(model, tmp_path / "out", check=False)
    assert verify(record, tmp_path / "out").passed


def test_other_probes_are_refused(record: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--effort standard"):
        converter.verify(record, model, device="cpu", effort="standard")
    assert converter.verify(record, model, device="cpu").effort == "quick"  # the file's own
    text = tmp_path / "text"
    text.write_text("once")
    with pytest.raises(UsageError, match="its own probes"):
        verify(record, model, text=text)


def test_only_what_neoconvert_wrote_is_replaced(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a person's")
    for overwrite in (False, True):
        with pytest.raises(OutputExists):
            converter.reference(model, path, effort="quick", device="cpu", overwrite=overwrite)
    assert path.read_text() == "a person's"


def test_on_the_command_line(model: Path, tmp_path: Path) -> None:
    path, run = tmp_path / "neo.reference", CliRunner().invoke
    written = run(main, ["reference", str(model), str(path), "--effort", "quick", "--json"])
    assert written.exit_code == 0, written.output
    assert json.loads(written.stdout)["bytes"] == path.stat().st_size
    both = ["verify", str(path), str(model), str(model), "--effort", "quick", "--json"]
    judged = run(main, both)
    assert judged.exit_code == 0, judged.output
    assert run(main, [*both, "--revision", "main"]).exit_code == 2


def refused(path: Path, model: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BadInput):
        verify(path, model)


@pytest.mark.parametrize("name", ["m.reference", "m.safetensors", "m"])
def test_it_is_no_checkpoint(name: str, record: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(record.read_bytes())
    with pytest.raises(CorruptFile, match="a reference file") as refused:
        converter.open_artifact(path)
    assert refused.value.do.endswith(f"neoconvert verify {path} ARTIFACT")


def test_a_damaged_file_is_refused(record: Path, model: Path, tmp_path: Path) -> None:
    sound = record.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(sound), 60):
        other = bytes([sound[place] ^ 1])
        refused(tmp_path / "damaged", model, sound[:place] + other + sound[place + 1 :])
    for length in (0, 7, 100, len(sound) // 2, len(sound) - 1):
        refused(tmp_path / "damaged", model, sound[:length])


def test_a_large_file_is_not_read(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "MOST_BYTES", record.stat().st_size - 1)
    with pytest.raises(BadInput, match="larger than"):
        file.read(record)


def edited(record: Path, path: Path, change: Callable[[Any, dict[str, Any]], object]) -> Path:
    """The file with other contents, sealed again."""
    with safe_open(record, framework="numpy") as opened:
        said = json.loads(opened.metadata()[file.KEY])
    arrays = load_file(record) | {"seal": np.frombuffer(UNSEALED.encode(), np.uint8)}
    change(said, arrays)
    path.write_bytes(sealed(save(arrays, {file.KEY: json.dumps(said)})))
    assert bears_seal(path)
    return path


ODD: tuple[Any, ...] = (None, -1, 2**40, 1e400, "x" * 5000, [], {}, [[]], True, 0.5)


Change = Callable[[np.ndarray], np.ndarray]
ARRAYS: tuple[Change, ...] = (
    lambda a: a[..., :0],
    lambda a: a * np.nan,
    lambda a: a + 1e9,
    lambda a: a - 1e9,
    lambda a: a + 1e300,
    lambda a: a + 0.5,
    lambda a: a.astype(np.float32),
    lambda a: a[None],
)


def taken(record: Path, path: Path, change: Callable[[Any, dict[str, Any]], object]) -> bool:
    try:
        file.read(edited(record, path, change))
    except BadInput:
        return False
    return True


@pytest.mark.filterwarnings("error")
def test_a_sealed_file_is_not_trusted_for_its_seal(record: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    assert taken(record, path, lambda _said, _arrays: None)
    fields: list[tuple[Any, ...]] = [(name,) for name in vars_of(record)]
    fields += [("config", name) for name in file.read(record).config.__dict__]
    fields += [("probes", 0, n) for n in ("name", "start", "prefill", "text", "padded", "own")]
    fields += [("recipes", 0, n) for n in ("steps", "sha256", "neutral", "evidence", "scale")]
    count = 0
    for at in fields:
        for value in ODD:
            count += not taken(record, path, partial(_put, at, value))
    assert count > 200
    for name in load_file(record):
        for change in ARRAYS if name != "seal" else ():
            if taken(record, path, partial(_change, name, change)):
                assert name.startswith(("runs", "facts", "logp")), name


def _put(at: tuple[Any, ...], value: Any, said: Any, _: dict[str, Any]) -> None:
    put(said, at, value)


def _change(name: str, change: Change, _: Any, arrays: dict[str, Any]) -> None:
    arrays[name] = np.ascontiguousarray(change(arrays[name]))


def vars_of(record: Path) -> list[str]:
    with safe_open(record, framework="numpy") as opened:
        return list(json.loads(opened.metadata()[file.KEY]))


def put(document: Any, at: tuple[Any, ...], value: Any) -> None:
    for name in at[:-1]:
        document = document[name]
    document[at[-1]] = value
