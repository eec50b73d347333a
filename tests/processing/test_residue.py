"""Any bits come back over any prediction, and good predictions cost little."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import piecewise
from converter.dtypes import CODES, bits, cast, same_bits
from converter.processing import residue
from tests.processing.weights import codes


@given(codes, st.integers(0, 2**32), st.integers(0, 70))
@settings(max_examples=150, deadline=None)
def test_any_bit_patterns_over_any_prediction(code: str, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = CODES[code]
    original = np.frombuffer(rng.bytes(size * dtype.itemsize), dtype)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-320, 1e300])
    basis = rng.choice([*special, *rng.normal(size=8)], size=size)
    near = rng.random(size) < 0.5
    with np.errstate(all="ignore"):
        basis[near] = original.astype(np.float64)[near] * (
            1 + 2.0**-24 * rng.normal(size=near.sum())
        )
    decoded = residue.decode(residue.encode(original, basis, code), basis, code)
    assert same_bits(decoded, original)


@given(codes, st.integers(0, 2**32))
@settings(deadline=None)
def test_ordered_is_one_to_one_and_in_the_order_of_the_numbers(code: str, seed: int) -> None:
    dtype = CODES[code]
    array = np.frombuffer(np.random.default_rng(seed).bytes(64 * dtype.itemsize), dtype)
    integers = residue.ordered(array)
    assert same_bits(residue.unordered(integers, code), array)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        numbers = array.astype(np.float64)
    finite = ~np.isnan(numbers)
    by_integer = numbers[finite][np.argsort(integers[finite], kind="stable")]
    assert (np.diff(by_integer) >= 0).all()


@pytest.mark.parametrize("code", sorted(CODES))
def test_neighbours_differ_by_one_across_zero(code: str) -> None:
    tiny = cast(np.array([0.0]), code)
    smallest = bits(tiny).copy()
    smallest[0] = 1
    values = np.concatenate([-smallest.view(CODES[code]), -tiny, tiny, smallest.view(CODES[code])])
    assert np.diff(residue.ordered(values)).tolist() == [1, 1, 1]


def test_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "PIECE", 8)
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(7, 5))
    original = cast(basis * (1 + 1e-7 * rng.normal(size=basis.shape)), "F32")
    original[3, 2] = np.nan
    assert same_bits(residue.decode(residue.encode(original, basis, "F32"), basis, "F32"), original)


def test_pieces_make_one_zlib_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledgers were always read so, and the checksum at its end is that of all."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(60, 100))
    original = cast(basis * (1 + 1e-6 * rng.normal(size=basis.shape)), "F32")
    original[7] = 1e30
    whole = residue.encode(original, basis, "F32")
    monkeypatch.setattr(piecewise, "PIECE", 400)
    pieces = residue.encode(original, basis, "F32")
    assert pieces["classes"].size != whole["classes"].size
    for name in residue.STREAMS:
        assert zlib.decompress(pieces[name].data) == zlib.decompress(whole[name].data), name


def test_a_perfect_prediction_costs_next_to_nothing() -> None:
    original = np.random.default_rng(0).normal(size=(100, 1000)).astype(np.float32)
    streams = residue.encode(original, original.astype(np.float64), "F32")
    assert sum(s.nbytes for s in streams.values()) < 1e-3 * original.nbytes


@pytest.mark.parametrize("stream", residue.STREAMS)
@pytest.mark.parametrize("fault", ["empty", "cut", "noise", "longer"])
def test_damaged_streams_are_refused(stream: str, fault: str) -> None:
    rng = np.random.default_rng(0)
    basis = rng.normal(size=500)
    original = cast(basis * (1 + 1e-6 * rng.normal(size=500)), "F32")
    original[:9] = 1e30
    streams = residue.encode(original, basis, "F32")
    good = streams[stream]
    streams[stream] = {
        "empty": good[:0],
        "cut": good[:-5],
        "noise": np.full(40, 255, np.uint8),
        "longer": np.frombuffer(zlib.compress(bytes(10**6)), np.uint8),
    }[fault]
    with pytest.raises(ValueError, match="stream"):
        residue.decode(streams, basis, "F32")


def test_a_nan_in_the_prediction_counts_as_zero() -> None:
    """0/0 is a negative NaN on x86 and a positive one on ARM: a ledger must read on both."""
    original = np.array([np.nan, -np.nan], np.float32)
    streams = residue.encode(original, np.array([np.nan, -np.nan]), "F32")
    for other in ([-np.nan, np.nan], [np.nan, 0.0]):
        assert same_bits(residue.decode(streams, np.array(other), "F32"), original)
