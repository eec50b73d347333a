"""Pickles: what runs code, what expands, what is no state dict."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from converter.checkpoint.hf_config import from_hf
from converter.layout import expand
from tests.hostile import sound
from tests.hostile.damage import NO_FILE, NONSENSE, cut, flipped, replace
from tests.hostile.json_files import EITHER
from tests.hostile.trial import Input
from tests.models import TINY

ALLOWED = ["hf-to-tl", "src", "out", "--no-verify", "--allow-pickle"]
FILE = "pytorch_model.bin"


class Runs:
    """Calls a function when it is opened."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _state() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(sound.hf() / "model.safetensors")


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _zipped(parts: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _archive(data: bytes, **more: bytes) -> bytes:
    """As torch.save lays it out, with another pickle in it."""
    parts = {"archive/data.pkl": data, "archive/byteorder": b"little", "archive/version": b"3\n"}
    return _zipped(parts | {f"archive/{name}": value for name, value in more.items()})


def _spoiled(name: str, value: Callable[[torch.Tensor], Any]) -> Callable[[], bytes]:
    def make() -> bytes:
        state = _state()
        state[name] = value(state[name])
        return _saved(state)

    return make


_RUN = b"cposix\nsystem\n(X\x09\0\0\0touch rantR."
_TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
    b"X\x01\0\0\x000X\x03\0\0\0cpu%stQK\0(%st(%st\x89ccollections\nOrderedDict\n)RtR."
)


def _integer(value: int) -> bytes:
    raw = pickle.dumps(value, 2)
    return raw[2:-1]


def _tensor(count: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A tensor whose shape, strides and storage say what they like, with 4 bytes behind it."""
    sizes = b"".join(map(_integer, shape)), b"".join(map(_integer, strides))
    code = _TENSOR % (_integer(count), *sizes)
    return _archive(b"\x80\x02" + code, **{"data/0": b"\0\0\x80?"})


def _laughs() -> Any:
    """Lists of lists of lists, each twice ten times: 10**9 items when they are walked."""
    inner: Any = [torch.zeros(1)]
    for _ in range(9):
        inner = [inner] * 10
    return inner


def _circle() -> Any:
    around: dict[str, Any] = {}
    around["again"] = around
    return around


CODE: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: _saved({"a": Runs(os.system, "touch ran")}),
    "eval": lambda: _saved({"a": Runs(eval, "open('ran', 'w')")}),
    "exec": lambda: _saved({"a": Runs(exec, "open('ran', 'w')")}),
    "getattr": lambda: _saved({"a": Runs(getattr, dict, "fromkeys")}),
    "torch.hub.load": lambda: _saved({"a": Runs(torch.hub.load, ".", "m")}),
    "torch.load in torch.load": lambda: _saved({"a": Runs(torch.load, "x")}),
    "open": lambda: _saved({"a": Runs(open, "ran", "w")}),
    "the opcode of a call": lambda: _archive(_RUN),
    "a call in an old file": lambda: _RUN,
    "a call in an old file of torch": lambda: _saved({"a": Runs(os.system, "touch ran")}, _use_new_zipfile_serialization=False),
    "a whole module": lambda: _saved(torch.nn.Linear(2, 2)),
    "an import of a module beside it": lambda: _archive(b"\x80\x02cnumpy_\nx\n."),
}  # fmt: skip
BROKEN: dict[str, Callable[[], bytes]] = {
    **{f"cut at {share:.0%}": (lambda s: lambda: cut(s)(_saved(_state())))(share) for share in (0.01, 0.5, 0.99)},
    "compressed": lambda: _zipped({"archive/data.pkl": b"\0" * 10**8}, zipfile.ZIP_DEFLATED),
    "compressed otherwise": lambda: _zipped({"archive/data.pkl": b"\0" * 10**7}, zipfile.ZIP_LZMA),
    "an archive without a pickle": lambda: _zipped({"archive/version": b"3\n"}),
    "an archive of nothing": lambda: _zipped({}),
    "an archive of 20,000 entries": lambda: _zipped({f"archive/{i}": b"" for i in range(20_000)}),
    "entries out of the directory": lambda: _zipped({"../../ran": b"", "archive/data.pkl": b"\x80\x02}."}),
    "a TorchScript program": lambda: _archive(b"\x80\x02}.", **{"constants.pkl": b"\x80\x02)."}),
    "a pickle that ends": lambda: _archive(b"\x80\x02}"),
    "a pickle of nothing": lambda: _archive(b""),
    "a pickle of a gigabyte's promise": lambda: _archive(b"\x80\x02X\xff\xff\xff\x7fabc."),
    "a frame of an exabyte": lambda: _archive(b"\x80\x04\x95" + b"\xff" * 7 + b"\x0f."),
    "a million marks": lambda: _archive(b"\x80\x02" + b"(" * 10**6 + b"."),
    "lists 100,000 deep": lambda: _archive(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "tuples 100,000 deep": lambda: _archive(b"\x80\x02)" + b"\x85" * 10**5 + b"."),
    "a memo of 2**31": lambda: _archive(b"\x80\x02}r\xff\xff\xff\x7f."),
    "a storage of a terabyte": lambda: _tensor(2**38, (2**38,), (1,)),
    "a tensor of a terabyte": lambda: _tensor(1, (2**38,), (1,)),
    "a tensor beyond its storage": lambda: _tensor(1, (4, 4), (4, 1)),
    "one element a terabyte of times": lambda: _tensor(1, (2**19, 2**19), (0, 0)),
    "negative strides": lambda: _tensor(1, (2, 2), (-1, -1)),
    "negative dimensions": lambda: _tensor(1, (-1, 1), (1, 1)),
    "sizes of 2**63": lambda: _tensor(1, (2**63, 1), (1, 1)),
    "a list": lambda: _saved([1, 2, 3]),
    "a number": lambda: _saved(5),
    "text": lambda: _saved("\x1b[31m"),
    "nothing": lambda: _saved(None),
    "no tensors": lambda: _saved({"a": {}, "b": []}),
    "ten to the ninth by reference": lambda: _saved(_laughs()),
    "a circle": lambda: _saved(_circle()),
    "a dict 200 deep": lambda: _saved(_deep(200)),
    "a million keys": lambda: _saved({str(i): i for i in range(10**6)}),
    "names of numbers": lambda: _saved(dict(enumerate(_state().values()))),
    "names of escape sequences": lambda: _saved({f"\x1b]0;x\x07{n}\n   do: rm": t for n, t in _state().items()}),
    **{
        f"a weight that is {name}": _spoiled("transformer.wte.weight", value)
        for name, value in {
            "of integers": lambda t: t.int(),
            "of complex numbers": lambda t: t.to(torch.complex64),
            "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "sparse": lambda t: t.to_sparse(),
            "sparse by rows": lambda t: t.to_sparse_csr(),
            "on no device": lambda t: t.to("meta"),
            "nested": lambda t: torch.nested.nested_tensor([t]),
            "a number": lambda _: 3,
            "nothing": lambda _: None,
            "turned": lambda t: t.T,
            "of another shape": lambda t: t[:5],
            "a code": lambda _: Runs(os.system, "touch ran"),
        }.items()
    },
}  # fmt: skip


def _deep(depth: int) -> Any:
    inner: Any = {"x": torch.zeros(1)}
    for _ in range(depth):
        inner = {"x": inner}
    return inner


def inputs() -> Iterator[Input]:
    for name, make in {**CODE, **BROKEN}.items():
        yield _input(name, make, ALLOWED)
    for name, make in CODE.items():
        yield _input(f"{name}, not allowed", make, ALLOWED[:-1])
    for name, change in NONSENSE.items():
        yield _input(name, lambda change=change: change(b""), ALLOWED)  # type: ignore[misc]
    for suffix in (".pt", ".pth", ".ckpt"):
        for name, make in CODE.items():
            command = ["tl-to-hf", f"src/model{suffix}", "out", "--no-verify", "--allow-pickle"]
            yield _input(f"{name}, {suffix}", make, command, f"model{suffix}")
    for seed in range(60):
        damage = flipped(seed)
        yield _input(f"seed {seed}", lambda d=damage: d(_saved(_state())), ALLOWED, codes=EITHER)  # type: ignore[misc]
    for name, other in NO_FILE.items():
        yield _replaced(name, other)
    yield Input(".bin, .pt, .ckpt", "one element expanded to a gigabyte", _expanded)


def _input(
    name: str,
    make: Callable[[], bytes],
    command: list[str],
    file: str = FILE,
    codes: frozenset[int] = frozenset({3}),
) -> Input:
    def write(place: Path) -> list[str]:
        src = sound.copied(sound.hf, place / "src")
        (src / "model.safetensors").unlink()
        (src / "numpy_.py").write_text("open('ran', 'w')")
        (src / file).write_bytes(make())
        return command

    return Input(".bin, .pt, .ckpt", name, write, codes)


def _replaced(name: str, other: Callable[[Path], object]) -> Input:
    def make(place: Path) -> list[str]:
        src = sound.copied(sound.hf, place / "src")
        (src / "model.safetensors").rename(src / FILE)
        replace(src / FILE, other)
        return ALLOWED

    return Input(".bin, .pt, .ckpt", name, make)


def _expanded(place: Path) -> list[str]:
    """As large a model as its config says, and a file of a few bytes."""
    config = TINY | {"vocab_size": 2**24}
    parsed = from_hf(config)
    state = {
        str(slot.name): torch.zeros(1).expand(*slot.shape)
        for slot in expand("hf", parsed.sizes, parsed.n_layers).values()
        if slot.name not in (None, "lm_head.weight")
    }
    (place / "src").mkdir()
    (place / "src/config.json").write_text(json.dumps(config))
    torch.save(state, place / "src" / FILE)
    return ALLOWED
