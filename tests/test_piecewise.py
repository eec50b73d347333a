"""A matrix that is computed piece by piece is the matrix that is computed at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import piecewise
from converter.dtypes import CODES, cast, chunks, same_bits, sha256
from converter.layout import Rearrange
from converter.piecewise import (
    Piecewise,
    along,
    deferred,
    in_blocks,
    largest,
    stored_as,
    wide,
    with_rows,
)
from converter.processing.portable import mean, total

shapes = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)
seeds = st.integers(0, 2**32)
codes = st.sampled_from(sorted(CODES))


def stored(rng: np.random.Generator, shape: tuple[int, ...], code: str) -> np.ndarray:
    """Of any strides."""
    order = rng.permutation(len(shape))
    array = rng.normal(size=[shape[i] for i in order]) * 10.0 ** rng.integers(-3, 4)
    return cast(array, code).transpose(np.argsort(order))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "PIECE", 7)
    monkeypatch.setattr(piecewise, "_LINE", 2)
    monkeypatch.setattr("converter.dtypes._CHUNK_BYTES", 64)
    monkeypatch.setattr("converter.dtypes._COLUMNS", 3)


@given(shapes, seeds, codes, codes)
@settings(deadline=None)
def test_as_the_whole_array(shape: tuple[int, ...], seed: int, code: str, target: str) -> None:
    rng = np.random.default_rng(seed)
    array = stored(rng, shape, code)
    gain, shift = rng.normal(size=(shape[-2], 1)), rng.normal(size=(*shape[:-2], 1, shape[-1]))
    rows = rng.permutation(shape[-2])[: rng.integers(0, shape[-2] + 1)]
    values = rng.normal(size=(*shape[:-2], rows.size, shape[-1]))

    def made(matrix: Any) -> Any:
        return np.abs(with_rows((2 - matrix * gain + shift) / gain, rows, values) - matrix)

    lazy: Any = made(wide(array))
    at_once = made(array.astype(np.float64))
    assert issubclass(type(lazy), Piecewise)
    assert lazy.shape == at_once.shape
    assert same_bits(np.asarray(lazy), at_once)
    assert same_bits(np.asarray(stored_as(lazy, target)), cast(at_once, target))
    assert sha256(stored_as(lazy, target)) == sha256(cast(at_once, target))
    assert same_bits(lazy[..., rows, :], at_once[..., rows, :])
    assert lazy.any() == at_once.any()
    assert largest(lazy) == np.abs(at_once).max()
    for axis in range(-1, len(shape)):
        others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
        assert same_bits(largest(lazy, axis), np.abs(at_once).max(others))
        weights = rng.normal(size=shape[axis])
        assert same_bits(mean(lazy, axis), mean(at_once, axis))
        assert same_bits(total(lazy, axis, weights), total(at_once, axis, weights))
        joined = np.empty(shape)
        for place, piece in along(lazy, axis, lambda piece: piece):
            joined[place] = piece
            piece[...] = 0  # in memory of its own
        assert same_bits(joined, at_once)


@pytest.mark.parametrize(
    "pattern", ["(n h) d -> n d h", "d (n h) -> n h d", "v d -> d v", "d v -> d v"]
)
def test_rearranged_as_the_whole_array(pattern: str) -> None:
    sizes = {"n": 3, "h": 4, "d": 5, "v": 11}
    before, after = pattern.split(" -> ")
    there = Rearrange(before, after)
    rng = np.random.default_rng(0)
    hub = rng.normal(size=[sizes[axis] for axis in after.split()]).astype(np.float32)
    expected = there.inverse.apply(hub, sizes)
    asked: list[int] = []

    def look(index: tuple[Any, ...]) -> np.ndarray:
        part: np.ndarray = hub[index]
        asked.append(part.size)
        return part

    lazy: Any = there.inverse.apply(Piecewise(hub.shape, hub.dtype, look), sizes)  # type: ignore[arg-type]
    assert same_bits(np.concatenate([c.ravel() for c in chunks(lazy)]), expected.ravel())
    assert len(asked) > 1
    assert sum(asked) == hub.size  # each element once
    for start in range(expected.shape[0]):
        assert same_bits(lazy[start : start + 3], expected[start : start + 3])


@pytest.mark.parametrize("what", [np.exp, np.add.reduce])
def test_what_is_not_plain_arithmetic_is_refused(what: Callable[..., Any]) -> None:
    with pytest.raises(TypeError):
        what(wide(np.ones((3, 3))))


@given(shapes, seeds, st.integers(1, 4))
@settings(deadline=None)
def test_in_blocks_as_the_whole_array(shape: tuple[int, ...], seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    array = rng.normal(size=shape)
    asked: list[int] = []

    def block(number: int) -> np.ndarray:
        asked.append(number)
        return array[number * rows : (number + 1) * rows].copy()

    lazy = in_blocks(shape, array.dtype, block, rows)
    assert sha256(lazy) == sha256(array)
    assert asked == list(range(-(-shape[0] // rows)))  # each once
    assert same_bits(wide(lazy)[..., :1, :], array[..., :1, :])
    chosen = rng.permutation(shape[-1])
    assert same_bits(lazy[..., chosen], array[..., chosen])
    asked.clear()
    assert same_bits(np.asarray(lazy[..., :1]), array[..., :1])  # all of it is there by now
    assert not asked


def test_deferred_is_done_once_and_only_if_asked() -> None:
    done: list[int] = []

    def work() -> np.ndarray:
        done.append(1)
        return np.arange(6.0)

    vector = deferred((6,), work) * 2
    assert not done
    assert np.asarray(vector).tolist() == [0, 2, 4, 6, 8, 10]
    assert vector.any()
    assert done == [1]
