"""The table is one-to-one and total, and every op is undone by its inverse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.layout import LAYOUTS, TABLE, Layout, Rearrange, Unit, expand
from converter.layout.ops import shape

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
    assert sum(s.layer == 2 for s in slots.values()) == sum(r.unit is Unit.BLOCK for r in TABLE)
    assert not any("{" in name for name in names)


def test_a_table_that_is_not_one_to_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.layout.table.TABLE", (*TABLE, TABLE[0]))
    with pytest.raises(AssertionError, match="one-to-one"):
        expand("hf", SIZES, 1)


def test_what_is_absent_has_a_meaning() -> None:
    """HF has no name exactly for the rows that say what absence means."""
    for row in TABLE:
        if row.hf is None:
            assert row.absence is not None
            assert row.absence.value == 0
