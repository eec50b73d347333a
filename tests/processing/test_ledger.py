"""`exact` gives the original bits back, `compact` the original basis, for edited weights too."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from converter.choices import LedgerKind
from converter.convert import tl_to_hf
from converter.dtypes import CODES, same_bits
from converter.errors import CorruptFile
from converter.processing import DEFAULT, STEPS, Carry, Step, absorb, apply_all, parse
from converter.processing.ledger import decode_unit, encode_unit
from converter.processing.step import Array
from converter.processing.unit_ledger import UnitLedger
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
    original: Tensors, steps: tuple[Step, ...], code: str, kind: LedgerKind, *, drop: bool = True
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
    document = json.loads(json.dumps(ledger.to_json()))
    assert UnitLedger.of_json(document, ledger.prefix, ledger.arrays) == ledger
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
        assert_same(decode_unit(ledger, stored), original)


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("steps", SUBSETS, ids=label)
def test_exact_for_every_subset_and_dtype(steps: tuple[Step, ...], code: str) -> None:
    for unit in model(1):
        original = in_dtype(unit, code)
        stored, ledger = convert(original, steps, code, "exact")
        assert_same(decode_unit(ledger, stored), original)


@pytest.mark.parametrize("carry", [(), (Carry(),)], ids=["processed", "baked"])
@pytest.mark.parametrize("steps", [DEFAULT, STEPS], ids=label)
def test_compact_gives_the_basis_back(steps: tuple[Step, ...], carry: tuple[Step, ...]) -> None:
    for unit in model(2):
        original = in_dtype(unit, "F32")
        stored, ledger = convert(original, (*steps, *carry), "F32", "compact")
        restored = decode_unit(ledger, stored)
        for name, array in original.items():
            if name.rsplit(".", 1)[-1][0] in "bw":  # biases and LayerNorms are kept outright
                assert restored[name].exact
                assert same_bits(restored[name].array, array), name
            else:
                error = distance(
                    np.asarray(restored[name].array, np.float64), array.astype(np.float64)
                )
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
        restored = decode_unit(ledger, edited, edited=[name])
        assert {n for n, r in restored.items() if not r.exact} == inexact
        for other in original.keys() - inexact:
            assert same_bits(restored[other].array, original[other]), other


@pytest.mark.parametrize("kind", ["compact", "exact"])
@pytest.mark.parametrize("carry", [(), (Carry(),)], ids=["processed", "baked"])
@pytest.mark.parametrize("steps", [DEFAULT, STEPS], ids=label)
def test_edited_weights_keep_their_function(
    steps: tuple[Step, ...], carry: tuple[Step, ...], kind: LedgerKind
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
        restored = decode_unit(ledger, stored, edited=names)
        plain.append(absorb({n: np.asarray(r.array, np.float64) for n, r in restored.items()}, 100))
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
        restored = decode_unit(ledger, stored, edited=norms)
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
    stored["attn.W_Q"][1, 3, 2] += 0.005
    back = np.asarray(decode_unit(ledger, stored, edited=["attn.W_Q"])["attn.W_Q"].array)
    change = back - original["attn.W_Q"]
    assert change[1, 3, 2] == pytest.approx(5, rel=1e-3)
    change[1, 3, 2] = 0
    assert np.abs(change).max() < 4e-7


@pytest.mark.parametrize("gain", [0.0, 1e-3], ids=["zero", "small"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_edit_out_of_its_gains_reach_keeps_its_function(gain: float, channels: int) -> None:
    """The channel's gain becomes one, and the function is the edited one."""
    start, edited_units, back = model(14), [], []
    for unit in start:
        for norm in ("ln1.w", "ln2.w", "ln_final.w"):
            if norm in unit:
                unit[norm][:channels] = gain
        original = in_dtype(unit, "F64")
        stored, ledger = convert(original, DEFAULT, "F64", "exact")
        names = [n for n in stored if n in ("attn.W_K", "mlp.W_in", "unembed.W_U")]
        rng = np.random.default_rng(15)
        for name in names:
            stored[name] = stored[name] + 0.5 * rng.normal(size=stored[name].shape)
        restored = decode_unit(ledger, stored, edited=names)
        for name, tensor in restored.items():
            if tensor.exact:
                assert same_bits(tensor.array, original[name]), name
        back.append(absorb({n: np.asarray(r.array, np.float64) for n, r in restored.items()}, 100))
        missing = {n: np.ones_like(a) if n.endswith(".w") else 0 * a for n, a in unit.items()}
        edited_units.append({**missing, **stored})
    assert (back[1]["ln1.w"][:channels] == 1).all()
    assert np.abs(forward(back, TOKENS) - forward(edited_units, TOKENS)).max() < 1e-9
    assert np.abs(forward(back, TOKENS) - forward(start, TOKENS)).max() > 1e-2


@pytest.mark.parametrize("edit", ["left", "right", "both", "all"])
@pytest.mark.parametrize("lost", ["W_K", "W_V", "W_O", "dead head"])
def test_an_edit_in_the_lost_directions_of_a_head_keeps_its_function(lost: str, edit: str) -> None:
    """Heads of rank below h: what an edit multiplies there is in no direction of the original."""
    unit = block(np.random.default_rng(16))
    names = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O")
    for name in names:
        if lost == "dead head" or name.endswith(lost):
            unit[name][1] = 0.0
    original = in_dtype(unit, "F64")
    stored, ledger = convert(original, STEPS, "F64", "exact")
    left, right = ("attn.W_Q", "attn.W_V"), ("attn.W_K", "attn.W_O")
    chosen = {"left": left, "right": right, "both": left + right, "all": tuple(stored)}[edit]
    rng = np.random.default_rng(17)
    for name in chosen:
        stored[name] = stored[name] + 0.3 * rng.normal(size=stored[name].shape)
    restored = decode_unit(ledger, stored, edited=chosen)
    back = {n: np.asarray(r.array, np.float64) for n, r in restored.items()}
    missing = {n: np.ones_like(a) if n.endswith(".w") else 0 * a for n, a in unit.items()}
    around = model(18)
    results = [
        forward([around[0], middle, *around[2:]], TOKENS)
        for middle in (back, {**missing, **stored})
    ]
    assert np.abs(results[0] - results[1]).max() < 1e-9
    for name, tensor in restored.items():
        if tensor.exact:
            assert same_bits(tensor.array, original[name]), name


def test_a_head_that_was_tied_comes_back_without_its_tie() -> None:
    original = in_dtype(final(np.random.default_rng(9)), "F32")
    processed, records = apply_all(in_float64(original), DEFAULT)
    stored = in_dtype(processed, "F32")
    exact = encode_unit(original, stored, DEFAULT, records, kind="exact")
    restored = decode_unit(exact, stored)["unembed.W_U"]
    assert restored.exact
    assert same_bits(restored.array, original["unembed.W_U"])
    head = original.pop("unembed.W_U")  # as the first ledgers were, and where the target is tied
    older = encode_unit(original, stored, DEFAULT, records, kind="exact")
    assert not [name for name in older.arrays if name.startswith("residue.")]
    restored = decode_unit(older, stored)["unembed.W_U"]
    assert not restored.exact
    assert distance(restored.array, head.astype(np.float64)) < 4e-7
    assert "unembed.W_U" not in decode_unit(exact, stored, without=["unembed.W_U"])


@pytest.mark.parametrize(
    "what", ["residue", "original", "shape", "step", "mean", "no mean", "more", "rows"]
)
def test_a_damaged_ledger_is_refused(what: str) -> None:
    original = in_dtype(block(np.random.default_rng(10)), "F32")
    stored, ledger = convert(original, DEFAULT, "F32", "exact")
    arrays, document = dict(ledger.arrays), ledger.to_json()
    if what == "residue":
        arrays["blocks.7.residue.attn.W_Q.classes"] = np.zeros(9, np.uint8)
    elif what == "original":
        del arrays["blocks.7.original.attn.b_O"]
    elif what == "shape":
        arrays["blocks.7.original.attn.b_O"] = arrays["blocks.7.original.attn.b_O"][1:]
    elif what == "mean":
        arrays["blocks.7.fold_ln.attn.W_Q.mean"] = np.zeros(3, np.float32)
    elif what == "no mean":
        del arrays["blocks.7.fold_ln.attn.W_Q.mean"]
    elif what == "more":
        arrays["blocks.7.fold_ln.attn.W_X"] = np.zeros(3, np.float32)
    elif what == "rows":
        arrays["blocks.7.fold_ln.attn.W_Q.rows"] = np.array([10**6], np.int32)
    else:
        document["steps"][0]["name"] = "fold_everything"
    with pytest.raises(CorruptFile):
        decode_unit(UnitLedger.of_json(document, "blocks.7.", arrays), stored)


@pytest.mark.parametrize(
    "path", ["tensors", "tensors/attn.W_Q", "tensors/attn.W_Q/shape", "tensors/attn.W_Q/dtype",
             "tensors/attn.W_Q/kept", "steps", "steps/0", "steps/0/name", "steps/0/from_original",
             "rounding", "rounding/relative"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 1, -1.0, "x", [], [[]], {}, True, float("nan")])
def test_json_of_another_kind_is_refused(path: str, value: Any) -> None:
    original = in_dtype(block(np.random.default_rng(10)), "F32")
    stored, ledger = convert(original, DEFAULT, "F32", "exact")
    document: Any = ledger.to_json()
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
    place = document
    for key in parents:
        place = place[key]
    place[last] = value
    try:
        damaged = UnitLedger.of_json(document, "blocks.7.", ledger.arrays)
        restored = decode_unit(damaged, stored)
    except CorruptFile:
        return
    # Fewer steps or tensors: a ledger of something else, and sound in itself.
    assert value in ([], {}), path
    assert restored


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
    kinds: tuple[LedgerKind, ...] = ("compact", "exact")
    for kind in kinds:
        kept = total = 0.0
        for unit, times in parts:
            original = in_dtype({n: a * scale.get(n[:4], 1.0) for n, a in unit.items()}, "F32")
            processed, records = apply_all(in_float64(original), parse(spec))
            stored = {n: a for n, a in in_dtype(processed, "F32").items() if n[:2] != "ln"}
            ledger = encode_unit(original, stored, parse(spec), records, kind=kind)
            kept += times * sum(array.nbytes for array in ledger.arrays.values())
            # The real model is tied: its head is one with the embedding, and counts once.
            total += times * sum(a.nbytes for n, a in original.items() if n != "unembed.W_U")
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
    restored = decode_unit(replace(ledger, arrays=arrays), strange)
    assert_same({n: replace(r, array=np.asarray(r.array)) for n, r in restored.items()}, original)


@pytest.mark.parametrize(
    ("code", "digest"),
    [
        ("f32", "5a201f4519befe43771474ef4e814fe8511927d4d4427390557a13b4787b00e5"),
        ("f16", "430626631f7ea5bfc0ac8affd2600483de53c1db8b7a82d2b99aff25f359fb84"),
    ],
)
def test_an_exact_ledger_of_the_first_version_is_undone_to_the_last_bit(
    code: str, digest: str, tmp_path: Path
) -> None:
    """All five steps, decomposed by LAPACK, with heads of low rank and hard gains."""
    written = Path(__file__).parent / "ledgers" / code
    done = tl_to_hf(written, tmp_path / "back", reverse="exact", check=False)
    assert done.route.reverse == "exact"
    found = hashlib.sha256()
    for name, array in sorted(load_file(tmp_path / "back" / "model.safetensors").items()):
        found.update(name.encode() + array.tobytes())
    assert found.hexdigest() == digest
