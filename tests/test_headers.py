"""Mutated safetensors headers, a few thousand (`scripts/headers`: a million)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converter.checkpoint import reader
from converter.checkpoint.reader import SafetensorsReader
from converter.errors import CorruptFile
from tests.headers import disagreement, mutated, sound

Faulty = Callable[[SafetensorsReader], object]


def _all(path: Path, count: int) -> tuple[int, set[str]]:
    found = [disagreement(mutated(sound(), seed), path) for seed in range(count)]
    return sum(accepted for accepted, _ in found), {how for _, how in found if how}


def test_what_is_accepted_is_read_alike(tmp_path: Path) -> None:
    accepted, parted = _all(tmp_path / "x.safetensors", 3000)
    assert not parted
    assert 300 < accepted < 1500  # neither all nor none


def _moved(one: SafetensorsReader) -> None:
    one.places = {name: (offset + 1, size) for name, (offset, size) in one.places.items()}


def _swapped(one: SafetensorsReader) -> None:
    names = list(one.places)
    one.places = dict(zip(names, reversed(one.places.values()), strict=True))


def _lost(one: SafetensorsReader) -> None:
    if one.other:
        one.other.popitem()


def _turned(one: SafetensorsReader) -> None:
    for name, stored in one.tensors.items():
        one.tensors[name] = reader.Stored(name, stored.code, stored.shape[::-1], stored.file)


@pytest.mark.parametrize("fault", [_moved, _swapped, _lost, _turned])
def test_a_faulty_reader_is_found(
    fault: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = SafetensorsReader.__init__

    def faulty(self: SafetensorsReader, path: Path) -> None:
        make(self, path)
        fault(self)

    monkeypatch.setattr(SafetensorsReader, "__init__", faulty)
    assert _all(tmp_path / "x.safetensors", 200)[1]


@pytest.mark.parametrize("shape", [(0, 2**62), (0, 2**40, 2**40), (1,) * 65])
def test_shapes_that_no_array_has(shape: tuple[int, ...], tmp_path: Path) -> None:
    """The library allows them where they hold nothing, or are no longer than one element."""
    size = 0 if 0 in shape else 4
    entry = f'"x":{{"dtype":"F32","shape":{list(shape)},"data_offsets":[0,{size}]}}'
    text = f"{{{entry}}}".encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(CorruptFile, match="shape"):
        SafetensorsReader(path)
    with pytest.raises(ValueError, match=r"dimension|too big"):
        np.empty(shape, np.float32)
