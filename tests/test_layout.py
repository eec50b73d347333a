"""The table is one-to-one and total, and every op is undone by its inverse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.layout import (
    GPT_NEO,
    LAYOUTS,
    TABLE,
    Architecture,
    Layout,
    Rearrange,
    Row,
    UnitKind,
    expand,
)
from converter.layout.ops import shape
from converter.processing.carry import CARRIERS

SIZES = {"v": 5, "c": 3, "d": 6, "n": 3, "h": 2, "f": 7}


@given(st.sampled_from(TABLE), st.integers(0, 2**32 - 1))
def test_every_row_read_backwards_is_its_inverse(row: object, seed: int) -> None:
    flat, axes = row.flat, row.axes  # type: ignore[attr-defined]
    there = Rearrange(flat, axes)
    tensor = np.random.default_rng(seed).normal(size=shape(flat, SIZES))
    moved = there.apply(tensor, SIZES)
    assert moved.shape == shape(axes, SIZES)
    assert np.array_equal(there.inverse.apply(moved, SIZES), tensor)
    assert there.inverse.inverse == there


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_to_one_and_total(layout: Layout) -> None:
    slots = expand(layout, SIZES, 3)
    names = [s.name for s in slots.values() if s.name]
    assert len(names) == len(set(names))
    assert list(slots) == list(expand("hooked", SIZES, 3))
    assert sum(s.layer == 2 for s in slots.values()) == sum(r.unit is UnitKind.BLOCK for r in TABLE)
    assert not any("{" in name for name in names)


def test_a_table_that_is_not_one_to_one_is_refused() -> None:
    one_name = replace(TABLE[1], hf=TABLE[0].hf)
    for rows in ((*TABLE, TABLE[0]), (TABLE[0], one_name, *TABLE[2:])):
        with pytest.raises(AssertionError, match="one-to-one"):
            replace(GPT_NEO, rows=rows).expand("hf", SIZES, 1)


def test_another_architecture_is_its_table() -> None:
    """Made up: attention in one matrix, an activation norm, no positions, and a head without bias."""
    rows = (
        Row(UnitKind.EMBED, "model.tokens.weight", "embed.W_E", "embed.weight", "v d", "v d"),
        Row(UnitKind.BLOCK, "model.layers.{i}.up.weight", "blocks.{i}.mlp.W_in", "blocks.{i}.mlp.in.weight", "f d", "d f"),
        Row(UnitKind.BLOCK, None, "blocks.{i}.mlp.b_in", "blocks.{i}.mlp.in.bias", "f", "f"),
        Row(UnitKind.BLOCK, "model.layers.{i}.act.scale", "blocks.{i}.act.w", "blocks.{i}.act.weight", "f", "f"),
        Row(UnitKind.FINAL, "out.weight", "unembed.W_U", "unembed.weight", "v d", "d v"),
    )  # fmt: skip
    masks: dict[Layout, tuple[str, ...]] = {"hf": ("model.rope",), "hooked": (), "bridge": ()}
    made_up = Architecture(rows, masks, norms={"act": ()})
    hf, hooked = (made_up.expand(layout, SIZES, 2) for layout in ("hf", "hooked"))
    assert list(hf) == list(hooked) == [
        "embed.W_E",
        *(f"blocks.{i}.{part}" for i in range(2) for part in ("mlp.W_in", "mlp.b_in", "act.w")),
        "unembed.W_U",
    ]  # fmt: skip
    assert hf["blocks.1.mlp.W_in"].name == "model.layers.1.up.weight"
    assert hf["blocks.1.mlp.W_in"].shape == (7, 6)
    assert hooked["blocks.1.mlp.W_in"].shape == (6, 7)
    assert made_up.without_place("hf") == ("mlp.b_in",)
    assert made_up.writers("f") == ("mlp.W_in", "mlp.b_in")
    assert made_up.no_biases("hf", 1) == {"model.layers.0.up.bias": "blocks.0.mlp.b_in"}
    assert made_up.buffers("hf", 2) == {"model.rope"}
    assert set(made_up.templates("bridge")) == {row.bridge for row in rows}


def test_biases_that_gpt_neo_has_not() -> None:
    """By the names that others' code gives them."""
    names = ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")
    assert list(GPT_NEO.no_biases("hf", 1)) == [
        *(f"transformer.h.0.{name}.bias" for name in names),
        "lm_head.bias",
    ]
    assert GPT_NEO.no_biases("hooked", 1) == GPT_NEO.no_biases("bridge", 1) == {}
    assert GPT_NEO.without_place("hf") == ("attn.b_Q", "attn.b_K", "attn.b_V", "unembed.b_U")
    assert list(CARRIERS) == ["ln1", "ln_final"]
    assert {b for pairs in CARRIERS.values() for _, b in pairs} == {*GPT_NEO.without_place("hf")}
    assert not GPT_NEO.carriers("hooked")


def test_weights_are_known_by_what_they_write() -> None:
    assert GPT_NEO.writers("d") == (
        "embed.W_E", "pos_embed.W_pos", "attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out",
    )  # fmt: skip
    assert GPT_NEO.writers("v") == ("unembed.W_U", "unembed.b_U")


def test_what_is_absent_has_a_meaning() -> None:
    """HF has no name exactly for the rows that say what absence means."""
    for row in TABLE:
        if row.hf is None:
            assert row.absence is not None
            assert row.absence.value == 0
