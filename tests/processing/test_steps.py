"""Each step has an inverse, computes what its equation says, and touches nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import BadInput, UsageError
from converter.processing import DEFAULT, STEPS, Step, apply_all, parse, undo_all
from converter.processing.fold_ln import FoldLn
from converter.processing.step import Array
from converter.processing.steps import BY_NAME
from tests.processing.weights import (
    SIZES,
    SUBSETS,
    TOKENS,
    Sizes,
    block,
    distance,
    embed,
    final,
    forward,
    label,
    model,
    process,
    units,
    with_gains,
)

subsets = st.sampled_from(SUBSETS)


@given(units, subsets)
@settings(max_examples=150, deadline=None)
def test_undo_is_the_inverse_of_apply(unit: dict[str, Array], steps: tuple[Step, ...]) -> None:
    before = {name: array.copy() for name, array in unit.items()}
    processed, records = apply_all(unit, steps)
    kept = {name: array.copy() for name, array in processed.items()}
    back = undo_all(processed, steps, records)
    assert unit.keys() == back.keys()
    # Biases are undone by sums over all channels, so gains set the scale of their rounding.
    extent = max(float(np.abs(array).max()) for array in unit.values())
    for name, array in unit.items():
        np.testing.assert_array_equal(array, before[name], err_msg="the input was changed")
        np.testing.assert_array_equal(processed[name], kept[name], err_msg="undo changed its input")
        bias = name.rsplit(".", 1)[-1].startswith("b")
        bound = 1e-12 * max(extent, 1) if bias else 1e-11
        error = np.abs(np.asarray(back[name]) - array).max()
        assert error <= bound * (1 if bias else np.abs(array).max()), name


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.name)
@pytest.mark.parametrize("make", [embed, block, final])
def test_a_step_leaves_tensors_it_has_no_business_with(step: Step, make: object) -> None:
    unit = make(np.random.default_rng(0))  # type: ignore[operator]
    concerned = {
        "fold_ln": {"block", "final"},
        "center_writing_weights": {"embed", "block"},
        "center_unembed": {"final"},
        "fold_value_biases": set(),
        "refactor_factored_attn_matrices": {"block"},
    }[step.name]
    processed, record = step.apply(unit)
    if make.__name__ in concerned:  # type: ignore[attr-defined]
        assert record
    else:
        assert not record
        assert all(processed[name] is unit[name] for name in unit)
        assert step.undo(unit, record).keys() == unit.keys()
    assert step.apply({}) == ({}, {})


def test_fold_ln_against_its_definition_one_element_at_a_time() -> None:
    unit = block(np.random.default_rng(1), biases=True)
    folded, record = BY_NAME["fold_ln"].apply(unit)
    for norm, pairs in {
        "ln1": [("attn.W_Q", "attn.b_Q"), ("attn.W_K", "attn.b_K"), ("attn.W_V", "attn.b_V")],
        "ln2": [("mlp.W_in", "mlp.b_in")],
    }.items():
        assert (folded[f"{norm}.w"] == 1).all()
        assert not folded[f"{norm}.b"].any()
        gain, bias = unit[f"{norm}.w"], unit[f"{norm}.b"]
        for w, b in pairs:
            heads = unit[w] if unit[w].ndim == 3 else unit[w][None]
            expected_w, expected_b = np.empty_like(heads), np.empty((len(heads), heads.shape[2]))
            for head, column in np.ndindex(expected_b.shape):
                own = heads[head, :, column]
                terms = [own[d] * gain[d] for d in range(SIZES.d)]
                expected_w[head, :, column] = np.array(terms) - sum(terms) / SIZES.d
                sum_b = sum(own[d] * bias[d] for d in range(SIZES.d))
                expected_b[head, column] = unit[b].reshape(expected_b.shape)[head, column] + sum_b
            assert distance(folded[w], expected_w.reshape(unit[w].shape)) < 1e-12
            assert distance(folded[b], expected_b.reshape(unit[b].shape)) < 1e-12
    assert not [key for key in record if key.endswith(".rows")]  # ordinary gains: nothing kept


def test_channels_without_gain_are_kept_whole() -> None:
    unit = with_gains(block(np.random.default_rng(2)), "zero", np.random.default_rng(3))
    _, record = BY_NAME["fold_ln"].apply(unit)
    for w in ("attn.W_Q", "attn.W_K", "attn.W_V", "mlp.W_in"):
        (zero,) = np.flatnonzero(unit["ln1.w" if w.startswith("attn") else "ln2.w"] == 0)
        assert record[f"{w}.rows"].tolist() == [zero]
        np.testing.assert_array_equal(record[f"{w}.kept"], unit[w][..., [zero], :])


def test_refactored_factors_have_the_products_and_shapes_of_an_svd() -> None:
    unit = block(np.random.default_rng(4), biases=True)
    new, _ = BY_NAME["refactor_factored_attn_matrices"].apply(unit)

    def qk(u: dict[str, Array]) -> Array:
        q = np.concatenate([u["attn.W_Q"], u["attn.b_Q"][:, None]], 1)
        k = np.concatenate([u["attn.W_K"], u["attn.b_K"][:, None]], 1)
        product: Array = q @ k.swapaxes(1, 2)
        return product

    assert distance(qk(new), qk(unit)) < 1e-12
    ov, new_ov = (u["attn.W_V"] @ u["attn.W_O"] for u in (unit, new))
    assert distance(new_ov, ov) < 1e-12
    moved = sum(unit["attn.b_V"][n] @ unit["attn.W_O"][n] for n in range(SIZES.n))
    assert distance(new["attn.b_O"], unit["attn.b_O"] + moved) < 1e-12
    assert not new["attn.b_V"].any()
    spectrum = np.linalg.svd(ov, compute_uv=False).astype(np.float64)[:, : SIZES.d // SIZES.n]
    sizes: Array = np.sqrt((new["attn.W_V"] ** 2).sum(1))
    assert distance(sizes, spectrum) < 1e-12
    gram = new["attn.W_O"] @ new["attn.W_O"].swapaxes(1, 2)
    assert distance(gram, np.broadcast_to(np.eye(gram.shape[1]), gram.shape)) < 1e-12


def _head_of_low_rank(unit: dict[str, Array]) -> None:
    unit["attn.W_Q"][0, :, 3:] = 0  # W_QK of rank 3; K keeps full rank
    unit["attn.W_V"][1] = np.outer(unit["attn.W_V"][1, :, 0], np.arange(1, 9))
    unit["attn.W_O"][2] = 0


def _equal_singular_values(unit: dict[str, Array]) -> None:
    h = SIZES.d // SIZES.n
    for name in ("attn.W_Q", "attn.W_K", "attn.W_V"):
        unit[name][:] = np.linalg.qr(unit[name])[0]
        unit[name][1] = np.eye(SIZES.d)[:, :h]
    unit["attn.W_K"][1] = unit["attn.W_Q"][1]
    unit["attn.W_O"][:] = np.linalg.qr(unit["attn.W_O"].swapaxes(1, 2))[0].swapaxes(1, 2)


def _pruned(unit: dict[str, Array]) -> None:
    for name in unit:
        unit[name] = np.zeros_like(unit[name])


@pytest.mark.parametrize("spoil", [_head_of_low_rank, _equal_singular_values, _pruned])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("steps", [STEPS, STEPS[4:]], ids=label)
def test_degenerate_heads(spoil: object, biases: bool, steps: tuple[Step, ...]) -> None:
    units = model(5, biases=biases)
    spoil(units[1])  # type: ignore[operator]
    assert np.abs(forward(process(units, steps), TOKENS) - forward(units, TOKENS)).max() < 1e-10
    processed, records = apply_all(units[1], steps)
    back = undo_all(processed, steps, records)
    for name in units[1]:
        np.testing.assert_allclose(back[name], units[1][name], rtol=0, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("biases", [False, True], ids=["hf", "biases"])
@pytest.mark.parametrize("kind", ["ordinary", "negative", "zero", "mixed"])
@pytest.mark.parametrize("steps", SUBSETS, ids=label)
def test_function_is_unchanged(steps: tuple[Step, ...], kind: str, biases: bool) -> None:
    rng = np.random.default_rng(6)
    units = [with_gains(unit, kind, rng) for unit in model(7, biases=biases)]
    for unit in units:  # a gain of 1e4 makes the function itself ill-conditioned
        unit |= {n: np.clip(a, -3, 3) for n, a in unit.items() if n.startswith("ln")}
    expected = forward(units, TOKENS)
    assert np.abs(forward(process(units, steps), TOKENS) - expected).max() < 1e-10


@pytest.mark.parametrize("steps", [DEFAULT, STEPS], ids=label)
def test_undone_edits_keep_their_function(steps: tuple[Step, ...]) -> None:
    """Weights that were trained after processing come back in the original basis."""
    units = model(8)
    done = [apply_all(unit, steps) for unit in units]
    rng = np.random.default_rng(9)
    edited = [
        {name: array + 0.05 * rng.normal(size=array.shape) for name, array in unit.items()}
        for unit, _ in done
    ]
    back = [undo_all(u, steps, records) for u, (_, records) in zip(edited, done, strict=True)]
    assert np.abs(forward(back, TOKENS) - forward(edited, TOKENS)).max() < 1e-10
    np.testing.assert_array_equal(back[1]["ln1.w"], units[1]["ln1.w"])
    assert distance(back[1]["attn.W_Q"], units[1]["attn.W_Q"]) < 3  # that basis, not another


def test_nan_has_no_singular_value_decomposition() -> None:
    unit = block(np.random.default_rng(0))
    unit["attn.W_K"][0, 0, 0] = np.nan
    with pytest.raises(BadInput) as caught:
        apply_all(unit, STEPS)
    assert caught.value.where == "attn.W_K"


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("none", []),
        ("default", [step.name for step in STEPS[:4]]),
        ("all", [step.name for step in STEPS]),
        ("fold_value_biases, fold_ln,fold_ln", ["fold_ln", "fold_value_biases"]),
    ],
)
def test_parse(spec: str, names: list[str]) -> None:
    assert [step.name for step in parse(spec)] == names


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("foldln", "fold_ln"),
        ("fold_ln,center_unembedding", "center_unembed"),
        ("defualt", "default"),
        ("zzz", "Choose from"),
        ("", "Choose from"),
        ("fold_ln,", "Choose from"),
        ("none,fold_ln", "Leave the others out"),
    ],
)
def test_parse_refuses_and_helps(spec: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert hint in caught.value.do
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("seed", range(4))
def test_the_rows_that_are_kept_are_those_that_cannot_be_undone(seed: int) -> None:
    """Gains over many decades, beside means so large that each channel must be looked at."""
    rng = np.random.default_rng(seed)
    sizes = Sizes(d=150, n=5, f=11)
    unit = block(rng, sizes)
    unit["ln2.w"] = rng.choice([-1, 1], sizes.d) * 10.0 ** rng.uniform(-4, 2, sizes.d)
    unit["ln2.w"][7] = 0
    unit["mlp.W_in"] += rng.choice([0, 3], sizes.d)[:, None]
    w, gain = unit["mlp.W_in"], np.abs(unit["ln2.w"])
    processed, record = FoldLn().apply(unit)
    rows = np.abs(w).max(1)
    bound = 8 * gain * np.maximum(rows, rows.mean() / 8)
    lost = (np.abs(np.asarray(processed["mlp.W_in"])).max(1) > bound) | (gain == 0)
    assert 2 < lost.sum() < sizes.d - 2
    assert record["mlp.W_in.rows"].tolist() == np.flatnonzero(lost).tolist()
    assert np.array_equal(record["mlp.W_in.kept"], w[lost])
