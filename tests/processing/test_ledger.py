"""`exact` gives the original bits back, `compact` the original basis, for edited weights too."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from converter.dtypes import CODES, same_bits
from converter.errors import CorruptFile
from converter.processing import DEFAULT, STEPS, Carry, Step, absorb, apply_all, parse
from converter.processing.ledger import Kind, UnitLedger, decode_unit, encode_unit
from converter.processing.step import Array
from tests.processing.weights import (
    SUBSETS,
    TOKENS,
    Sizes,
    block,
    codes,
    distance,
    embed,
    final,
    forward,
    in_dtype,
    in_float64,
    label,
    model,
    units,
)

Tensors = dict[str, NDArray[Any]]


def convert(
    original: Tensors, steps: tuple[Step, ...], code: str, kind: Kind, *, drop: bool = True
) -> tuple[Tensors, UnitLedger]:
    """Process a stored unit into `code`; `drop` what the target layout has no tensor for."""
    processed, records = apply_all(in_float64(original), steps)
    stored = in_dtype(processed, code)
    carried = any(step.name == "carry" for step in steps)
    folded = steps[:1] and steps[0].name == "fold_ln"
    if drop and carried:
        stored = {n: a for n, a in stored.items() if n[-3:] not in ("b_Q", "b_K", "b_V", "b_U")}
    elif drop and folded:
        stored = {n: a for n, a in stored.items() if not n.startswith("ln")}
    ledger = encode_unit(original, stored, steps, records, kind=kind, prefix="blocks.7.")
    json.dumps(ledger.meta)
    assert all(name.startswith("blocks.7.") for name in ledger.arrays)
    return stored, ledger


def assert_same(restored: Any, original: Tensors) -> None:
    assert restored.keys() == original.keys()
    for name, array in original.items():
        assert restored[name].exact, name
        assert same_bits(restored[name].array, array), name


@given(
    units,
    st.sampled_from(SUBSETS),
    codes,
    codes,
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_exact_gives_every_bit_back(
    unit: dict[str, Array],
    steps: tuple[Step, ...],
    source: str,
    target: str,
    carry: bool,
    wild: bool,
    seed: int,
) -> None:
    original = in_dtype(unit, source)
    rng = np.random.default_rng(seed)
    if steps[-1].name == "refactor_factored_attn_matrices":  # an SVD is of finite numbers
        limit = float(ml_dtypes.finfo(CODES[source]).max)
        original = {
            n: np.nan_to_num(a.astype(np.float64), posinf=limit, neginf=-limit).astype(a.dtype)
            for n, a in original.items()
        }
        wild = False
        if float(max(np.abs(a.astype(np.float64)).max() for a in original.values())) > 1e100:
            return
    if wild:  # any bits at all: NaN payloads, infinities, denormals, negative zeros
        for name, array in original.items():
            flat = array.reshape(-1).copy()
            where = rng.integers(flat.size, size=1)
            flat[where] = np.frombuffer(rng.bytes(flat.itemsize), flat.dtype)
            flat[where - 1] = -0.0
            original[name] = flat.reshape(array.shape)
    with np.errstate(all="ignore"):
        all_steps = (*steps, Carry()) if carry else steps
        stored, ledger = convert(original, all_steps, target, "exact")
        assert_same(decode_unit(ledger, stored, prefix="blocks.7."), original)


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("steps", SUBSETS, ids=label)
def test_exact_for_every_subset_and_dtype(steps: tuple[Step, ...], code: str) -> None:
    for unit in model(1):
        original = in_dtype(unit, code)
        stored, ledger = convert(original, steps, code, "exact")
        assert_same(decode_unit(ledger, stored, prefix="blocks.7."), original)


@pytest.mark.parametrize("carry", [(), (Carry(),)], ids=["processed", "baked"])
@pytest.mark.parametrize("steps", [DEFAULT, STEPS], ids=label)
def test_compact_gives_the_basis_back(steps: tuple[Step, ...], carry: tuple[Step, ...]) -> None:
    for unit in model(2):
        original = in_dtype(unit, "F32")
        stored, ledger = convert(original, (*steps, *carry), "F32", "compact")
        restored = decode_unit(ledger, stored, prefix="blocks.7.")
        for name, array in original.items():
            if name.rsplit(".", 1)[-1][0] in "bw":  # biases and LayerNorms are kept outright
                assert restored[name].exact
                assert same_bits(restored[name].array, array), name
            else:
                error = distance(restored[name].array.astype(np.float64), array.astype(np.float64))
                assert error < 4e-7, name


def test_an_edit_leaves_other_tensors_exact() -> None:
    original = in_dtype(block(np.random.default_rng(3)), "F32")
    stored, ledger = convert(original, STEPS, "F32", "exact")
    for name, inexact in {
        "attn.W_Q": {"attn.W_Q", "attn.b_Q"},
        "attn.b_K": {"attn.b_K"},
        "attn.W_V": {"attn.W_V", "attn.b_V"},
        "attn.W_O": {"attn.W_O", "attn.b_O"},
        "mlp.W_in": {"mlp.W_in", "mlp.b_in"},
        "mlp.W_out": {"mlp.W_out"},
    }.items():
        edited = {**stored, name: stored[name] + np.float32(0.01)}
        restored = decode_unit(ledger, edited, edited=[name], prefix="blocks.7.")
        assert {n for n, r in restored.items() if not r.exact} == inexact
        for other in original.keys() - inexact:
            assert same_bits(restored[other].array, original[other]), other


@pytest.mark.parametrize("kind", ["compact", "exact"])
@pytest.mark.parametrize("carry", [(), (Carry(),)], ids=["processed", "baked"])
@pytest.mark.parametrize("steps", [DEFAULT, STEPS], ids=label)
def test_edited_weights_keep_their_function(
    steps: tuple[Step, ...], carry: tuple[Step, ...], kind: Kind
) -> None:
    """Some tensors edited after processing: undone, without biases, in the original norms."""
    start = model(4)
    rng = np.random.default_rng(5)
    edited_units, plain = [], []
    for unit in start:
        original = in_dtype(unit, "F64")
        stored, ledger = convert(original, (*steps, *carry), "F64", kind)
        names = [n for n in stored if n in ("attn.W_Q", "attn.W_V", "mlp.W_in", "unembed.W_U")]
        for name in names:
            stored[name] = stored[name] + 0.05 * rng.normal(size=stored[name].shape)
        restored = decode_unit(ledger, stored, edited=names, prefix="blocks.7.")
        plain.append(absorb({n: r.array.astype(np.float64) for n, r in restored.items()}, 100))
        missing = {n: np.ones_like(a) if n.endswith(".w") else 0 * a for n, a in unit.items()}
        edited_units.append({**missing, **stored})
    assert np.abs(forward(plain, TOKENS) - forward(edited_units, TOKENS)).max() < 1e-10
    assert np.abs(forward(plain, TOKENS) - forward(start, TOKENS)).max() > 1e-3


def test_an_edit_of_an_identity_layernorm_counts() -> None:
    """Where a layout keeps identity norms, a user may train them."""
    start = model(6)
    results = []
    for unit in start:
        stored, ledger = convert(in_dtype(unit, "F64"), DEFAULT, "F64", "exact", drop=False)
        norms = [name for name in stored if name.startswith("ln")]
        rng = np.random.default_rng(7)
        stored |= {n: stored[n] + 0.1 * rng.normal(size=stored[n].shape) for n in norms}
        restored = decode_unit(ledger, stored, edited=norms, prefix="blocks.7.")
        results.append((stored, {n: r.array for n, r in restored.items()}))
    edited, back = ([pair[i] for pair in results] for i in (0, 1))
    np.testing.assert_array_equal(back[1]["ln1.w"], start[1]["ln1.w"])
    assert np.abs(forward(back, TOKENS) - forward(edited, TOKENS)).max() < 1e-10


def test_an_edit_in_a_channel_of_small_gain_is_not_lost() -> None:
    unit = block(np.random.default_rng(8))
    unit["ln1.w"][3] = 1e-3
    original = in_dtype(unit, "F32")
    stored, ledger = convert(original, DEFAULT, "F32", "compact")
    assert ledger.arrays["blocks.7.fold_ln.attn.W_Q.rows"].tolist() == [3]
    stored["attn.W_Q"] = stored["attn.W_Q"].copy()
    stored["attn.W_Q"][1, 3, 2] += 0.5
    back = decode_unit(ledger, stored, edited=["attn.W_Q"], prefix="blocks.7.")["attn.W_Q"].array
    change = back - original["attn.W_Q"]
    assert change[1, 3, 2] == pytest.approx(500, rel=1e-3)
    change[1, 3, 2] = 0
    assert np.abs(change).max() < 4e-7


def test_a_tied_head_gets_no_residue() -> None:
    original = in_dtype(final(np.random.default_rng(9)), "F32")
    processed, records = apply_all(in_float64(original), DEFAULT)
    head = original.pop("unembed.W_U")
    stored = in_dtype(processed, "F32")
    ledger = encode_unit(original, stored, DEFAULT, records, kind="exact")
    assert not [name for name in ledger.arrays if name.startswith("residue.")]
    restored = decode_unit(ledger, stored)["unembed.W_U"]
    assert not restored.exact
    assert distance(restored.array, head.astype(np.float64)) < 4e-7


@pytest.mark.parametrize("what", ["residue", "original", "shape", "step"])
def test_a_damaged_ledger_is_refused(what: str) -> None:
    original = in_dtype(block(np.random.default_rng(10)), "F32")
    stored, ledger = convert(original, DEFAULT, "F32", "exact")
    arrays, meta = dict(ledger.arrays), json.loads(json.dumps(ledger.meta))
    if what == "residue":
        arrays["blocks.7.residue.attn.W_Q.classes"] = np.zeros(9, np.uint8)
    elif what == "original":
        del arrays["blocks.7.original.attn.b_O"]
    elif what == "shape":
        arrays["blocks.7.original.attn.b_O"] = arrays["blocks.7.original.attn.b_O"][1:]
    else:
        meta["steps"][0]["name"] = "fold_everything"
    with pytest.raises(CorruptFile):
        decode_unit(replace(ledger, arrays=arrays, meta=meta), stored, prefix="blocks.7.")


@pytest.mark.parametrize(
    ("spec", "compact", "exact"), [("default", 0.005, 0.04), ("all", 0.03, 0.07)]
)
def test_size_at_the_shapes_of_the_125m_model(
    spec: str, compact: float, exact: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """One real block; the embeddings' vocabulary is cut, and their share counted in full."""
    size, layers, vocabulary, cut = Sizes(d=768, n=12, f=3072, v=1009, c=512), 12, 50257, 1009
    rng = np.random.default_rng(11)
    parts: list[tuple[dict[str, Array], float]] = [
        (block(rng, size), layers),
        (embed(rng, size), vocabulary / cut),
        (final(rng, size), vocabulary / cut),
    ]
    scale = {"attn": 0.25, "mlp.": 0.25}
    ratios = {}
    kinds: tuple[Kind, ...] = ("compact", "exact")
    for kind in kinds:
        kept = total = 0.0
        for unit, times in parts:
            original = in_dtype({n: a * scale.get(n[:4], 1.0) for n, a in unit.items()}, "F32")
            processed, records = apply_all(in_float64(original), parse(spec))
            original.pop("unembed.W_U", None)  # tied, as in the real model
            stored = {n: a for n, a in in_dtype(processed, "F32").items() if n[:2] != "ln"}
            ledger = encode_unit(original, stored, parse(spec), records, kind=kind)
            kept += times * sum(array.nbytes for array in ledger.arrays.values())
            total += times * sum(array.nbytes for array in original.values())
        ratios[kind] = kept / total
    with capsys.disabled():
        print(
            f"\nledger at 125M, {spec}: compact {ratios['compact']:.2%}, exact {ratios['exact']:.2%}"
        )
    assert ratios["compact"] < compact
    assert ratios["exact"] < exact


def test_the_prediction_uses_no_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are predicted with the same bits on a machine whose BLAS sums in another order."""
    original = in_dtype(block(np.random.default_rng(12), biases=True), "F32")
    stored, ledger = convert(original, (*STEPS, Carry()), "F32", "exact")

    def other(function: Any) -> Any:
        return lambda *args, **kwargs: function(*args, **kwargs) * (1 + 1e-9)

    for name in ("tensordot", "einsum", "dot", "matmul", "mean", "sum"):
        monkeypatch.setattr(np, name, other(getattr(np, name)))

    class Other(np.ndarray):
        """An array whose @ is off by some rounding."""

        def __matmul__(self, b: Any) -> Any:
            return np.asarray(self).__matmul__(b) * (1 + 1e-9)

        def __rmatmul__(self, a: Any) -> Any:
            return np.asarray(self).__rmatmul__(np.asarray(a)) * (1 + 1e-9)

    strange = {name: array.view(Other) for name, array in stored.items()}
    arrays: Tensors = {name: array.view(Other) for name, array in ledger.arrays.items()}
    restored = decode_unit(replace(ledger, arrays=arrays), strange, prefix="blocks.7.")
    assert_same({n: replace(r, array=np.asarray(r.array)) for n, r in restored.items()}, original)
