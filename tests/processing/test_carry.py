"""Biases that HF GPT-Neo has no tensor for, in the direction that LayerNorm never gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings

from converter.processing import (
    DEFAULT,
    STEPS,
    Carry,
    State,
    Step,
    absorb,
    apply_all,
    unrepresentable,
)
from converter.processing.step import FLOAT32, Array
from converter.processing.steps import BY_NAME, undo_all
from tests.processing.weights import (
    SUBSETS,
    TOKENS,
    block,
    forward,
    in_dtype,
    in_float64,
    label,
    model,
    process,
    units,
)

CARRY = Carry()
FOLD = (BY_NAME["fold_ln"],)


@pytest.mark.parametrize("biases", [False, True], ids=["hf", "biases"])
@pytest.mark.parametrize("steps", [(), *SUBSETS], ids=label)
def test_any_model_becomes_representable_with_its_function(
    steps: tuple[Step, ...], biases: bool
) -> None:
    start = model(1, biases=biases)
    carried = process(start, (*steps, CARRY))
    assert not any(unrepresentable(unit) for unit in carried)
    assert np.abs(forward(carried, TOKENS) - forward(start, TOKENS)).max() < 1e-10


def test_nothing_to_carry_leaves_the_unit_alone() -> None:
    for unit in model(2):
        carried, record = CARRY.apply(unit)
        assert not record
        assert all(carried[name] is unit[name] for name in unit)
        assert CARRY.state(unit, FLOAT32) in (State.NOTHING_TO_DO, None)


@pytest.mark.parametrize("c", [1.0, 10.0, -0.5])
@pytest.mark.parametrize("steps", [DEFAULT, STEPS, FOLD], ids=label)
def test_folding_again_gives_the_folded_weights(steps: Sequence[Step], c: float) -> None:
    folded = process(model(3, biases=True), steps)
    carried = process(folded, [Carry(c)])
    for unit, again in zip(folded, process(carried, FOLD), strict=True):
        for name in unit:
            assert np.abs(again[name] - unit[name]).max() < 3e-14, name
    assert [CARRY.state(unit, FLOAT32) for unit in carried[1:]] == [State.APPLIED] * 3
    assert [CARRY.state(unit, FLOAT32) for unit in folded[1:]] == [State.NOT_APPLIED] * 3


def test_in_float32_a_bias_survives_to_its_rounding() -> None:
    """A mean of W that storage left over must not become a bias of the other readers."""
    folded = [in_float64(in_dtype(u, "BF16")) for u in process(model(4, biases=True), DEFAULT)]
    carried = process(folded, [CARRY])
    assert np.abs(forward(carried, TOKENS) - forward(folded, TOKENS)).max() < 1e-10
    stored = [in_float64(in_dtype(unit, "F32")) for unit in carried]
    assert np.abs(forward(stored, TOKENS) - forward(folded, TOKENS)).max() < 3e-5


@given(units)
@settings(max_examples=60, deadline=None)
def test_undo_is_the_inverse_of_apply(unit: dict[str, Array]) -> None:
    back = CARRY.undo(*CARRY.apply(unit))
    extent = max(float(np.abs(array).max()) for array in unit.values())
    for name, array in unit.items():
        bias = name.rsplit(".", 1)[-1].startswith("b")
        bound = max(extent, 1) if bias else np.abs(array).max()
        assert np.abs(np.asarray(back[name]) - array).max() <= 1e-11 * bound, name


@pytest.mark.parametrize("steps", [DEFAULT, STEPS], ids=label)
@pytest.mark.parametrize("carry", [(), (CARRY,)], ids=["processed", "baked"])
def test_edits_come_back_without_biases(steps: tuple[Step, ...], carry: tuple[Step, ...]) -> None:
    """Edited after processing, undone, and made representable in the original LayerNorms."""
    start = model(5)
    steps = (*steps, *carry)
    done = [apply_all(unit, steps) for unit in start]
    rng = np.random.default_rng(6)
    edited = [{n: a + 0.02 * rng.normal(size=a.shape) for n, a in unit.items()} for unit, _ in done]
    back = [undo_all(u, steps, records) for u, (_, records) in zip(edited, done, strict=True)]
    assert any(unrepresentable(unit) for unit in back)
    plain = [absorb(unit, limit=100) for unit in back]
    assert not any(unrepresentable(unit) for unit in plain)
    for unit, original in zip(plain, start, strict=True):
        for name in original:
            if name.startswith("ln"):
                np.testing.assert_array_equal(unit[name], original[name])
    assert np.abs(forward(plain, TOKENS) - forward(edited, TOKENS)).max() < 1e-10


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_absorb_uses_a_channel_without_gain(gain: float) -> None:
    units = model(7, biases=True)
    for unit in units[1:3]:
        unit["ln1.w"][4] = gain
    plain = [absorb(unit, limit=1e9) for unit in units]
    assert not any(unrepresentable(unit) for unit in plain[1:])
    assert np.abs(forward(plain, TOKENS) - forward(units, TOKENS)).max() < 1e-9


def test_absorb_leaves_what_would_drown_the_weights() -> None:
    unit = block(np.random.default_rng(8), biases=True)
    unit["ln1.b"][:] = 0
    left = absorb(unit)
    assert set(unrepresentable(left)) == {"attn.b_Q", "attn.b_K"}
    np.testing.assert_array_equal(left["attn.W_Q"], unit["attn.W_Q"])
