"""`explain` on what the pipeline wrote: the exact steps, an edit found, no false claim."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from converter.checkpoint import open_checkpoint
from converter.convert import bake, hf_to_tl
from converter.demo import MODEL
from converter.explaining import explain
from converter.processing import STEPS
from tests.models import random_hf

SUBSETS = [c for n in range(1, 6) for c in combinations([step.name for step in STEPS], n)]
LAYOUTS = ("hooked", "bridge", "hf")


def _convert(source: Path, output: Path, layout: Any, steps: tuple[str, ...], dtype: str) -> None:
    options: dict[str, Any] = {
        "process": ",".join(steps) or "none", "ledger": "none", "check": False, "overwrite": True,
        "dtype": None if dtype == "float32" else dtype,
    }  # fmt: skip
    if layout == "hf":
        bake(source, output, **options)
    else:
        hf_to_tl(source, output, layout=layout, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", ["trained", "random"])
def test_every_subset_is_named(model: str, dtype: str, tmp_path: Path) -> None:
    source = MODEL if model == "trained" else random_hf(tmp_path / "hf", vocab_size=23)
    original = open_checkpoint(source)
    for index, subset in enumerate(SUBSETS):
        if model == "trained" and dtype == ("float16", "bfloat16")[index % 2]:
            continue  # of the larger model, half for each of these
        _convert(source, tmp_path / "out", LAYOUTS[index % 3], subset, dtype)
        found = explain(original, open_checkpoint(tmp_path / "out"))
        # b_V is zero in GPT-Neo, so there is nothing to tell of unless LayerNorm's bias was
        # folded into it; and refactoring folds b_V itself.
        traceless = "fold_ln" not in subset or "refactor_factored_attn_matrices" in subset
        silent = set(found.silence) & {"fold_value_biases"} if traceless else set()
        assert found.steps == tuple(name for name in subset if name not in silent), subset
        assert found.unexplained == ()
        assert found.verdict == "same-function" or not found.steps


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_one_edited_row_on_top_of_processing(layout: str, tmp_path: Path) -> None:
    _convert(MODEL, tmp_path / "out", layout, SUBSETS[-2], "float32")
    _convert(MODEL, tmp_path / "out", layout, tuple(s.name for s in STEPS[:4]), "float32")
    name = {"hooked": "blocks.2.mlp.W_out", "bridge": "blocks.2.mlp.out.weight"}[layout]
    weights = dict(load_file(tmp_path / "out/model.safetensors"))
    edited = weights[name].copy()
    row = edited[17] if layout == "hooked" else edited[:, 17]
    row += 0.01
    row[::2] -= 0.02
    save_file({**weights, name: edited}, tmp_path / "out/model.safetensors")
    found = explain(open_checkpoint(MODEL), open_checkpoint(tmp_path / "out"))
    assert found.verdict == "different-model"
    assert found.unexplained == (name,)
    assert found.steps == tuple(s.name for s in STEPS[:4])
    fact = next(t for t in found.tensors if t.name == name)
    assert fact.place == "neuron 17"


def test_an_edit_is_not_taken_for_a_step(tmp_path: Path) -> None:
    """Biases folded on both sides would make it small beside what was added to them."""
    source = random_hf(tmp_path / "hf", hidden_size=32)
    _convert(source, tmp_path / "out", "hooked", ("fold_ln",), "float32")
    weights = dict(load_file(tmp_path / "out/model.safetensors"))
    name = "blocks.0.attn.b_O"
    edited = weights[name].copy()
    edited[0] += 0.1 * abs(edited).max()
    save_file(weights | {name: edited}, tmp_path / "out/model.safetensors")
    found = explain(open_checkpoint(source), open_checkpoint(tmp_path / "out"))
    assert found.steps == ("fold_ln",)
    assert found.unexplained == (name,)


def test_another_checkpoint(tmp_path: Path) -> None:
    a, b = (open_checkpoint(random_hf(tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    found = explain(a, b)
    assert found.verdict == "different-model"
    assert len(found.unexplained) > 20


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_the_same_weights(layout: str, tmp_path: Path) -> None:
    _convert(MODEL, tmp_path / "out", layout, (), "float32")
    found = explain(open_checkpoint(MODEL), open_checkpoint(tmp_path / "out"))
    assert (found.verdict, found.steps, found.unexplained) == ("same-weights", (), ())
