"""What no step explains is found, located, and never taken for a step: the negative controls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.explaining import Explanation, explain
from converter.processing import DEFAULT, STEPS, Step, apply_all
from converter.processing.steps import BY_NAME
from tests.explaining.artifacts import NAMES_OF, Weights, artifact, process, read, units, write
from tests.models import random_hf

FOLD, CENTRE, UNEMBED, VALUES, REFACTOR = NAMES_OF
B = "blocks.1."


def edited(
    directory: Path,
    original: Checkpoint,
    steps: tuple[Step, ...],
    edit: Callable[[Weights], object],
    layout: str = "hooked",
    code: str | None = None,
) -> Explanation:
    return explain(original, artifact(directory / "b", original, steps, layout, code, edit))  # type: ignore[arg-type]


def noise(shape: tuple[int, ...], scale: float = 0.1) -> np.ndarray:
    return scale * np.random.default_rng(0).standard_normal(shape)


ROWS: dict[str, tuple[Any, str, str]] = {
    # key: (an index in hooked axes, where that is in the hooked file, in words)
    "embed.W_E": (np.s_[7], "[7, :]", "token 7"),
    "pos_embed.W_pos": (np.s_[3], "[3, :]", "position 3"),
    B + "ln1.w": (np.s_[5], "[5]", "channel 5"),
    B + "ln2.b": (np.s_[5], "[5]", "channel 5"),
    B + "attn.W_Q": (np.s_[2, :, 1], "[2, :, 1]", "head 2 dimension 1"),
    B + "attn.W_V": (np.s_[2], "[2, :, :]", "head 2"),
    B + "attn.W_O": (np.s_[1, 3], "[1, 3, :]", "head 1 dimension 3"),
    B + "attn.b_V": (np.s_[2, 3], "[2, 3]", "head 2 dimension 3"),
    B + "attn.b_O": (np.s_[9], "[9]", "channel 9"),
    B + "mlp.W_in": (np.s_[:, 17], "[:, 17]", "neuron 17"),
    B + "mlp.b_in": (np.s_[17], "[17]", "neuron 17"),
    B + "mlp.W_out": (np.s_[:, 4], "[:, 4]", "channel 4"),
    B + "mlp.b_out": (np.s_[4], "[4]", "channel 4"),
    "unembed.W_U": (np.s_[:, 11], "[:, 11]", "token 11"),
    "unembed.b_U": (np.s_[11], "[11]", "token 11"),
}


@pytest.mark.parametrize("code", ["F32", "BF16"])
@pytest.mark.parametrize("steps", [(), DEFAULT], ids=["raw", "default"])
@pytest.mark.parametrize("key", ROWS)
def test_one_edited_row_is_found_and_located(
    key: str, steps: tuple[Step, ...], code: str, biased_model: Checkpoint, tmp_path: Path
) -> None:
    if steps and ".ln" in key:
        pytest.skip("a folded hooked file has no LayerNorm")
    at, where, place = ROWS[key]

    def edit(weights: Weights) -> None:
        weights[key][at] += noise(weights[key][at].shape) + (
            0.05 if weights[key][at].ndim == 0 else 0
        )

    found = edited(tmp_path, biased_model, steps, edit, code=code)
    assert found.unexplained == (key,)
    assert found.verdict == "different-model"
    assert found.steps == tuple(step.name for step in steps)
    (fact,) = [fact for fact in found.tensors if not fact.explained]
    assert fact.where == (where,)
    assert fact.place == place
    assert any(key in line and place in line for line in found.lines())
    assert any(place in sentence for sentence in found.headline())


@pytest.mark.parametrize("layout", ["hooked", "bridge", "hf"])
@pytest.mark.parametrize("steps", [(), DEFAULT, STEPS], ids=["raw", "default", "all"])
def test_an_edited_row_of_the_demo_model(
    steps: tuple[Step, ...], layout: str, demo: Checkpoint, tmp_path: Path
) -> None:
    def edit(weights: Weights) -> None:
        weights["blocks.2.mlp.W_in"][:, 17] *= 1.01

    found = edited(tmp_path, demo, steps, edit, layout)
    name = {"hooked": "blocks.2.mlp.W_in", "bridge": "blocks.2.mlp.in.weight",
            "hf": "transformer.h.2.mlp.c_fc.weight"}[layout]  # fmt: skip
    assert found.unexplained == (name,)
    assert found.verdict == "different-model"
    fact = next(fact for fact in found.tensors if not fact.explained)
    assert fact.where == ("[:, 17]" if layout == "hooked" else "[17, :]",)
    assert set(found.steps) == {s.name for s in steps} - (
        {VALUES} if REFACTOR in {s.name for s in steps} else set()
    )


@pytest.mark.parametrize(
    ("key", "at", "place"),
    [
        ("attn.W_Q", np.s_[:, 6], "channel 6"),
        ("attn.W_K", np.s_[:, 6], "channel 6"),
        ("attn.W_Q", np.s_[2, 6], "channel 6 of head 2"),
        ("attn.W_K", np.s_[3, :, 1], "head 3"),
        ("attn.W_V", np.s_[0, :, 2], "head 0"),
        ("attn.W_O", np.s_[1, 5], "head 1"),
        ("attn.W_O", np.s_[:, :, 9], "channel 9"),
        ("attn.b_Q", np.s_[2], "head 2"),
    ],
)
@pytest.mark.parametrize("code", ["F32", "BF16"])
def test_edits_hidden_in_refactored_heads(
    key: str, at: tuple[slice, ...], place: str, code: str, demo: Checkpoint, tmp_path: Path
) -> None:
    def edit(weights: Weights) -> None:
        weight = weights[B + key]
        size = np.abs(weight[at]).max() * (0.05 if code == "F32" else 0.5)
        weight[at] += noise(weight[at].shape, size)

    found = edited(tmp_path, demo, STEPS, edit, code=code)
    assert REFACTOR in found.steps
    assert B + key in found.unexplained
    assert set(found.unexplained) <= {B + key, B + key.replace("W_", "b_")}
    assert found.verdict == "different-model"
    fact = next(fact for fact in found.tensors if fact.key == B + key)
    assert fact.place == place


def test_an_edit_before_processing_is_located_too(demo: Checkpoint, tmp_path: Path) -> None:
    """Centring spreads it over the row, yet nearly all of it stays where it was."""
    weights = read(demo)
    weights["blocks.2.mlp.W_out"][:, 5] += noise(weights["blocks.2.mlp.W_out"][:, 5].shape)
    converted = write(tmp_path / "b", process(weights, DEFAULT), demo, "hooked")
    found = explain(demo, converted)
    assert found.unexplained == ("blocks.2.mlp.W_out",)
    assert next(f for f in found.tensors if not f.explained).place == "channel 5"


def test_an_edited_layernorm_of_a_baked_model(demo: Checkpoint, tmp_path: Path) -> None:
    def edit(weights: Weights) -> None:
        weights[B + "ln1.b"][9] += 0.1

    found = edited(tmp_path, demo, DEFAULT, edit, "hf")
    assert found.unexplained == ("transformer.h.1.ln_1.bias",)
    assert found.verdict == "different-model"
    assert found.steps == tuple(step.name for step in DEFAULT)


def test_an_edited_carried_bias(demo: Checkpoint, tmp_path: Path) -> None:
    """It lives in the mean of the weight's column, so the weight is named."""

    def edit(weights: Weights) -> None:
        weights[B + "attn.W_Q"][1, :, 3] += 0.01

    found = edited(tmp_path, demo, DEFAULT, edit, "hf")
    assert found.unexplained == ("transformer.h.1.attn.attention.q_proj.weight",)
    assert found.verdict == "different-model"


# --- steps that were carried out in part ------------------------------------------------------


def without(weights: Weights, original: Weights, keys: tuple[str, ...]) -> Weights:
    return weights | {key: original[key] for key in weights if key.startswith(keys)}


@pytest.mark.parametrize(
    ("step", "left_out"),
    [
        (FOLD, ("blocks.1.ln2", "blocks.1.mlp.W_in", "blocks.1.mlp.b_in")),
        (CENTRE, ("blocks.1.mlp.W_out",)),
        (CENTRE, ("pos_embed.W_pos",)),
        (CENTRE, ("blocks.0.attn.b_O",)),
    ],
)
def test_a_step_that_missed_something_says_so(
    step: str, left_out: tuple[str, ...], demo: Checkpoint, tmp_path: Path
) -> None:
    raw = read(demo)
    weights = without(process(raw, (BY_NAME[step],)), raw, left_out)
    found = explain(demo, write(tmp_path / "b", weights, demo, "bridge"))
    assert found.steps == (step,)
    missing = {fact.key for fact in found.tensors if step in fact.missing}
    assert missing == {key for key in weights if key.startswith(left_out)}
    assert len(found.unexplained) == len(missing)
    assert list(found.partial) == [step]
    assert found.verdict == "same-function"
    assert any("missing here" in line for line in found.lines())
    assert any("not complete" in sentence for sentence in found.headline())


def test_a_step_on_one_tensor_only_is_no_step(demo: Checkpoint, tmp_path: Path) -> None:
    raw = read(demo)
    raw["embed.W_E"] -= raw["embed.W_E"].mean(-1, keepdims=True)
    found = explain(demo, write(tmp_path / "b", raw, demo, "hooked"))
    assert found.steps == ()
    assert found.unexplained == ("embed.W_E",)
    assert found.partial == {CENTRE: {"extra": ["embed.W_E"]}}
    assert found.verdict == "same-function"


def require_shift(found: Explanation) -> None:
    assert not found.undone
    assert not found.partial
    assert found.verdict == "same-function"
    assert found.unexplained == ("unembed.b_U",)
    assert any("all logits shift alike" in line for line in found.lines())
    assert any("no step accounts for it" in sentence for sentence in found.headline())


@pytest.mark.parametrize("names", [(), (FOLD,)])
def test_a_constant_on_the_logits_is_no_step(
    names: tuple[str, ...], demo: Checkpoint, tmp_path: Path
) -> None:
    """A bias of zeros looks centred, but the unembedding is as it was."""
    weights = process(read(demo), tuple(BY_NAME[name] for name in names))
    shifted = weights | {"unembed.b_U": weights["unembed.b_U"] + 1}
    plain, other = (
        write(tmp_path / name, each, demo, "hooked")
        for name, each in (("a", weights), ("b", shifted))
    )
    for found in (explain(plain, other), explain(other, plain)):
        require_shift(found)
        assert not found.steps


@pytest.mark.parametrize("steps", [(BY_NAME[FOLD],), DEFAULT])
def test_a_constant_on_the_logits_beside_steps(
    steps: tuple[Step, ...], demo: Checkpoint, tmp_path: Path
) -> None:
    weights = process(read(demo), steps)
    weights["unembed.b_U"] = weights["unembed.b_U"] + 1
    found = explain(demo, write(tmp_path / "b", weights, demo, "hooked"))
    require_shift(found)
    assert set(found.steps) <= {step.name for step in steps}


# --- processing that is wrong -----------------------------------------------------------------


def fold_the_bias_late(unit: Weights) -> Weights:
    """β taken through the folded W instead of the unfolded one."""
    done, _ = apply_all(unit, (BY_NAME[FOLD],))
    if "mlp.W_in" in unit:
        done["mlp.b_in"] = unit["mlp.b_in"] + unit["ln2.b"] @ done["mlp.W_in"]
    return done


def fold_without_bias(unit: Weights) -> Weights:
    done, _ = apply_all(unit, (BY_NAME[FOLD],))
    return done | {"mlp.b_in": unit["mlp.b_in"]} if "mlp.W_in" in unit else done


def centre_the_other_axis(unit: Weights) -> Weights:
    if "mlp.W_out" in unit:
        unit = unit | {"mlp.W_out": unit["mlp.W_out"] - unit["mlp.W_out"].mean(0)}
    return unit


def forget_to_move_values(unit: Weights) -> Weights:
    done, _ = apply_all(unit, (BY_NAME[FOLD],))
    if "attn.b_V" in unit:
        done["attn.b_V"] = np.zeros_like(done["attn.b_V"])
    return done


def square_root_on_one_side(unit: Weights) -> Weights:
    """Refactored without the √S of the queries."""
    done, _ = apply_all(unit, (BY_NAME[REFACTOR],))
    if "attn.W_Q" in unit:
        done["attn.W_Q"] = done["attn.W_Q"] / np.linalg.norm(
            done["attn.W_Q"], axis=1, keepdims=True
        )
    return done


@pytest.mark.parametrize(
    ("wrong", "keys"),
    [
        (fold_the_bias_late, {"mlp.b_in"}),
        (fold_without_bias, {"mlp.b_in"}),
        (centre_the_other_axis, {"mlp.W_out"}),
        (forget_to_move_values, {"attn.b_V", "attn.b_O"}),
        (square_root_on_one_side, {"attn.W_Q", "attn.W_K", "attn.b_Q", "attn.b_K"}),
    ],
)
def test_wrong_processing_is_not_explained_away(
    wrong: Callable[[Weights], Weights], keys: set[str], demo: Checkpoint, tmp_path: Path
) -> None:
    weights = {
        prefix + name: value
        for prefix, unit in units(read(demo))
        for name, value in wrong(unit).items()
    }
    found = explain(demo, write(tmp_path / "b", weights, demo, "bridge"))
    assert found.verdict == "different-model"
    blamed = {fact.key.split(".", 2)[2] for fact in found.tensors if not fact.explained}
    assert blamed
    assert blamed <= keys


# --- other models -----------------------------------------------------------------------------


def test_another_checkpoint(tmp_path: Path, random_model: Checkpoint) -> None:
    other = open_checkpoint(
        random_hf(
            tmp_path / "a", seed=9, hidden_size=32, num_heads=4, vocab_size=61, intermediate_size=48
        )
    )
    for steps in ((), DEFAULT, STEPS):
        found = explain(random_model, artifact(tmp_path / f"b{len(steps)}", other, steps))
        assert found.verdict == "different-model"
        assert "unrelated checkpoint" in found.headline()[0]
        assert len(found.unexplained) > 0.5 * len(found.tensors)


def test_a_fine_tuned_checkpoint_and_its_processing(demo: Checkpoint, tmp_path: Path) -> None:
    weights, rng = read(demo), np.random.default_rng(0)
    for key, value in weights.items():
        if value.ndim > 1 and value.any() and "b_" not in key:
            weights[key] = value + 0.01 * value.std() * rng.standard_normal(value.shape)
    found = explain(demo, write(tmp_path / "b", process(weights, DEFAULT), demo, "hooked"))
    assert found.verdict == "different-model"
    assert "fine-tuned" in found.headline()[0]
    assert {FOLD, CENTRE, UNEMBED} <= set(found.steps)


def test_swapped_tensors_are_named(demo: Checkpoint, tmp_path: Path) -> None:
    def edit(weights: Weights) -> None:
        a, b = "blocks.1.mlp.W_in", "blocks.2.mlp.W_in"
        weights[a], weights[b] = weights[b], weights[a]

    found = edited(tmp_path, demo, DEFAULT, edit)
    assert found.unexplained == ("blocks.1.mlp.W_in", "blocks.2.mlp.W_in")
    odd = {fact.name: fact.resembles for fact in found.tensors if not fact.explained}
    assert odd == {
        "blocks.1.mlp.W_in": "blocks.2.mlp.W_in",
        "blocks.2.mlp.W_in": "blocks.1.mlp.W_in",
    }
    assert found.verdict == "different-model"


def test_swapped_heads(demo: Checkpoint, tmp_path: Path) -> None:
    def edit(weights: Weights) -> None:
        weights[B + "attn.W_Q"][[0, 2]] = weights[B + "attn.W_Q"][[2, 0]]

    found = edited(tmp_path, demo, (), edit)
    assert found.unexplained == (B + "attn.W_Q",)
    assert next(f for f in found.tensors if not f.explained).place == "heads 0, 2"


def test_models_of_other_sizes(demo: Checkpoint, random_model: Checkpoint) -> None:
    found = explain(demo, random_model)
    assert (found.verdict, found.tensors, found.steps) == ("different-model", (), ())
    assert any("d_model" in reason for reason in found.reasons)


def test_a_shorter_context_is_said(demo: Checkpoint, tmp_path: Path) -> None:
    """TransformerLens 3 cuts TinyStories to 512 positions when it loads them."""
    from dataclasses import replace

    weights = process(read(demo), DEFAULT)
    weights["pos_embed.W_pos"] = weights["pos_embed.W_pos"][:100]
    short = replace(demo, config=replace(demo.config, n_ctx=100))
    found = explain(demo, write(tmp_path / "b", weights, short, "hooked"))
    assert found.verdict == "different-model"
    assert found.unexplained == ()
    assert found.steps == tuple(step.name for step in DEFAULT)
    assert "100 positions" in found.headline()[0]


def test_configs_of_another_function(demo: Checkpoint, tmp_path: Path) -> None:
    found = explain(demo, write(tmp_path / "b", read(demo), demo, "hooked", act_fn="relu"))
    assert found.verdict == "different-model"
    assert "act_fn" in found.headline()[0]


# --- changes that do nothing ------------------------------------------------------------------


def constant_on_a_row(weights: Weights) -> set[str]:
    weights["embed.W_E"][7] += 0.3
    return {"embed.W_E"}


def key_bias(weights: Weights) -> set[str]:
    weights[B + "attn.b_K"] += 0.5
    return {B + "attn.b_K"}


def rotate_heads(weights: Weights) -> set[str]:
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    for name in ("W_Q", "b_Q", "W_K", "b_K"):
        weights[B + "attn." + name] = weights[B + "attn." + name] @ q
    return {B + "attn." + name for name in ("W_Q", "b_Q", "W_K", "b_K")}


def move_a_gain(weights: Weights) -> set[str]:
    weights[B + "ln2.w"] *= 2
    weights[B + "ln2.b"] *= 2
    weights[B + "mlp.W_in"] /= 2
    return {B + "ln2.w", B + "ln2.b", B + "mlp.W_in"}


@pytest.mark.parametrize("change", [constant_on_a_row, key_bias, rotate_heads, move_a_gain])
def test_changes_without_effect_keep_the_function(
    change: Callable[[Weights], set[str]], biased_model: Checkpoint, tmp_path: Path
) -> None:
    weights = read(biased_model)
    keys = change(weights)
    found = explain(biased_model, write(tmp_path / "b", weights, biased_model, "hooked"))
    assert found.steps == ()
    assert set(found.unexplained) == keys
    assert found.verdict == "same-function"


# --- casts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_a_cast_is_said(code: str, demo: Checkpoint, tmp_path: Path) -> None:
    found = explain(demo, artifact(tmp_path / "b", demo, (), code=code))
    assert found.verdict == "same-function"
    assert found.steps == ()
    assert found.cast is not None
    assert not found.cast.exact
    assert not found.unexplained
    back = explain(artifact(tmp_path / "c", demo, (), code=code), demo)
    assert (back.verdict, back.unexplained) == ("same-function", ())


def test_a_cast_that_the_file_hides(demo: Checkpoint, tmp_path: Path) -> None:
    """The log says float32, the values are bfloat16 (torchtitan #4166)."""
    narrow = artifact(tmp_path / "narrow", demo, (), code="BF16")
    wide = write(tmp_path / "wide", read(narrow), demo, "hooked", "F32")
    found = explain(demo, wide)
    assert found.verdict == "same-function"
    assert found.cast is not None
    assert found.cast.to_json() == {
        "from": "float32", "to": "bfloat16", "stored": "float32", "exact": False,
    }  # fmt: skip
    assert any("though the file says float32" in sentence for sentence in found.headline())
    assert explain(narrow, wide).verdict == "same-weights"


def test_what_is_small_is_rounded_by_float16(demo: Checkpoint, tmp_path: Path) -> None:
    """bfloat16 has weights that float16 has no digits left for: few, and all over the tensors."""
    weights = read(demo)
    small = np.random.default_rng(0).random(weights["blocks.1.mlp.W_in"].shape) < 0.02
    weights["blocks.1.mlp.W_in"][small] *= 1e-5
    brain = write(tmp_path / "brain", weights, demo, "hooked", "BF16")
    half = write(tmp_path / "half", read(brain), demo, "hooked", "F16")
    found = explain(brain, half)
    assert (found.verdict, found.unexplained) == ("same-function", ())
    edited = read(half)
    place = tuple(np.argwhere(small)[7])
    edited["blocks.1.mlp.W_in"][place] += 2.0**-23  # two of float16's smallest
    moved = explain(brain, write(tmp_path / "moved", edited, demo, "hooked", "F16"))
    assert moved.unexplained == ("blocks.1.mlp.W_in",)


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_an_edit_is_no_cast(code: str, demo: Checkpoint, tmp_path: Path) -> None:
    """Two units in the last place of bfloat16, in one row."""

    def edit(weights: Weights) -> None:
        weights["blocks.2.mlp.W_in"][:, 17] *= 1 + 2.0**-6

    for steps in ((), DEFAULT):
        found = edited(tmp_path / str(len(steps)), demo, steps, edit, code=code)
        assert found.unexplained == ("blocks.2.mlp.W_in",)
        assert found.verdict == "different-model"
