"""A verifier is worth what it catches, and honest conversions must not be flagged."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.display import Display
from converter.errors import BadInput, TensorMismatch, UsageError, VerificationFailed, classified
from converter.layout import LAYOUTS, Layout
from converter.routing import plain
from converter.verification import (
    CHECKS,
    MAX_RATIO,
    Verification,
    compare_weights,
    runtimes,
    verify,
)
from converter.verification.evidence import Evidence
from converter.verification.judge import ULP32, pooled_floor
from converter.verification.library_runtime import Library
from converter.verification.measuring import measure
from converter.verification.probes import Probe
from converter.verification.reference import forward
from tests.marks import needs_hooked
from tests.models import Edit, random_hf, write_as
from tests.verification.fault import Fault
from tests.verification.faults import FAULTS
from tests.verification.faulty import Workshop, for_fault

CPU: dict[str, Any] = {"device": "cpu"}
STORED = [
    fault
    for fault in FAULTS
    if (fault.weights or fault.config)
    and "hooked" in fault.on
    and not fault.harmless
    and fault.name != "heads counted otherwise"  # is refused on opening
]


def on(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    return lambda k, value: change(value) if k.endswith(key) else value


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_honest_artifacts_pass(
    original: Checkpoint, there: Path, layout: Layout, dtype: str | None
) -> None:
    result = verify(
        original, open_checkpoint(write_as(original, there, layout, dtype=dtype)), **CPU
    )
    assert result.passed, result.summary()
    assert result.first_divergence is None
    assert result.weights is not None
    assert result.weights.compared >= len(original.stored)
    for probe in result.probes:
        assert (probe.storage_max_abs_logprob_diff is not None) == (dtype is not None)
        assert probe.top1_agreement == 1
        if probe.storage_max_abs_logprob_diff is not None:
            assert probe.storage_max_abs_logprob_diff > 10 * probe.max_abs_logprob_diff


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1, 4])
def test_ill_conditioned_models_pass(tmp_path: Path, seed: int, scale: float) -> None:
    """Gains over six decades, sharp attention, eight layers: float32 is off by whole nats."""
    source = open_checkpoint(
        random_hf(tmp_path / "m", seed=seed, scale=scale, gain_decades=3, num_layers=8)
    )
    artifact = open_checkpoint(write_as(source, tmp_path / "a", "hooked"))
    result = verify(source, artifact, **CPU)
    assert result.passed, result.summary()


@pytest.mark.parametrize("fault", STORED, ids=lambda fault: fault.name)
def test_what_differs_in_the_files_is_named(
    workshops: dict[str, Workshop], there: Path, fault: Fault
) -> None:
    """That function alone catches it, too: see `test_faults`."""
    workshop = for_fault(workshops, fault, "hooked")
    original, artifact = workshop.original, workshop.spoil(fault, "hooked", there)
    result = verify(original, artifact, checks=["weights"], **CPU)
    assert not result.passed
    assert result.weights is not None
    assert len(result.weights.config) == bool(fault.config)
    if fault.weights:
        differ = [
            k
            for k in original.slots
            if artifact.tensor(k).tobytes() != original.tensor(k).tobytes()
        ]
        assert result.weights.mismatched == tuple(differ)
        assert result.first_divergence is not None
        assert result.first_divergence.tensor == differ[0]


@needs_hooked
@pytest.mark.parametrize(
    "config", [{"use_attn_scale": True}, {"scale_attn_by_inverse_layer_idx": True}]
)
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_scaled_attention_absorbed_passes_and_ignored_fails(
    original: Checkpoint, tmp_path: Path, config: dict[str, bool], dtype: str | None
) -> None:
    source = open_checkpoint(write_as(original, tmp_path / "tl", "hooked", config=config))
    assert source.config.score_divisors
    artifact = open_checkpoint(write_as(source, tmp_path / "hf", "hf", dtype=dtype))
    result = verify(source, artifact, **CPU)
    assert result.passed, result.summary()
    ignored = open_checkpoint(write_as(original, tmp_path / "wrong", "hf", dtype=dtype))
    result = verify(source, ignored, **CPU)
    assert not result.passed
    assert not all(probe.passed for probe in result.probes)
    assert verify(source, source, **CPU).passed


@pytest.mark.parametrize("where", ["one token's embedding", "a block"])
def test_nan_of_the_artifact_fails(original: Checkpoint, there: Path, where: str) -> None:
    key = "embed.W_E" if where.startswith("one") else "1.mlp.b_out"

    def poison(value: np.ndarray) -> np.ndarray:
        copy = value.copy()
        copy.reshape(-1)[0] = np.nan
        return copy

    artifact = open_checkpoint(write_as(original, there, "hooked", edit=on(key, poison)))
    result = verify(original, artifact, checks=["function"], **CPU)
    assert not result.passed
    assert "NaN" in str([p.reason for p in result.probes])
    back = verify(artifact, original, checks=["function"], **CPU)
    assert not back.passed
    # The same NaN in the same places agrees; but where all is NaN, running has verified nothing,
    # and the weights alone prove the artifact.
    same = verify(artifact, artifact, checks=["function"], **CPU)
    assert same.passed == where.startswith("one")
    assert verify(artifact, artifact, **CPU).passed


def test_banned_tokens_with_minus_infinite_bias_agree(original: Checkpoint, there: Path) -> None:
    def ban(key: str, value: np.ndarray) -> np.ndarray:
        banned = np.arange(value.shape[-1]) < 2
        return np.where(banned, -np.inf, 0).astype(value.dtype) if key == "unembed.b_U" else value

    artifact = open_checkpoint(write_as(original, there, "hooked", edit=ban))
    result = verify(artifact, artifact, **CPU)
    assert result.passed, result.summary()
    assert all(np.isfinite(p.kl) for p in result.probes)
    assert not verify(original, artifact, checks=["function"], **CPU).passed


@pytest.mark.parametrize(
    ("field", "config"),
    [("d_vocab", {"vocab_size": 36}), ("n_ctx", {"max_position_embeddings": 31}), ("n_heads", {"num_heads": 2}),
     ("n_layers", {"num_layers": 1}), ("d_mlp", {"intermediate_size": 25})],
)  # fmt: skip
def test_another_architecture_is_a_typed_error(
    original: Checkpoint, there: Path, field: str, config: dict[str, Any]
) -> None:
    other = open_checkpoint(random_hf(there, **config))
    with pytest.raises(TensorMismatch, match=f"^{field} is"):
        verify(original, other, **CPU)
    with pytest.raises(TensorMismatch):
        compare_weights(plain(original), other)


def test_never_passes_vacuously(original: Checkpoint) -> None:
    for wrong in ([], ["nothing"]):
        with pytest.raises(UsageError):
            verify(original, original, checks=wrong, **CPU)
    with pytest.raises(UsageError):
        verify(original, original, probes=[], **CPU)


def test_an_artifact_that_does_not_load(original: Checkpoint, there: Path) -> None:
    """A broken file; and a failed verification where it is what a conversion has just made."""
    config = {"tie_word_embeddings": True}
    artifact = open_checkpoint(write_as(original, there, "bridge", config=config))
    with pytest.raises(BadInput) as caught:
        verify(original, artifact, **CPU)
    assert caught.value.exit_code == 3
    with pytest.raises(VerificationFailed):
        verify(original, artifact, route=plain(original), **CPU)


@pytest.mark.parametrize("layout", ["hf", "hooked"])
def test_a_stated_dtype_that_rounds_what_is_loaded(tmp_path: Path, layout: Layout) -> None:
    """transformers and TransformerLens load in the dtype that the config states."""
    from transformers import AutoModelForCausalLM

    def judged(original: Path, artifact: Path) -> tuple[str, ...]:
        return verify(original, artifact, checks="weights", require=()).problems

    source, half = random_hf(tmp_path / "hf"), {"dtype": "float16"}
    original = open_checkpoint(source)
    artifact = write_as(original, tmp_path / "half", layout, config=half)
    (problem,) = judged(source, artifact)
    assert "dtype: float16 is stated" in problem
    if layout == "hf":
        loaded: Any = AutoModelForCausalLM.from_pretrained(artifact)
        assert loaded.dtype == torch.float16
    # The same is loaded of an original that states the same, and of weights that it holds.
    assert not judged(artifact, artifact)
    write_as(
        original, tmp_path / "few", "hf", edit=lambda _, w: w.astype(np.float16).astype(np.float32)
    )
    few = open_checkpoint(tmp_path / "few")
    assert not judged(tmp_path / "few", write_as(few, tmp_path / "held", layout, config=half))


def test_a_graph_beside_weights_that_are_rounded_is_not_at_fault(tmp_path: Path) -> None:
    source = random_hf(tmp_path / "hf")
    there = write_as(open_checkpoint(source), tmp_path / "out", "hf")
    converter.export_onnx(there, check=False)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    result = verify(source, there, checks="weights")
    assert {e.subject: e.outcome for e in result.evidence if e.link == "weights"} == {
        "the weights": "differs",
        "model.onnx": "same",
    }


WITHOUT: list[tuple[Exception, int]] = [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"), 4),
    (MemoryError(), 4),
    (ModuleNotFoundError("No module named 'einops'", name="einops"), 4),
    (OSError(errno.EIO, "Input/output error", "model.safetensors"), 3),
]


@pytest.mark.parametrize(("error", "code"), WITHOUT, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("where", ["open", "logits", "exact_logits"])
def test_what_the_machine_lacks_is_no_verdict(
    error: Exception, code: int, where: str, original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise error

    if where == "open":
        monkeypatch.setattr(runtimes, "hf_model", breaks)
    else:
        monkeypatch.setattr(Library, where, breaks)
    with pytest.raises(type(error)) as caught:
        verify(original, original, **CPU)
    assert classified(caught.value).exit_code == code


def test_an_artifact_that_stops_while_it_runs_is_a_failed_verification(
    original: Checkpoint, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_checkpoint(write_as(original, there, "hooked"))
    logits = Library.logits

    def stops(self: Library, probe: Probe) -> Any:
        if self.name == "transformers":
            return logits(self, probe)
        raise IndexError("index out of range in self")

    monkeypatch.setattr(Library, "logits", stops)
    monkeypatch.setattr(runtimes.OwnForward, "logits", stops)
    with pytest.raises(VerificationFailed, match="cannot run the artifact: index out of range"):
        verify(original, artifact, **CPU)


def test_an_original_that_its_software_runs_otherwise_is_reported(
    original: Checkpoint, tmp_path: Path
) -> None:
    """Its error is then no measure of noise, under which anything could hide."""
    write_as(original, tmp_path / "m", "hf")
    source = open_checkpoint(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    wrong = dataclasses.replace(source, config=dataclasses.replace(source.config, window_size=4))
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    result = verify(wrong, source, checks=["function"], **CPU)
    assert not result.passed
    assert "departs from its own file" in result.problems[0]


def test_signed_zeros_that_a_layout_has_no_place_for_are_zeros(
    original: Checkpoint, tmp_path: Path
) -> None:
    minus = on(".b_Q", lambda b: -np.zeros_like(b))
    source = open_checkpoint(write_as(original, tmp_path / "tl", "hooked", edit=minus))
    assert compare_weights(plain(source), original).passed
    assert not compare_weights(plain(original), source).passed


def test_the_report_has_the_documented_keys(original: Checkpoint, there: Path) -> None:
    artifact = open_checkpoint(write_as(original, there, "bridge"))
    calls: list[str] = []

    def progress(what: str, done: int = 0, total: int = 0) -> None:
        assert done <= total
        calls.append(what)

    result = verify(original, artifact, progress=progress, **CPU)
    report = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert {"passed", "runtimes", "probes", "weights", "first_divergence"} <= report.keys()
    assert {"name", "version", "device"} <= report["runtimes"][0].keys()
    assert [r["role"] for r in report["runtimes"]] == ["original", "artifact"]
    assert all(r["version"] for r in report["runtimes"])
    documented = {
        "name", "runtime", "max_abs_logprob_diff", "mean_abs_logprob_diff", "kl",
        "top1_agreement", "noise_floor", "ratio", "passed",
    }  # fmt: skip
    assert all(documented <= probe.keys() for probe in report["probes"])
    assert report["weights"]["compared"] == len(artifact.stored)
    assert report["weights"]["mismatched"] == []
    assert result.summary().endswith("verified")
    assert calls


@pytest.mark.parametrize("check", CHECKS)
def test_one_layer_alone(original: Checkpoint, check: str) -> None:
    result: Verification = verify(original, original, checks=[check], **CPU)
    assert result.passed
    assert (result.weights is None) == (check != "weights")
    assert bool(result.probes) == (check == "function")


def test_the_floor_is_never_below_the_rounding_of_logits(original: Checkpoint) -> None:
    probe = Probe("one", np.array([[3]]))
    exact = forward(original, [probe], dtype=torch.float64)
    errors = measure(exact, 0, [exact.logits(0)])[0]
    assert errors.max_abs == errors.rms == errors.kl == 0
    floor = pooled_floor([errors])
    assert floor.max_abs == 2 * ULP32 * errors.scale
    assert errors.ratio(floor) == 0
    rounded = measure(exact, 0, [exact.logits(0).float()])[0]
    assert 0 < rounded.ratio(floor) < 1 < MAX_RATIO


def test_the_last_line_names_what_was_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    item = Evidence.not_comparable("HookedTransformer", "program", "no software here runs it")
    found = Verification(
        passed=True, runtimes=(), probes=(), weights=None, max_ratio=8, evidence=(item,)
    )
    Display().verification(found)
    assert capsys.readouterr().out.splitlines()[-1] == "  verified; not compared: program"
    Display().verification(dataclasses.replace(found, evidence=()))
    assert capsys.readouterr().out == "  verified\n"


@needs_hooked
def test_what_no_subject_can_run_is_not_run_for_it(tmp_path: Path) -> None:
    """HookedTransformer takes no positions. Who verifies may have other artifacts to come."""
    source, said = random_hf(tmp_path / "hf"), list[str]()
    cases: dict[Layout, bool] = {"hooked": False, "bridge": True}
    for layout, runs in cases.items():
        said.clear()
        converter.hf_to_tl(
            source, tmp_path / layout, layout=layout, effort="quick", progress=lambda what, *_: said.append(what)
        )  # fmt: skip
        assert ("GPTNeoForCausalLM: last positions" in said) == runs
    said.clear()
    verify(source, tmp_path / "hooked", effort="quick", progress=lambda what, *_: said.append(what))
    assert "GPTNeoForCausalLM: last positions" in said


def test_a_tied_head_has_the_name_of_its_tensor(tmp_path: Path) -> None:
    """There is no lm_head.weight in the artifact's file, whatever the original's has."""
    original = random_hf(tmp_path / "m", tied=False, scale=1.5)
    tensors = dict(load_file(tmp_path / "m/model.safetensors"))
    del tensors["lm_head.weight"]
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "tied").mkdir()
    save_file(tensors, tmp_path / "tied/model.safetensors", metadata={"format": "pt"})
    config["tie_word_embeddings"] = True
    (tmp_path / "tied/config.json").write_text(json.dumps(config))
    result = verify(original, tmp_path / "tied", effort="quick")
    assert result.weights is not None
    assert result.weights.mismatched == ("transformer.wte.weight",)
    assert "transformer.wte.weight (final, as the head)" in result.problems[0]
    assert result.first_divergence is not None
    assert str(result.first_divergence) == "final: transformer.wte.weight (also the head)"
    assert "lm_head" not in result.summary() + json.dumps(result.to_json())
    back = verify(tmp_path / "tied", original, effort="quick")
    assert str(back.first_divergence) == "final: lm_head.weight"
