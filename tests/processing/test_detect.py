"""Which steps were applied shows in the weights, through the rounding of their storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converter.checkpoint import open_checkpoint
from converter.convert import hf_to_tl
from converter.processing import DEFAULT, Rounding, State, Step, apply_all, detect
from converter.routing import already_applied
from tests.checkpoints import Recipe, write_hf
from tests.processing.weights import (
    SUBSETS,
    Sizes,
    block,
    in_dtype,
    in_float64,
    label,
    model,
    process,
)


@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("biases", [False, True], ids=["hf", "biases"])
@pytest.mark.parametrize("steps", [(), *SUBSETS], ids=label)
def test_the_subset_is_found(steps: tuple[Step, ...], biases: bool, code: str) -> None:
    applied = {step.name for step in steps}
    units = process(model(11, Sizes(d=96, n=6, v=101, f=128), biases=biases), steps)
    for unit in units:
        stored = in_float64(in_dtype(unit, code))
        for name, state in detect(stored, Rounding.of(code)).items():
            if name == "fold_value_biases":
                folded = not unit["attn.b_V"].any()
                assert state is (State.NOTHING_TO_DO if folded else State.NOT_APPLIED)
            else:
                assert state is (State.APPLIED if name in applied else State.NOT_APPLIED), name


@pytest.mark.parametrize("steps", SUBSETS, ids=label)
def test_applying_again_changes_nothing_but_signs(steps: tuple[Step, ...]) -> None:
    for unit in process(model(12), steps):
        for name, array in apply_all(unit, steps)[0].items():
            if steps[-1].name != "refactor_factored_attn_matrices" or name.startswith("ln"):
                np.testing.assert_allclose(array, unit[name], rtol=0, atol=1e-12, err_msg=name)
            else:
                np.testing.assert_allclose(abs(array), abs(unit[name]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("code", ["F32", "BF16"])
@pytest.mark.parametrize("name", ["attn.W_Q", "attn.W_K", "mlp.W_in", "attn.W_O", "mlp.W_out"])
def test_one_edited_column_is_enough_to_be_told(name: str, code: str) -> None:
    unit = process([block(np.random.default_rng(0))], SUBSETS[-1])[0]
    if name in ("attn.W_O", "mlp.W_out"):
        unit[name][..., 1, :] += 0.1
    else:
        unit[name][..., 1] += 0.1
    states = detect(in_float64(in_dtype(unit, code)), Rounding.of(code))
    writes = name in ("attn.W_O", "mlp.W_out")
    assert states["center_writing_weights" if writes else "fold_ln"] is State.NOT_APPLIED
    assert states["fold_ln" if writes else "center_writing_weights"] is State.APPLIED


def test_zero_weights_prove_nothing() -> None:
    unit = {name: np.zeros_like(array) for name, array in block(np.random.default_rng(0)).items()}
    states = detect(unit, Rounding.of("F32"))
    assert states.pop("fold_ln") is State.NOT_APPLIED  # a gain of zero is not folded
    assert set(states.values()) == {State.NOTHING_TO_DO}


@pytest.mark.parametrize("raw", [0, 1, None])
def test_a_step_counts_where_every_block_has_it(raw: int | None, tmp_path: Path) -> None:
    """Not where one block, the first or the last, is as it was."""
    write_hf(tmp_path / "hf", Recipe(attention=("global", "local"), finite=True))
    for name in ("none", "default"):
        hf_to_tl(
            tmp_path / "hf", tmp_path / name, layout="hooked", process=name, ledger="none",
            check=False,
        )  # fmt: skip
    file = tmp_path / "default/model.safetensors"
    original, tensors = load_file(tmp_path / "none/model.safetensors"), load_file(file)
    name = f"blocks.{raw}.attn.W_O"
    if raw is not None:
        tensors[name] = original[name]
        save_file(tensors, file)
    done = already_applied(open_checkpoint(tmp_path / "default"), DEFAULT)
    assert ("center_writing_weights" in done) == (raw is None)
    assert {"fold_ln", "center_unembed"} <= done
