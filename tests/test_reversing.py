"""Processing undone: the original bits, the original basis, or the same function."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from converter.checkpoint import open_checkpoint
from converter.choices import DEFAULT_STEPS
from converter.cli import main
from converter.convert import bake, hf_to_tl, tl_to_hf
from converter.demo import MODEL
from converter.errors import BadInput, CannotUndo, UsageError
from converter.processing import STEPS
from converter.routing import recorded_steps
from tests.checkpoints import Recipe, Tensors, read_all, recipes, same, write_hf

NAMES = [step.name for step in STEPS]
SUBSETS = [",".join(c) for n in range(1, 6) for c in combinations(NAMES, n)]
RECIPE = Recipe(finite=True, d_head=3, d_vocab=11, d_mlp=7)


@given(recipes, st.sampled_from(SUBSETS), st.sampled_from(["hooked", "bridge", "hf"]))
@example(Recipe(), "refactor_factored_attn_matrices", "hf")
@example(Recipe(dtype="BF16"), SUBSETS[-1], "hf")
@settings(max_examples=60, deadline=None)
def test_exact_returns_every_byte(recipe: Recipe, steps: str, layout: Any) -> None:
    recipe = replace(recipe, finite=True)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tensors = write_hf(root / "hf", recipe)
        options: dict[str, Any] = {"process": steps, "ledger": "exact", "check": False}
        if layout == "hf":
            bake(root / "hf", root / "tl", **options)
        else:
            hf_to_tl(root / "hf", root / "tl", layout=layout, **options)
        done = tl_to_hf(root / "tl", root / "back", reverse="exact", check=False)
        assert done.to_json()["reverse"] == "exact"
        assert same(read_all(root / "back"), tensors)
        assert json.loads((root / "back/config.json").read_text()) == recipe.config


@pytest.mark.parametrize("steps", SUBSETS)
def test_exact_on_the_trained_model(steps: str, tmp_path: Path) -> None:
    hf_to_tl(MODEL, tmp_path / "tl", process=steps, ledger="exact", check=False)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", reverse="exact", check=False)
    assert same(read_all(tmp_path / "back"), read_all(MODEL))


@pytest.fixture
def processed(tmp_path: Path) -> Path:
    write_hf(tmp_path / "hf", RECIPE)
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", process="default", ledger="exact", check=False)
    return tmp_path / "tl"


def _edit(directory: Path, name: str, change: float = 0.25) -> None:
    tensors = {n: t.copy() for n, t in read_weights(directory).items()}
    tensors[name].reshape(-1)[3] += change
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_weights(directory: Path) -> Tensors:
    """The weights alone, without the ledger's arrays."""
    return dict(load_file(directory / "model.safetensors"))


def test_an_edit_is_named_and_the_rest_stays_exact(processed: Path, tmp_path: Path) -> None:
    _edit(processed, "blocks.1.mlp.W_out")
    with pytest.raises(CannotUndo, match=r"blocks\.1\.mlp\.W_out"):
        tl_to_hf(processed, tmp_path / "back", reverse="exact", check=False)
    done = tl_to_hf(processed, tmp_path / "back", check=False)
    assert done.route.reverse == "functional"
    assert any("blocks.1.mlp.W_out" in line for line in done.route.remarks)
    original, back = read_all(tmp_path / "hf"), read_all(tmp_path / "back")
    edited = "transformer.h.1.mlp.c_proj.weight"
    assert {n for n in original if original[n].tobytes() != back[n].tobytes()} == {edited}
    difference = back[edited].astype(np.float64).T - original[edited].astype(np.float64).T
    assert np.count_nonzero(np.abs(difference) > 1e-5) == 1
    assert abs(difference.reshape(-1)[3] - 0.25) < 1e-6


def test_edited_embedding_is_untied(processed: Path, tmp_path: Path) -> None:
    _edit(processed, "embed.W_E")
    tl_to_hf(processed, tmp_path / "back", check=False)
    back = read_all(tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False
    original = read_all(tmp_path / "hf")["transformer.wte.weight"]
    assert back["lm_head.weight"].tobytes() != back["transformer.wte.weight"].tobytes()
    assert np.abs(back["lm_head.weight"] - original).max() < 1e-5


def test_edited_embedding_of_a_tied_baked_model_stays_tied(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    bake(
        tmp_path / "hf", tmp_path / "baked", process="refactor_factored_attn_matrices", check=False
    )
    _edit(tmp_path / "baked", "transformer.wte.weight")
    tl_to_hf(tmp_path / "baked", tmp_path / "back", check=False)
    original, back = read_all(tmp_path / "hf"), read_all(tmp_path / "back")
    assert set(original) == set(back)
    changed = back["transformer.wte.weight"] != original["transformer.wte.weight"]
    assert np.flatnonzero(changed).tolist() == [3]


def test_compact_returns_the_basis(tmp_path: Path) -> None:
    """An ordinary model: every weight within a few float32 roundings, and the tie."""
    hf_to_tl(MODEL, tmp_path / "tl", process="all", check=False)
    done = tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert done.route.reverse == "functional"
    original, back = read_all(MODEL), read_all(tmp_path / "back")
    assert set(original) == set(back)
    for name, tensor in original.items():
        assert np.abs(back[name] - tensor).max() <= 3e-6 * np.abs(tensor).max(), name
    with pytest.raises(CannotUndo, match="compact"):
        tl_to_hf(tmp_path / "tl", tmp_path / "x", reverse="exact", check=False)


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_functional_folds_back_to_the_processed_weights(layout: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layout": layout, "process": "default", "check": False}
    hf_to_tl(MODEL, tmp_path / "tl", ledger="none", **options)
    done = tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert done.route.reverse == "functional"
    hf_to_tl(tmp_path / "back", tmp_path / "again", **options)
    first, again = read_weights(tmp_path / "tl"), read_weights(tmp_path / "again")
    assert set(first) == set(again)
    for name, tensor in first.items():
        # Carried biases cost float32 one rounding of W + b/D.
        assert np.abs(again[name] - tensor).max() <= 2e-5 * max(1, np.abs(tensor).max()), name


def test_a_step_is_not_applied_twice(tmp_path: Path) -> None:
    bake(MODEL, tmp_path / "baked", process="center_writing_weights,center_unembed", check=False)
    done = hf_to_tl(tmp_path / "baked", tmp_path / "tl", process="default", check=False)
    assert {r.split()[0] for r in done.route.remarks} == {
        "center_writing_weights",
        "center_unembed",
    }
    assert done.plan.steps == tuple(NAMES[:4])
    baked, tl = read_all(tmp_path / "baked"), read_weights(tmp_path / "tl")
    assert baked["transformer.wte.weight"].tobytes() == tl["embed.W_E"].tobytes()


def test_the_bits_of_what_no_step_touches_are_kept(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", Recipe())  # NaN payloads, infinities
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", process="fold_value_biases", check=False)
    tl = read_weights(tmp_path / "tl")
    assert tl["embed.W_E"].tobytes() == tensors["transformer.wte.weight"].tobytes()


def test_baked_is_plain_hf(tmp_path: Path) -> None:
    bake(MODEL, tmp_path / "baked", check=False)
    names = {p.name for p in (tmp_path / "baked").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "neoconvert.json",
        "neoconvert.intoto.jsonl", "ledger.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    weights = read_weights(tmp_path / "baked")
    assert set(weights) == {*read_all(MODEL), "lm_head.weight"}
    assert (weights["transformer.h.0.ln_1.weight"] == 1).all()
    assert open_checkpoint(tmp_path / "baked").layout == "hf"


def test_hf_without_a_ledger_has_nothing_to_undo(tmp_path: Path) -> None:
    bake(MODEL, tmp_path / "baked", ledger="none", check=False)
    with pytest.raises(BadInput, match="already"):
        tl_to_hf(tmp_path / "baked", tmp_path / "back", check=False)


def test_exact_without_a_ledger(processed: Path, tmp_path: Path) -> None:
    (processed / "ledger.safetensors").unlink()
    with pytest.raises(CannotUndo, match=r"ledger\.safetensors"):
        tl_to_hf(processed, tmp_path / "back", reverse="exact", check=False)


def test_exact_in_another_dtype(processed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="original bits"):
        tl_to_hf(processed, tmp_path / "back", reverse="exact", dtype="float16", check=False)


@pytest.mark.parametrize("damage", ["truncate", "other", "flip"])
def test_a_ledger_that_does_not_belong(damage: str, processed: Path, tmp_path: Path) -> None:
    path = processed / "ledger.safetensors"
    raw = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(raw[:-5])
    elif damage == "flip":
        raw[-3] ^= 0x55
        path.write_bytes(raw)
    else:
        write_hf(tmp_path / "hf2", replace(RECIPE, attention=("global",)))
        hf_to_tl(tmp_path / "hf2", tmp_path / "tl2", process="all", ledger="exact", check=False)
        path.write_bytes((tmp_path / "tl2/ledger.safetensors").read_bytes())
    arguments = [
        "tl-to-hf",
        str(processed),
        str(tmp_path / "b"),
        "--reverse",
        "exact",
        "--no-verify",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 3, result.output
    assert len(result.stderr.splitlines()) == 3
    assert not (tmp_path / "b").exists()


def test_unknown_step(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["bake", str(MODEL), str(tmp_path / "b"), "--process", "foldln"]
    )
    assert result.exit_code == 2
    assert "fold_ln" in result.stderr


@pytest.mark.parametrize("name", ["transformer.ln_f.weight", "transformer.h.1.ln_1.bias", None])
def test_an_edited_layernorm_of_a_baked_model_denies_no_step(
    name: str | None, tmp_path: Path
) -> None:
    """The others carry biases still, which is what folding has left."""
    baked = bake(MODEL, tmp_path / "baked", check=False).output
    if name:
        tensors = load_file(baked / "model.safetensors")
        tensors[name][3] = np.nextafter(tensors[name][3], np.float32(9))
        save_file(tensors, baked / "model.safetensors", metadata={"format": "pt"})
    assert recorded_steps(open_checkpoint(baked)) == DEFAULT_STEPS
