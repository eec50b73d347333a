"""safetensors: a model's weights, its ledger, an adapter's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile import sound
from tests.hostile.damage import NO_FILE, NONSENSE, Bytes, cut, flipped, replace, rewrite
from tests.hostile.json_files import EITHER, HF
from tests.hostile.trial import Input

Header = dict[str, Any]
BROKEN = frozenset({3})


def head_of(data: bytes) -> tuple[Header, bytes]:
    """The header, parsed, and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_text(text: bytes, body: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def edited(change: Callable[[Header, str], object]) -> Bytes:
    """`change` is given the header and the name of one of its tensors."""

    def damage(data: bytes) -> bytes:
        header, body = head_of(data)
        change(header, sorted(name for name in header if name != "__metadata__")[-1])
        return with_text(json.dumps(header).encode("utf-8", "surrogatepass"), body)

    return damage


def entry(**fields: Any) -> Bytes:
    return edited(lambda header, name: header[name].update(fields))


def more(name: str, *, dtype: str = "F32", shape: tuple[int, ...] = (0,)) -> Bytes:
    """Another tensor, without data."""

    def change(header: Header, _: str) -> None:
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end]}

    return edited(change)


def _many(count: int) -> Bytes:
    def change(header: Header, _: str) -> None:
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        one = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
        header.update({f"n{i}": one for i in range(count)})

    return edited(change)


def _renamed(to: str) -> Bytes:
    return edited(lambda header, name: header.update({to: header.pop(name)}))


def _all(**fields: Any) -> Bytes:
    def change(header: Header, _: str) -> None:
        for name in header.keys() - {"__metadata__"}:
            header[name].update(fields)

    return edited(change)


def _metadata(value: Any) -> Bytes:
    return edited(lambda header, _: header.update(__metadata__=value))


def _first(count: int) -> Bytes:
    return lambda data: data[:count]


def _claiming(length: int) -> Bytes:
    return lambda data: length.to_bytes(8, "little") + data[8:]


def _twice(data: bytes) -> bytes:
    header, body = head_of(data)
    name = sorted(header.keys() - {"__metadata__"})[0]
    again = json.dumps({name: header[name]}).encode()
    return with_text(json.dumps(header).encode()[:-1] + b"," + again[1:], body)


BREAKS: dict[str, Bytes] = {
    **{f"cut at {share:.0%}": cut(share) for share in (0.001, 0.02, 0.3, 0.9, 0.9999)},
    **{f"cut to {n} bytes": _first(n) for n in (1, 7, 8, 9, 64)},
    "bytes at the end": lambda data: data + b"\0" * 9,
    **{
        f"a header of {length:,} bytes": (lambda n: lambda d: n.to_bytes(8, "little") + d[8:])(
            length
        )
        for length in (0, 1, 2**20, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1)
    },
    "a header that is a list": lambda data: with_text(b"[]", data),
    "a header of lists in lists": lambda data: with_text(b"[" * 10**6, data),
    "a header of objects in objects": lambda data: with_text(b'{"a":' * 10**6, data),
    "a header that is not UTF-8": lambda data: with_text(b'{"\xff\xfe":1}', data),
    "a header of spaces": lambda data: with_text(b" " * 10**7, data),
    "no such dtype": entry(dtype="F31"),
    "a dtype in small letters": entry(dtype="f32"),
    "a dtype of nothing": entry(dtype=""),
    "a dtype of a number": entry(dtype=5),
    "integers": entry(dtype="I32"),
    "another size of dtype": entry(dtype="F64"),
    "half a byte": entry(dtype="F4"),
    "a negative dimension": entry(shape=[-1, 4]),
    "a dimension of 2**63": entry(shape=[2**63]),
    "dimensions whose product overflows": entry(shape=[2**33, 2**33]),
    "dimensions whose product is 0 by overflow": entry(shape=[2**32, 2**32]),
    "a dimension of 10**30": entry(shape=[10**30]),
    "a dimension of 1.0": entry(shape=[1.0]),
    "a dimension of text": entry(shape=["4"]),
    "a thousand dimensions": entry(shape=[1] * 1000),
    "no dimension": entry(shape=[]),
    "dimensions of null": entry(shape=None),
    "offsets reversed": entry(data_offsets=[8, 4]),
    "offsets of the first": entry(data_offsets=[0, 4]),
    "negative offsets": entry(data_offsets=[-4, 4]),
    "offsets beyond the end": entry(data_offsets=[2**40, 2**40 + 4]),
    "offsets of 2**64": entry(data_offsets=[0, 2**64]),
    "one offset": entry(data_offsets=[0]),
    "three offsets": entry(data_offsets=[0, 4, 8]),
    "no offsets": edited(lambda header, name: header[name].pop("data_offsets")),
    "an entry of null": edited(lambda header, name: header.update({name: None})),
    "all at the same place": _all(data_offsets=[0, 4]),
    "metadata of numbers": _metadata({"format": 1}),
    "metadata of objects": _metadata({"format": {"a": "b"}}),
    "metadata of text": _metadata("pt"),
    "no tensors": lambda _: with_text(b"{}", b""),
    "a scalar more": more("score", shape=()),
    "names that forge an error": _renamed("x\n   do: rm -rf /\x1b[31m"),
    "a name of null bytes": _renamed("\0\0"),
    "a name of 1 MB": _renamed("x" * 10**6),
    "a name of marks of direction": _renamed("\u202etxt.exe"),
    "a name of nothing": _renamed(""),
    "300,000 names more": _many(300_000),
}
"""What no command that needs these tensors may take."""

MAY_BE: dict[str, Bytes] = {
    "metadata of null": _metadata(None),
    "the same name twice, with the same data": _twice,
    "metadata of 10 MB": _metadata({"x": "y" * 10**7}),
    "metadata of escape sequences": _metadata({"\x1b]0;x\x07": "\u202e\x1b[2J"}),
    "a ledger in metadata": _metadata({"ledger": "[" * 10**6}),
    "a number in the metadata's aliases": _metadata({"lm_head.weight": "\x1b"}),
    "NaN everywhere": lambda data: with_text(json.dumps(head_of(data)[0]).encode(), b"\xff" * len(head_of(data)[1])),
    "infinity everywhere": lambda data: with_text(json.dumps(head_of(data)[0]).encode(), b"\0\0\x80\x7f" * (len(head_of(data)[1]) // 4)),
    "an empty tensor more": more("score"),
    "a buffer of 8-bit floats": more("transformer.h.0.attn.attention.masked_bias", dtype="F8_E4M3"),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    name: str
    of: Callable[[], Path]
    file: str
    commands: list[list[str]]
    flips: int
    codes: frozenset[int]
    """Where the file is broken."""


def kinds() -> list[Kind]:
    hf = sound.HF
    compared = [
        ["verify", hf, "src", "--effort", "quick"],
        ["verify", "src", hf, "--effort", "quick"],
        ["explain", "src", hf],
        ["explain", hf, "src"],
    ]
    return [
        Kind("model.safetensors", sound.hf, "model.safetensors", [*HF, *compared], 60, BROKEN),
        Kind(
            "ledger.safetensors", sound.processed, "ledger.safetensors",
            [["tl-to-hf", "src", "out", "--no-verify", "--reverse", "exact"]], 60, BROKEN,
        ),
        Kind(
            "adapter_model.safetensors", sound.adapter, "adapter_model.safetensors",
            [["hf-to-tl", hf, "out", "--no-verify", "--adapter", "src"]], 20, BROKEN,
        ),
    ]  # fmt: skip


def inputs() -> Iterator[Input]:
    for kind in kinds():
        turn = 0
        for name, damage in {**NONSENSE, **BREAKS}.items():
            codes = kind.codes
            if kind.name != "model.safetensors" and re.search("name|integers|size of dtype", name):
                codes = EITHER  # more than is needed; or the digests tell that it is as it was
            yield _input(kind, name, damage, turn, codes)
            turn += 1
        for name, damage in MAY_BE.items():
            yield _input(kind, name, damage, turn, frozenset({0, 1, 3}))
            turn += 1
        for seed in range(kind.flips):
            name, damage = f"header, seed {seed}", flipped(seed, 0, 2000)
            yield _input(kind, name, damage, turn, frozenset({0, 1, 3}))
            turn += 1
        for name, other in NO_FILE.items():
            yield _replaced(kind, name, other, turn)
            turn += 1


def _input(kind: Kind, name: str, damage: Bytes, turn: int, codes: frozenset[int]) -> Input:
    command = kind.commands[turn % len(kind.commands)]
    if command[0] != "verify":
        codes = codes - {1} or codes

    def make(place: Path) -> list[str]:
        rewrite(sound.copied(kind.of, place / "src") / kind.file, damage)
        return sound.filled(command)

    return Input(kind.name, name, make, codes)


def _replaced(kind: Kind, name: str, other: Callable[[Path], object], turn: int) -> Input:
    def make(place: Path) -> list[str]:
        replace(sound.copied(kind.of, place / "src") / kind.file, other)
        return sound.filled(kind.commands[turn % len(kind.commands)])

    return Input(kind.name, name, make, BROKEN)
