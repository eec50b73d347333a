"""Merging against peft's own `merge_and_unload`: equal to one rounding of what is stored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPTNeoForCausalLM

from converter.adapter import matching, with_adapter
from converter.adapter.changes import LowRank, Shift
from converter.adapter.settings import Settings
from converter.checkpoint import open_checkpoint
from converter.convert import hf_to_tl
from converter.dtypes import bits, cast
from converter.errors import TensorMismatch, VerificationFailed
from converter.layout import EMBEDDING, HEAD
from tests.adapter.making import NAMES, Recipe, by_peft, in_hf, logits, model_of, weights_of, write
from tests.models import random_hf

Weights = Mapping[str, np.ndarray]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    targets = draw(st.sets(st.sampled_from(NAMES), min_size=1))
    wholes = draw(st.sets(st.sampled_from(["wte", "lm_head", "ln_1", "ln_f", "c_proj"])))
    rank, other = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": draw(st.sampled_from([1, 3, 16, 0.5])),
        "target_modules": sorted(targets),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "modules_to_save": sorted(wholes - targets) or None,
        "rank_pattern": draw(st.sampled_from([{}, {"q_proj": other, r"h\.0\.mlp\.c_fc": 2}])),
        "alpha_pattern": draw(st.sampled_from([{}, {"c_fc": 5, "^transformer.wte": 7}])),
    }
    biased = targets <= {"c_fc", "c_proj", "out_proj"} and config["bias"] == "none"
    if biased and not config["use_dora"]:  # peft refuses both
        config["lora_bias"] = draw(st.booleans())
    return Recipe(
        config,
        tied=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        seed=draw(st.integers(0, 2**16)),
    )


def _between(found: np.ndarray, exact: np.ndarray, error: np.ndarray, code: str) -> bool:
    """Whether `found` is a rounding of a number within `error` of `exact`. Rounding is monotone."""
    with np.errstate(over="ignore"):
        low, high = (cast(v, code).astype(np.float64) for v in (exact - error, exact + error))
    return bool(((low <= found) & (found <= high)).all())


def _errors(base: Weights, merged: Weights, unit: float) -> Weights:
    """What arithmetic of this unit roundoff may cost: a sum of at most 9 products and W, and with a
    magnitude the length of a row or column of at most 37, each term no larger than these."""
    size = {key: np.abs(base[key]) + np.abs(merged[key] - base[key]) for key in base}
    return {key: 64 * unit * (size[key] + np.abs(base[key]).max()) for key in base}


@given(recipes())
@example(Recipe({"target_modules": NAMES, "use_dora": True}))
@example(Recipe({"target_modules": NAMES, "bias": "all"}, dtype="float16"))
@example(Recipe({"target_modules": ["wte"]}))
@example(Recipe({"target_modules": ["lm_head"], "use_rslora": True}, dtype="bfloat16"))
@example(Recipe({"target_modules": ["c_fc"], "modules_to_save": ["wte", "lm_head"]}))
@example(Recipe({"target_modules": ["c_fc", "out_proj"], "lora_bias": True}))
@settings(max_examples=25, deadline=None)
def test_as_peft_merges(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write(root, recipe)
        base = open_checkpoint(root / "base")
        ours = with_adapter(base, root / "adapter")
        before, found = in_hf(base), in_hf(ours)
        theirs = by_peft(root)
        function = logits(theirs)  # as trained: before merging
        exact = weights_of(theirs.merge_and_unload())
        wide = {key: array.astype(np.float64) for key, array in before.items()}
        errors = _errors(wide, exact, 2.0**-53)
        for key, array in found.items():
            code = ours.storage_code(key)
            assert code == base.code(key)
            stored = cast(array, code).astype(np.float64)
            if array.dtype == np.float64:
                assert _between(stored, exact[key], errors[key], code), key
            else:  # untouched: the base's own bits
                assert array.tobytes() == before[key].tobytes(), key
                assert np.array_equal(stored, exact[key]), key
        scale = np.abs(function).max()
        # transformers rounds queries and keys to float32 in whatever dtype it runs.
        assert np.abs(logits(model_of(ours)) - function).max() < 1e-5 * scale
        alike = np.array_equal(exact[EMBEDDING], exact[HEAD])
        assert ours.tied is (recipe.tied and alike)


def test_tokens_that_were_added_before_training(tmp_path: Path) -> None:
    """peft then writes embedding and head as trained, twice, and as they were before."""
    model: Any = GPTNeoForCausalLM.from_pretrained(random_hf(tmp_path / "before"))
    model.resize_token_embeddings(41, mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["wte", "lm_head"]}
    adapted: Any = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for tensor in adapted.parameters():
            tensor += torch.randn(tensor.shape) * (0.15 if tensor.requires_grad else 0)
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    saved = load_file(file)
    head = "base_model.model.lm_head"
    assert {f"{head}.weight", f"{head}.modules_to_save.weight"} <= set(saved)
    merged = in_hf(with_adapter(open_checkpoint(tmp_path / "base"), tmp_path / "adapter"))
    exact = weights_of(by_peft(tmp_path).merge_and_unload())
    assert all(np.abs(merged[key] - exact[key]).max() < 1e-6 for key in exact)
    with pytest.raises(TensorMismatch, match=r"\[41, 16\]") as raised:
        with_adapter(open_checkpoint(tmp_path / "before"), tmp_path / "adapter")
    assert "resize_token_embeddings(41)" in raised.value.do
    saved[f"{head}.modules_to_save.weight"][0, 0] += 1
    save_file(saved, file)
    with pytest.raises(TensorMismatch, match="two weight tensors for lm_head, which differ"):
        with_adapter(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_as_peft_merges_in_its_own_dtype(dtype: str, tmp_path: Path) -> None:
    """peft adds in float32 and rounds to the base's dtype: what is stored differs by no more than
    that float32 sum may."""
    write(tmp_path, Recipe({"target_modules": NAMES[:6]}, dtype=dtype))
    base = open_checkpoint(tmp_path / "base")
    ours = with_adapter(base, tmp_path / "adapter")
    native = weights_of(by_peft(tmp_path, getattr(torch, dtype)).merge_and_unload())
    exact = weights_of(by_peft(tmp_path).merge_and_unload())
    errors = _errors({k: a.astype(np.float64) for k, a in in_hf(base).items()}, exact, 2.0**-24)
    for key, array in in_hf(ours).items():
        code = ours.storage_code(key)
        stored = cast(array, code)
        assert _between(native[key], exact[key], errors[key], code), key
        if dtype != "float32":  # equal, or neighbours
            apart = bits(stored).astype(int) - bits(cast(native[key], code)).astype(int)
            assert np.abs(apart).max() <= 1, key


ADAPTERS = [
    {"target_modules": NAMES[:6]},
    {"target_modules": NAMES[:6], "use_rslora": True},
    {"target_modules": ["c_fc", "c_proj", "out_proj"], "lora_bias": True, "bias": "all"},
    {"target_modules": ["wte", "wpe", "k_proj"], "use_dora": True},
]


def _ignoring_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "scale_of", lambda *_: 1.0)


def _ignoring_rslora(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Settings.scale_of
    monkeypatch.setattr(Settings, "scale_of", lambda s, m: scale(replace(s, rslora=False), m))


def _transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(self: LowRank, base: np.ndarray) -> np.ndarray:
        update = self.scale * (self.left() @ self.right())
        return base + (update.T if update.shape == update.T.shape else update)

    monkeypatch.setattr(LowRank, "apply", apply)


def _without_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_bias_changes", lambda *_: [])


def _without_its_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shift, "apply", lambda _, base: base)


def _without_magnitudes(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = LowRank.apply
    monkeypatch.setattr(LowRank, "apply", lambda s, b: apply(replace(s, magnitude=None), b))


def _along_the_other_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = LowRank.apply

    def other(self: LowRank, base: np.ndarray) -> np.ndarray:
        square = base.shape[0] == base.shape[1]
        return apply(replace(self, along=1 - self.along) if square else self, base)

    monkeypatch.setattr(LowRank, "apply", other)


@pytest.mark.parametrize(
    ("fault", "config"),
    [
        (_ignoring_alpha, ADAPTERS[0]),
        (_ignoring_rslora, ADAPTERS[1]),
        (_transposed, ADAPTERS[0]),
        (_without_biases, ADAPTERS[2]),
        (_without_its_shift, ADAPTERS[2]),
        (_without_magnitudes, ADAPTERS[3]),
        (_along_the_other_axis, ADAPTERS[3]),
    ],
)
def test_a_fault_of_merging_shows(
    fault: Callable[[pytest.MonkeyPatch], None],
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the weights; and in verification, where peft runs the original."""
    write(tmp_path, Recipe(config))
    exact = weights_of(by_peft(tmp_path).merge_and_unload())
    hf_to_tl(tmp_path / "base", tmp_path / "tl", adapter=tmp_path / "adapter", effort="quick")
    fault(monkeypatch)
    ours = with_adapter(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    assert any(np.abs(a - exact[key]).max() > 0.01 for key, a in in_hf(ours).items())
    with pytest.raises(VerificationFailed) as raised:
        hf_to_tl(tmp_path / "base", tmp_path / "bad", adapter=tmp_path / "adapter", effort="quick")
    assert "departs from its own file" in raised.value.where
    assert not (tmp_path / "bad").exists()
