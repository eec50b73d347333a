"""The steps between two checkpoints are named exactly, from weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from converter.checkpoint import Checkpoint
from converter.explaining import explain
from converter.processing import STEPS, Step
from tests.explaining.artifacts import NAMES_OF, Weights, artifact, process, read, write
from tests.explaining.oracle import process_in_transformer_lens
from tests.models import random_hf
from tests.processing.weights import SUBSETS, label

FOLD, CENTRE, UNEMBED, VALUES, REFACTOR = NAMES_OF


def traces(weights: Weights, steps: Sequence[Step]) -> tuple[str, ...]:
    """The steps that leave a trace: folding value biases needs some, and refactoring does it too."""
    names = [step.name for step in steps]
    some = any(weights[key].any() for key in weights if key.endswith("b_V"))
    if VALUES in names and (REFACTOR in names or not (some or FOLD in names)):
        names.remove(VALUES)
    return tuple(names)


@pytest.mark.parametrize("code", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("model", ["demo", "random", "biased"])
@pytest.mark.parametrize("steps", SUBSETS, ids=label)
def test_every_subset_is_named(
    steps: tuple[Step, ...],
    model: str,
    code: str,
    models: dict[str, Checkpoint],
    tmp_path: Path,
) -> None:
    original = models[model]
    found = explain(original, artifact(tmp_path / "b", original, steps, code=code))
    assert found.steps == traces(read(original), steps)
    names = {step.name for step in steps}
    nothing_to_fold = REFACTOR in names or not (model == "biased" or FOLD in names)
    assert set(found.silence) == ({VALUES} if nothing_to_fold else set())
    assert not found.unexplained
    assert not found.undone
    unchanged = not found.steps and code == "F32"
    assert found.verdict == ("same-weights" if unchanged else "same-function")
    assert (found.cast is None) == (code == "F32")


@pytest.mark.parametrize("layout", ["bridge", "hf"])
@pytest.mark.parametrize("model", ["random", "biased"])
@pytest.mark.parametrize("steps", SUBSETS, ids=label)
def test_in_every_layout_and_both_ways_round(
    steps: tuple[Step, ...],
    model: str,
    layout: str,
    models: dict[str, Checkpoint],
    tmp_path: Path,
) -> None:
    original = models[model]
    converted = artifact(tmp_path / "b", original, steps, layout)  # type: ignore[arg-type]
    there, back = explain(original, converted), explain(converted, original)
    for found in (there, back):
        assert found.steps == traces(read(original), steps)
        assert not found.unexplained
        assert found.verdict == (
            "same-function" if found.steps or there.carried else "same-weights"
        )
    assert not there.undone
    assert back.undone == back.steps
    assert (there.carried, back.carried) in (("converted", "original"), (None, None))
    carries = layout == "hf" and (FOLD in there.steps or model == "biased")
    assert (there.carried is not None) == carries


def test_between_any_two_subsets(random_model: Checkpoint, tmp_path: Path) -> None:
    """Processed against processed, stored in bfloat16: each is a rounded copy."""
    chosen = [(), STEPS[:1], STEPS[1:2], STEPS[4:], STEPS[:4], (STEPS[0], STEPS[3]), STEPS]
    stored = [
        artifact(tmp_path / str(i), random_model, steps, code="BF16")
        for i, steps in enumerate(chosen)
    ]
    for (i, a), (j, b) in product(enumerate(stored), repeat=2):
        found = explain(a, b)
        before, after = ({step.name for step in chosen[k]} for k in (i, j))
        expected = (before ^ after) - {VALUES}
        assert set(found.steps) - {VALUES} == expected, (i, j)
        assert set(found.undone) - {VALUES} == before - after - {VALUES}, (i, j)
        assert not found.unexplained, (i, j)
        assert (found.verdict == "same-weights") == (i == j), (i, j)


@pytest.mark.parametrize("layouts", [("hooked", "hooked"), ("hf", "hooked")])
def test_steps_that_went_opposite_ways(
    layouts: tuple[str, str], biased_model: Checkpoint, tmp_path: Path
) -> None:
    """A model's own value biases are folded in one, and LayerNorm, which adds to them, in the other."""
    folded = artifact(tmp_path / "a", biased_model, STEPS[:1], layouts[0])  # type: ignore[arg-type]
    moved = artifact(tmp_path / "b", biased_model, STEPS[3:4], layouts[1])  # type: ignore[arg-type]
    for found, undone in ((explain(folded, moved), FOLD), (explain(moved, folded), VALUES)):
        assert not found.unexplained
        assert found.verdict == "same-function"
        assert VALUES in found.steps
        assert set(found.undone) <= {undone}


def test_what_a_step_does_as_well_is_its_own(biased_model: Checkpoint, tmp_path: Path) -> None:
    """Refactoring folds value biases: what moved into b_O is its doing."""
    found = explain(biased_model, artifact(tmp_path / "b", biased_model, STEPS[4:]))
    steps = {fact.key: fact.steps for fact in found.tensors}
    assert steps["blocks.0.attn.b_V"] == steps["blocks.0.attn.b_O"] == (REFACTOR,)
    assert found.silence == {VALUES: f"{REFACTOR} does it as well"}


@pytest.mark.parametrize("model", ["demo", "random", "biased"])
@pytest.mark.parametrize("steps", SUBSETS, ids=label)
def test_what_transformer_lens_itself_did(
    steps: tuple[Step, ...], model: str, models: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """In float32, with the larger residuals of its arithmetic."""
    original = models[model]
    weights = process_in_transformer_lens(read(original), original.config, steps)
    found = explain(original, write(tmp_path / "b", weights, original, "hooked"))
    assert found.steps == traces(read(original), steps)
    assert not found.unexplained
    assert found.verdict == ("same-function" if found.steps else "same-weights")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("steps", [STEPS[:4], STEPS], ids=label)
def test_processing_in_low_precision_is_recognised_and_said(
    steps: tuple[Step, ...], dtype: str, demo: Checkpoint, tmp_path: Path
) -> None:
    """TransformerLens 2 processed in the dtype that the model was loaded in."""
    weights = process_in_transformer_lens(read(demo), demo.config, steps, dtype)
    code = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    found = explain(demo, write(tmp_path / "b", weights, demo, "hooked", code))
    assert found.steps == traces(read(demo), steps)
    assert not found.unexplained
    assert found.coarse
    assert any("storage dtype" in sentence for sentence in found.headline())


def test_an_original_in_low_precision_is_exact(tmp_path: Path, random_model: Checkpoint) -> None:
    raw = write(tmp_path / "a", read(random_model), random_model, "hooked", "BF16")
    for i, steps in enumerate(SUBSETS):
        found = explain(raw, artifact(tmp_path / str(i), raw, steps))
        assert found.steps == traces(read(raw), steps)
        assert not found.unexplained
        assert not found.coarse


def test_other_signs_of_singular_vectors_are_nothing(
    random_model: Checkpoint, tmp_path: Path
) -> None:
    """TransformerLens's choice of signs against ours."""
    weights = process_in_transformer_lens(read(random_model), random_model.config, STEPS)
    theirs = write(tmp_path / "theirs", weights, random_model, "hooked")
    found = explain(theirs, artifact(tmp_path / "ours", random_model, STEPS))
    assert found.verdict == "same-function"
    assert found.steps == ()
    assert not found.unexplained
    assert any("signs" in line for line in found.lines())


def test_no_provenance_is_believed(random_model: Checkpoint, tmp_path: Path) -> None:
    """That says fold_ln about raw weights."""
    from converter.checkpoint import open_checkpoint

    raw = artifact(tmp_path / "b", random_model, ())
    (raw.directory / "neoconvert.json").write_text('{"steps": ["fold_ln"]}')
    assert explain(random_model, open_checkpoint(raw.directory)).verdict == "same-weights"


@pytest.mark.parametrize("gain_decades", [2, 4])
def test_gains_over_many_decades(gain_decades: float, tmp_path: Path) -> None:
    from converter.checkpoint import open_checkpoint

    original = open_checkpoint(random_hf(tmp_path / "a", gain_decades=gain_decades, hidden_size=64))
    for steps in (STEPS[:1], STEPS[:4], STEPS):
        weights = process_in_transformer_lens(read(original), original.config, steps)
        for name, each in (("tl", weights), ("ours", process(read(original), steps))):
            directory = tmp_path / f"{name}{len(steps)}"
            found = explain(original, write(directory, each, original, "hooked"))
            assert found.steps == traces(read(original), steps)
            assert not found.unexplained


def test_scaled_attention_is_absorbed(random_model: Checkpoint, tmp_path: Path) -> None:
    """TransformerLens divides scores by √d_head; GPT-Neo does not."""
    weights = read(random_model)
    for key in weights:
        if key.endswith(".W_Q"):
            weights[key] = weights[key] * np.sqrt(random_model.config.d_head)
    scaled = write(tmp_path / "b", weights, random_model, "hooked", use_attn_scale=True)
    assert scaled.config.score_divisors
    found = explain(random_model, scaled)
    assert (found.verdict, found.unexplained) == ("same-function", ())
