"""safetensors files whose headers are mutated: what we accept, the library accepts and reads alike."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from converter.checkpoint.reader import SafetensorsReader
from converter.errors import BadInput

Header = dict[str, Any]
_NUMBERS = [
    0, 1, 2, 3, 4, 7, 8, 12, 16, 24, 48, -1, 2**31, 2**32, 2**53, 2**63, 2**64 - 1, 2**64, 10**30,
    1.0, 0.5, "4", None, True, [], [4],
]  # fmt: skip
_DTYPES = [
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "C64",
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "f32", "", "F33", 4, None,
]  # fmt: skip
_NAMES = ["a", "b.weight", "", "__metadata__", "\0", "a\nb", "é", "\ud800", "a" * 300]
_TEXTS = ["{", "}", "[", "]", ",", ":", '"', "\\", " ", "\n", "\t", "\0", "e9", "-", "0", ".5", "null", '\\u0000', "\xff"]  # fmt: skip


def sound() -> bytes:
    """A few tensors of all that can be stored, none of them two alike."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "a": rng.normal(size=(2, 3)).astype(np.float32),
        "b.weight": rng.normal(size=(4,)).astype(np.float16),
        "c": rng.integers(0, 255, (3, 1), np.uint8),
        "d": rng.normal(size=()).astype(np.float64),
        "e": np.zeros((0, 5), np.float32),
    }
    return save(tensors, metadata={"format": "pt", "x": "y"})


def mutated(data: bytes, seed: int) -> bytes:
    """The file with one to three things of its header changed; the same for the same seed."""
    rng = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.6:
            try:
                header = json.loads(text)
                rng.choice(_EDITS)(header, rng)
                text = json.dumps(header).encode("utf-8", "surrogatepass")
                continue
            except (ValueError, LookupError, TypeError, AttributeError):
                pass
        text = rng.choice(_CHANGES)(text, rng)
    if rng.random() < 0.1:
        body = (
            body + b"\0" * rng.randint(1, 9) if rng.random() < 0.5 else body[: -rng.randint(1, 9)]
        )
    stated = len(text)
    if rng.random() < 0.1:
        stated = max(0, stated + rng.choice((-8, -1, 1, 8, 2**20, 2**40, 2**62)))
    return stated.to_bytes(8, "little") + text + body


def _entry(header: Header, rng: random.Random) -> Header:
    found: Header = header[rng.choice(sorted(header))]
    return found


def _set_number(header: Header, rng: random.Random) -> None:
    values = _entry(header, rng)[rng.choice(("shape", "data_offsets"))]
    values[rng.randrange(len(values))] = rng.choice(_NUMBERS)


def _shift(header: Header, rng: random.Random) -> None:
    values = _entry(header, rng)["data_offsets"]
    values[rng.randrange(2)] += rng.choice((-8, -4, -1, 1, 4, 8))


def _swap_offsets(header: Header, rng: random.Random) -> None:
    one, two = _entry(header, rng), _entry(header, rng)
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]


def _swap_entries(header: Header, rng: random.Random) -> None:
    one, two = rng.choice(sorted(header)), rng.choice(sorted(header))
    header[one], header[two] = header[two], header[one]


def _reorder(header: Header, rng: random.Random) -> None:
    items = list(header.items())
    rng.shuffle(items)
    header.clear()
    header.update(items)


def _shape(header: Header, rng: random.Random) -> None:
    entry = _entry(header, rng)
    size = int(np.prod(entry["shape"])) if entry["shape"] else 1
    entry["shape"] = rng.choice(([size], [1, size], [size, 1, 1], [], entry["shape"][::-1], [2, size // 2]))  # fmt: skip


def _set_field(header: Header, rng: random.Random) -> None:
    _entry(header, rng)[rng.choice(("dtype", "shape", "data_offsets", "more"))] = rng.choice(
        _NUMBERS
    )


_EDITS: list[Callable[[Header, random.Random], object]] = [
    _set_number,
    _shift,
    _swap_offsets,
    _swap_entries,
    _reorder,
    _shape,
    _set_field,
    lambda h, rng: _entry(h, rng).update(dtype=rng.choice(_DTYPES)),
    lambda h, rng: h.pop(rng.choice(sorted(h))),
    lambda h, rng: h.update({rng.choice(_NAMES): _entry(h, rng)}),
    lambda h, rng: h.update({rng.choice(_NAMES): h.pop(rng.choice(sorted(h)))}),
    lambda h, rng: h.update(__metadata__=rng.choice([{}, {"a": "b"}, {"a": 1}, [], None, "x", {"": "\0"}])),
]  # fmt: skip


def _flip(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text) + 1)
    return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]


def _insert(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(_TEXTS).encode("latin-1") + text[at:]


def _cut(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text) + 1)
    return text[:at] + text[at + rng.randint(1, 12) :]


def _repeat(text: bytes, rng: random.Random) -> bytes:
    """A piece twice: a key, an entry."""
    at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return text[:to] + text[at:to] + text[to:]


def _twice(text: bytes, rng: random.Random) -> bytes:
    """A name twice, with the same data or other."""
    entry = rng.choice((b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}', b'"c":{"dtype":"U8","shape":[3],"data_offsets":[40,43]}'))  # fmt: skip
    return b"{" + entry + b"," + text[1:] if rng.random() < 0.5 else text.rstrip()[:-1] + b"," + entry + b"}"  # fmt: skip


_CHANGES: list[Callable[[bytes, random.Random], bytes]] = [_flip, _flip, _insert, _cut, _repeat, _twice]  # fmt: skip


def disagreement(data: bytes, path: Path) -> tuple[bool, str]:
    """Whether we accept a file, and where we and the library part: "" if we do not.

    Args:
        path: where the file is written, for us to read.
    """
    path.write_bytes(data)
    try:
        reader = SafetensorsReader(path)
    except BadInput:
        return False, ""
    except Exception as error:
        return True, f"we raise {error!r}"
    try:
        theirs: dict[str, Any] = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        return True, f"the library refuses it: {error}"
    names = {*reader.tensors, *reader.other}
    if names != set(theirs) or names != set(reader.places):
        return True, f"we find {sorted(names)}, the library {sorted(theirs)}"
    for name, found in theirs.items():
        raw = bytes(found["data"])
        offset, size = reader.places[name]
        if data[offset : offset + size] != raw:
            return True, f"{name} is elsewhere"
        if name in reader.tensors:
            stored, array = reader.tensors[name], reader.read(name)
            said = (stored.code, list(stored.shape), array.tobytes())
            if said != (found["dtype"], list(found["shape"]), raw):
                return True, f"{name} is read otherwise"
    return True, ""
