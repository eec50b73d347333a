"""Provenance is a claim: what an artifact is, its weights decide."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import converter
from converter import verify
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.checkpoint.source import PROVENANCE
from converter.processing import DEFAULT, STEPS, Step
from converter.routing import plain
from converter.verification.judge import MAX_RATIO
from converter.verification.measuring import Errors
from converter.verification.probes import standard_probes
from converter.verification.reference import forward
from converter.verification.route_link import examine_route
from converter.verification.standard import standard_for
from tests.explaining.artifacts import read, write
from tests.explaining.oracle import process_in_transformer_lens
from tests.models import random_hf

NAMES = [step.name for step in STEPS]


def original(directory: Path, dtype: str = "float32") -> Checkpoint:
    return open_checkpoint(random_hf(directory / f"hf-{dtype}", dtype=dtype, scale=1.5))


def edit_file(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("steps", [DEFAULT, STEPS], ids=["default", "all"])
@pytest.mark.parametrize(
    ("before", "after", "computed"),
    [
        ("float32", "F32", "float32"),
        ("float16", "F32", "float32"),
        ("float16", "F16", "float32"),
        ("bfloat16", "BF16", "float32"),
        ("float32", "BF16", "bfloat16"),
    ],
)
def test_transformer_lens_own_work_in_every_dtype(
    steps: Sequence[Step], before: str, after: str, computed: str, tmp_path: Path
) -> None:
    source = original(tmp_path, before)
    weights = process_in_transformer_lens(read(source), source.config, steps, computed)
    artifact = write(tmp_path / "tl", weights, source, "hooked", after)
    result = verify(source, artifact, effort="quick")
    assert result.passed, result.summary()
    assert result.weights is not None
    if result.weights.explained is not None:  # else it has our own bits: in 16 they may agree
        assert {*result.weights.explained, "fold_value_biases"} == {step.name for step in steps}
    assert result.weights.explained is not None or after == "BF16"
    weights["blocks.1.mlp.W_in"][3, 4] *= 1.1
    artifact = write(tmp_path / "edited", weights, source, "hooked", after)
    result = verify(source, artifact, checks=["weights"])
    assert not result.passed
    assert result.weights is not None
    assert result.weights.mismatched == ("blocks.1.mlp.W_in",)


@pytest.mark.parametrize(
    ("width", "before", "computed", "steps"),
    [
        (64, "bfloat16", "float32", ["center_writing_weights", "center_unembed"]),
        (32, "float16", "float32", ["center_writing_weights", "center_unembed"]),
        (16, "bfloat16", "float32", [step.name for step in DEFAULT]),
    ],
)
def test_transformer_lens_means_over_a_power_of_two(
    width: int, before: str, computed: str, steps: list[str], tmp_path: Path
) -> None:
    """They are nearly exact in float32, so that only a few tensors have other last bits than ours."""
    recipe: dict[str, Any] = {"dtype": before, "hidden_size": width, "num_heads": 4}
    source = open_checkpoint(random_hf(tmp_path / "hf", **recipe))
    chosen = [step for step in STEPS if step.name in steps]
    weights = process_in_transformer_lens(read(source), source.config, chosen, computed)
    artifact = write(tmp_path / "tl", weights, source, "hooked", "F32")
    result = verify(source, artifact, checks=["weights"])
    assert result.passed, result.summary()
    weights["blocks.1.mlp.W_in"][3, 4] *= 1.001
    artifact = write(tmp_path / "edited", weights, source, "hooked", "F32")
    assert not verify(source, artifact, checks=["weights"]).passed


def test_provenance_of_what_was_there_before(tmp_path: Path) -> None:
    source = original(tmp_path)
    converter.hf_to_tl(source, tmp_path / "tl", check=False)
    weights = process_in_transformer_lens(read(source), source.config, DEFAULT)
    processed = write(tmp_path / "other", weights, source, "hooked")
    for name in ("model.safetensors", "cfg.json"):
        (tmp_path / "tl" / name).write_bytes((processed.directory / name).read_bytes())
    result = verify(source, tmp_path / "tl", effort="quick")
    assert result.passed, result.summary()
    assert any("does not lead from this original" in remark for remark in result.remarks)


@pytest.mark.parametrize("digests", ["true", "false"])
def test_steps_that_never_happened(tmp_path: Path, digests: str) -> None:
    source = original(tmp_path)
    converter.hf_to_tl(source, tmp_path / "tl", check=False)

    def lie(document: dict[str, Any]) -> None:
        document["steps"], document["route"] = NAMES[:2], "processing"
        for tensor in document["output"]["tensors"].values() if digests == "false" else ():
            tensor["sha256"] = "0" * 64

    edit_json(tmp_path / "tl" / PROVENANCE, lie)
    assert converter.inspect(tmp_path / "tl").steps == []
    result = verify(source, tmp_path / "tl", effort="quick")
    assert result.passed, result.summary()
    assert result.weights is not None
    assert result.weights.explained is None
    back = converter.tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert back.route.steps == ()


@pytest.mark.parametrize("steps", ["default", "all"])
def test_a_lie_excuses_no_bit(tmp_path: Path, steps: str) -> None:
    """Fewer steps than were carried out: the rest is our own work, to the last bit."""
    source = original(tmp_path)
    converter.hf_to_tl(source, tmp_path / "tl", process=steps, check=False)
    edit_json(tmp_path / "tl" / PROVENANCE, lambda d: d.update(steps=NAMES[:1]))
    assert verify(source, tmp_path / "tl", checks=["weights"]).passed

    def last_bit(tensors: dict[str, Any]) -> None:
        tensors["blocks.1.mlp.W_out"].view(np.int32)[3, 4] ^= 1

    edit_file(tmp_path / "tl" / "model.safetensors", last_bit)
    result = verify(source, tmp_path / "tl", checks=["weights"])
    assert result.weights is not None
    assert result.weights.mismatched == ("blocks.1.mlp.W_out",)


def test_trained_after_baking(tmp_path: Path) -> None:
    source = original(tmp_path)
    converter.bake(source, tmp_path / "baked", ledger="none", check=False)
    rng = np.random.default_rng(0)

    def train(tensors: dict[str, Any]) -> None:
        for array in tensors.values():
            array += 0.02 * rng.standard_normal(array.shape).astype(array.dtype)

    edit_file(tmp_path / "baked" / "model.safetensors", train)
    done = converter.hf_to_tl(tmp_path / "baked", tmp_path / "tl", check=False)
    assert done.route.steps == ()
    assert "blocks.0.ln1.w" in load_file(tmp_path / "tl" / "model.safetensors")


@pytest.mark.parametrize(("scale", "factor", "right"), [(4.0, 4.0, True), (4.0, 4.01, False)])
def test_another_scale_of_the_scores(
    scale: float, factor: float, right: bool, tmp_path: Path
) -> None:
    """HookedTransformer divides the scores, and W_Q is that much larger."""
    source = original(tmp_path)
    converter.hf_to_tl(source, tmp_path / "tl", check=False)
    (tmp_path / "tl" / PROVENANCE).unlink()

    def enlarge(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("W_Q"):
                tensors[name] = tensors[name] * np.float32(factor)

    edit_file(tmp_path / "tl" / "model.safetensors", enlarge)
    edit_json(
        tmp_path / "tl" / "cfg.json", lambda d: d.update(use_attn_scale=True, attn_scale=scale)
    )
    assert verify(source, tmp_path / "tl", effort="quick").passed == right
    converter.tl_to_hf(tmp_path / "tl", tmp_path / "back")
    assert verify(source, tmp_path / "back", effort="quick").passed == right


def test_stored_weights_of_another_function(tmp_path: Path) -> None:
    """What no tensor's tolerance shows, the function of all of them together does."""
    source = original(tmp_path)
    weights = read(source)
    artifact = write(tmp_path / "same", weights, source, "hooked")
    weights["unembed.W_U"] *= 1.001
    moved = write(tmp_path / "moved", weights, source, "hooked")
    probes = standard_probes(source.config, None, 0, "quick")[:3]
    true = forward(source, probes, dtype=torch.float64, device=torch.device("cpu"))

    def silent(what: str, done: int = 0, total: int = 0) -> None: ...

    for one, off in ((artifact, False), (moved, True)):
        route = plain(source)
        noise: list[list[Errors]] = [[] for _ in probes]
        own = [None] * len(probes)
        standard = standard_for(route, one, true, own, noise, 0, silent, itself=True)
        found = examine_route(
            route, "it", one, true, standard, true, None,
            same=False, explained=(), known=False, limit=MAX_RATIO, seed=0, say=silent,
        )  # fmt: skip
        assert (found.outcome == "differs") == off


def test_a_stated_dtype_that_rounds_counts_here_too(tmp_path: Path) -> None:
    """Of what TransformerLens processed, whose steps are found and whose bits are its own."""
    source = original(tmp_path)
    weights = process_in_transformer_lens(read(source), source.config, DEFAULT)
    artifact = write(tmp_path / "tl", weights, source, "hooked").directory
    honest = verify(source, artifact, checks="weights")
    assert honest.passed
    assert honest.weights is not None
    assert honest.weights.explained
    edit_json(artifact / "cfg.json", lambda cfg: cfg.update(dtype="torch.float16"))
    result = verify(source, artifact, checks="weights")
    assert not result.passed
    assert "dtype: float16 is stated" in result.problems[0]
