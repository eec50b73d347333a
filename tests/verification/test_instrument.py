"""What verification can be asked for: other environments, texts, efforts, errors by layer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.choices import LedgerOption
from converter.demo import MODEL
from converter.errors import BadInput, CannotDoHere, VerificationFailed
from converter.layout import Layout
from converter.opening import open_artifact
from converter.verification import Divergence, verify
from converter.verification.loading import has_hooked_transformer
from tests.marks import needs_hooked
from tests.models import random_hf, write_as


def edit(key: str, array: object) -> object:
    return array * 1.01 if key == "blocks.1.attn.b_O" else array  # type: ignore[operator]


def test_another_environment(original: Checkpoint, there: Path) -> None:
    artifact = open_checkpoint(write_as(original, there, "hf"))
    result = verify(original, artifact, effort="quick", pythons=[Path(sys.executable)])
    assert result.passed, result.summary()
    here, other = (r for r in result.runtimes if r.role == "artifact")
    assert other.what.startswith("GPTNeoForCausalLM (transformers ")
    mine = [p for p in result.probes if p.runtime == here.what]
    theirs = [p for p in result.probes if p.runtime == other.what]
    assert [p.name for p in mine] == [p.name for p in theirs]
    assert [p.max_abs_logprob_diff for p in mine] == [p.max_abs_logprob_diff for p in theirs]
    exact = [e for e in result.evidence if e.link == "program"]
    assert [e.outcome for e in exact] == ["same", "same"]
    assert exact[0].error == exact[1].error


def test_another_environment_sees_the_fault(original: Checkpoint, there: Path) -> None:
    artifact = open_checkpoint(write_as(original, there, "hf", edit=edit))  # type: ignore[arg-type]
    result = verify(
        original, artifact, effort="quick", checks=["function"], pythons=[Path(sys.executable)]
    )
    assert {p.runtime for p in result.probes if not p.passed} == {p.runtime for p in result.probes}
    off = [e for e in result.evidence if e.outcome == "differs"]
    assert [e.link for e in off] == ["arithmetic", "route", "arithmetic"]
    assert result.problems == tuple(e.why for e in off)


HOOKED_HERE = has_hooked_transformer()
OTHER = Path(__file__).parents[2] / ".venvs" / ("tl4" if HOOKED_HERE else "tl3") / "bin/python"
"""With the other generation of TransformerLens."""
needs_other = pytest.mark.skipif(not OTHER.exists(), reason=f"there is no {OTHER}")


@needs_other
@pytest.mark.parametrize("layout", ["hf", "bridge"])
def test_both_generations(original: Checkpoint, there: Path, layout: Layout) -> None:
    artifact = open_checkpoint(write_as(original, there, layout))
    result = verify(original, artifact, effort="quick", pythons=OTHER, require="program")
    assert result.passed, result.summary()
    exact = [(e.subject, e.outcome) for e in result.evidence if e.link == "program"]
    what = "TransformerBridge" if layout == "bridge" else "GPTNeoForCausalLM"
    (here, first), (other, second) = exact
    assert (here, first, second) == (what, "same", "same")
    assert other.startswith(f"{what} (trans")


@needs_other
@pytest.mark.parametrize("edited", [False, True])
def test_a_hooked_artifact_where_transformer_lens_4_is_one_of_two(
    original: Checkpoint, there: Path, edited: bool
) -> None:
    """HookedTransformer runs it wherever it is; an environment without it is required in vain."""
    artifact = open_checkpoint(
        write_as(original, there, "hooked", edit=edit if edited else None)  # type: ignore[arg-type]
    )
    result = verify(original, artifact, effort="quick", pythons=OTHER, require="program")
    ran = [r.what for r in result.runtimes if r.role == "artifact"]
    exact = [e for e in result.evidence if e.link == "program"]
    assert ran == [e.subject for e in exact]
    assert exact[0].outcome == "same"
    assert ran[0].startswith("HookedTransformer")
    assert result.passed == (not HOOKED_HERE and not edited)
    advice = [r for r in result.remarks if "--python" in r]
    if not HOOKED_HERE:
        assert (len(ran), advice) == (1, [])
        return
    assert ran[1].startswith("neoconvert's own forward (transformer-lens 4.")
    assert exact[1].outcome == "not comparable"
    assert exact[1].why is not None
    assert exact[1].why.startswith("no software in its environment runs the layout")
    assert len(advice) == 1
    assert "TransformerLens 3 or earlier" in advice[0]


@pytest.mark.skipif(HOOKED_HERE, reason="TransformerLens 3 runs the hooked layout")
@needs_other
def test_what_is_said_to_do_about_a_program_that_is_not_here(
    original: Checkpoint, there: Path
) -> None:
    artifact = open_checkpoint(write_as(original, there, "hooked"))
    failed = verify(original, artifact, effort="quick", require="program")
    assert not failed.passed
    (advice,) = (remark for remark in failed.remarks if "--python" in remark)
    assert "TransformerLens 3 or earlier" in advice
    assert verify(original, artifact, effort="quick", require="program", pythons=OTHER).passed


def test_an_environment_that_cannot(original: Checkpoint, there: Path, tmp_path: Path) -> None:
    artifact = open_checkpoint(write_as(original, there, "hf"))
    with pytest.raises(CannotDoHere, match="it printed nothing"):
        verify(original, artifact, pythons=[Path("/bin/false")])
    bare = tmp_path / "bare-python"
    bare.write_text("#!/bin/sh\necho ModuleNotFoundError: no torch >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(CannotDoHere, match="ModuleNotFoundError: no torch"):
        verify(original, artifact, pythons=[bare])
    with pytest.raises(CannotDoHere, match="cannot be started"):
        verify(original, artifact, pythons=[tmp_path / "no-python"])


def test_an_environment_that_refuses(original: Checkpoint, there: Path) -> None:
    artifact = open_checkpoint(write_as(original, there, "hf"))
    (there / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"config|model_type"):
        verify(original, artifact, effort="quick", pythons=[Path(sys.executable)])


REFUSED = {"refused": ["what", "where", "do"]}
HELLO = {"name": "transformers", "what": "x", "version": "1"}


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([REFUSED | {"exit_code": 3}], BadInput),
        ([REFUSED | {"exit_code": 4}], CannotDoHere),
        ([HELLO, {"stopped": "index out of range"}], VerificationFailed),
    ],
)
def test_what_another_environment_says(
    answers: list[dict[str, object]], kind: type[Exception],
    original: Checkpoint, there: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Only a run that stops is a verdict."""
    artifact = open_checkpoint(write_as(original, there, "hf"))
    python = tmp_path / "python"
    lines = "".join(f"echo '{json.dumps(answer)}'\n" for answer in answers)
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{lines}read request\nread more\n")
    python.chmod(0o755)
    with pytest.raises(kind):
        verify(original, artifact, effort="quick", pythons=[python])
    with pytest.raises(ProcessLookupError):  # it was ended, and is not left to wait
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    text = tmp_path / "mine.py"
    text.write_text("import json\n\ndef read(path):\n    return json.load(open(path))\n" * 8)
    model = open_checkpoint(MODEL)
    result = verify(model, model, effort="quick", text=text)
    (probe,) = (p for p in result.probes if p.name == "mine.py")
    assert probe.perplexity is not None
    assert 1 < probe.perplexity.original < 1280
    assert probe.perplexity.artifact == pytest.approx(probe.perplexity.original, rel=1e-5)
    (tmp_path / "empty").write_text("")
    with pytest.raises(BadInput, match="empty"):
        verify(model, model, effort="quick", text=tmp_path / "empty")


def test_what_rounding_costs_is_told_apart(tmp_path: Path) -> None:
    model = open_checkpoint(MODEL)
    artifact = open_checkpoint(write_as(model, tmp_path / "half", "hf", dtype="bfloat16"))
    result = verify(model, artifact)
    assert result.passed, result.summary()
    (text,) = (p for p in result.probes if p.name == "text")
    assert text.ratio < 8
    assert text.perplexity is not None
    assert text.storage_kl is not None
    assert text.storage_max_abs_logprob_diff is not None
    # Conversion adds nothing to what rounding does, and rounding does something.
    assert text.max_abs_logprob_diff < text.storage_max_abs_logprob_diff / 100
    assert abs(text.perplexity.artifact - text.perplexity.stored) < 1e-3
    assert text.storage_kl > 0


@pytest.mark.parametrize("layout", ["hf", "bridge", "hooked"])
def test_errors_by_layer(original: Checkpoint, there: Path, layout: str) -> None:
    artifact = open_checkpoint(write_as(original, there, layout))  # type: ignore[arg-type]
    (layers,) = verify(original, artifact, effort="quick", layers=True).layers
    assert [u.unit for u in layers.units] == ["embed", "block 0", "block 1"]
    assert all(u.ratio < 8 for u in layers.units)


@pytest.mark.parametrize("layout", ["hf", "bridge", "hooked"])
def test_the_layer_at_fault_and_its_tensor(original: Checkpoint, there: Path, layout: str) -> None:
    artifact = open_checkpoint(write_as(original, there, layout, edit=edit))  # type: ignore[arg-type]
    result = verify(original, artifact, effort="quick", checks=["function"])
    assert result.first_divergence is not None
    assert result.first_divergence.unit == "block 1"
    assert result.first_divergence.tensor == artifact.slots["blocks.1.attn.b_O"].name
    (layers,) = result.layers
    assert [u.ratio < 8 for u in layers.units] == [True, True, False]


def test_positions(original: Checkpoint, there: Path) -> None:
    """A window that is one short shows from the window's own length on, and not before."""
    window = original.config.window_size
    config = {"window_size": window - 1}
    artifact = open_checkpoint(write_as(original, there, "hf", config=config))
    result = verify(original, artifact, checks=["function"])
    (probe,) = (p for p in result.probes if p.name == "context")
    assert probe.by_position is not None
    off = [e > 8 * f for e, f in zip(probe.by_position.error, probe.by_position.floor, strict=True)]
    assert off.index(True) == window - 1
    assert result.first_divergence is not None
    assert result.first_divergence.unit == "block 1"


@needs_hooked
def test_transformer_lens_own_processing_is_accounted_for(tmp_path: Path) -> None:
    """What from_pretrained gives has no provenance, and other roundings than ours."""
    model = open_checkpoint(MODEL)
    converter.hf_to_tl(model, tmp_path / "raw", check=False)
    hooked = converter.load_hooked(tmp_path / "raw")
    hooked.process_weights_()
    state = hooked.state_dict()
    torch.save((hooked.cfg.to_dict(), state), tmp_path / "model.pt")
    artifact = open_artifact(tmp_path / "model.pt", allow_pickle=True)
    result = verify(model, artifact, effort="quick")
    assert result.passed, result.summary()
    assert result.weights is not None
    assert result.weights.explained is not None
    assert len(result.weights.explained) == 4
    state["blocks.1.mlp.W_in"][3, 4] += 0.01
    torch.save((hooked.cfg.to_dict(), state), tmp_path / "edited.pt")
    artifact = open_artifact(tmp_path / "edited.pt", allow_pickle=True)
    result = verify(model, artifact, effort="quick")
    assert not result.passed
    assert result.weights is not None
    assert result.weights.mismatched == ("blocks.1.mlp.W_in",)
    assert result.first_divergence == Divergence("block 1", "blocks.1.mlp.W_in")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("ledger", ["compact", "exact"])
def test_what_was_processed_into_16_bits_comes_back(
    tmp_path: Path, dtype: str, ledger: LedgerOption
) -> None:
    """The original is not what the rounded file computes; that is no fault of undoing."""
    source = random_hf(tmp_path / "m", scale=1.5)
    converter.hf_to_tl(source, tmp_path / "tl", process="default", dtype=dtype, ledger=ledger)
    back = converter.tl_to_hf(tmp_path / "tl", tmp_path / "back")
    assert isinstance(back, converter.Conversion)
    assert back.verification is not None
    assert back.verification.passed
    costs = [p.storage_max_abs_logprob_diff for p in back.verification.probes]
    assert all(cost is not None and cost > 1e-4 for cost in costs)
    if ledger == "exact":
        assert verify(source, tmp_path / "back", effort="quick").passed


def test_provenance_of_another_original(tmp_path: Path) -> None:
    """Made in two steps: what its provenance says is true, but not of this original."""
    source = random_hf(tmp_path / "m", scale=1.5)
    converter.hf_to_tl(source, tmp_path / "tl", process="default", check=False)
    converter.export_onnx(tmp_path / "tl", tmp_path / "onnx", check=False)
    for artifact in (tmp_path / "onnx", tmp_path / "onnx/model.onnx"):
        result = verify(source, artifact, effort="quick")
        assert result.passed, result.summary()
        assert result.weights is not None
        assert result.weights.explained is None  # our own bits, and no rounding to excuse
        assert any("By its weights" in remark for remark in result.remarks)


def test_provenance_of_this_original_excuses_no_bit(tmp_path: Path) -> None:
    """The last bit of one weight: less than what the search for steps lets pass."""
    source = random_hf(tmp_path / "m", scale=1.5)
    converter.hf_to_tl(source, tmp_path / "tl", process="default", check=False)
    path = tmp_path / "tl/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    result = verify(source, tmp_path / "tl", checks=["weights"])
    assert not result.passed
    assert result.weights is not None
    assert len(result.weights.mismatched) == 1


def test_a_processed_artifact_reproduces_itself(tmp_path: Path) -> None:
    """Its provenance is of what it was made from, and not of itself."""
    source = random_hf(tmp_path / "m", scale=1.5)
    converter.bake(source, tmp_path / "baked", check=False)
    result = verify(tmp_path / "baked", tmp_path / "baked", effort="quick")
    assert result.passed, result.summary()
