"""Mutations of what torch.save writes: of the archive's entries, and of the pickle's instructions."""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import random
import zipfile
from typing import Any

import torch

from tests.fuzzing import values
from tests.hostile import sound

_GLOBALS = [
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch\nHalfStorage\n",
    b"ctorch\nLongStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"cargparse\nNamespace\n", b"ctorch\nSize\n", b"ctorch\ndevice\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cbuiltins\nbytearray\n",
    b"ctorch\nfloat16\n", b"cnumpy\ndtype\n", b"ccollections\nCounter\n", b"ctypes\nSimpleNamespace\n",
    b"cpathlib\nPosixPath\n", b"ctransformers.models.gpt_neo.configuration_gpt_neo\nGPTNeoConfig\n",
]  # fmt: skip
_MOST = 2**16


def seeds() -> list[bytes]:
    from safetensors.torch import load_file

    state = load_file(sound.hf() / "model.safetensors")
    config = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "model_type": "gpt_neo"}
    small: dict[str, Any] = {name: state[name] for name in sorted(state)[:3]}
    few = small | {"half": torch.ones(2, 3).half().T, "buffer": torch.ones(2, dtype=torch.bool)}
    bundle = {
        "state_dict": few, "args": argparse.Namespace(lr=0.1, steps=3), "config": config, "epoch": 3,
        "text": '{"n_layers": 2}', "list": [torch.zeros(()), {"a": torch.nn.Parameter(torch.ones(2))}],
    }  # fmt: skip
    kinds = [(state, True), (few, True), (bundle, True), (few, False)]
    return [_saved(content, new) for content, new in kinds]


def _saved(content: Any, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The archive with something about an entry changed; or, where it is none, the pickle."""
    if rng.random() < 0.1:
        return values.text_mutated(data, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:
        return _pickle_mutated(data, rng)
    at = rng.randrange(len(parts)) if parts else -1
    code = next((i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl")), at)
    kind, packed = rng.random(), zipfile.ZIP_STORED
    if at < 0:
        return data[: rng.randrange(len(data) + 1)]
    name, content = parts[at]
    if kind < 0.75:
        parts[code] = parts[code][0], _pickle_mutated(parts[code][1], rng)
    elif kind < 0.8:
        parts[at] = name, values.text_mutated(content[:_MOST], rng)
    elif kind < 0.84:
        parts[at] = name, content[: rng.randrange(len(content) + 1)]
    elif kind < 0.88:
        del parts[at]
    elif kind < 0.92:
        parts.append((name, content))
    elif kind < 0.96:
        parts[at] = rng.choice(("archive/data/0", "archive/data.pkl", "x", "../x", "archive/byteorder", "archive/constants.pkl", "archive/.format_version", "data.pkl")), content  # fmt: skip
    else:
        packed = zipfile.ZIP_DEFLATED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return buffer.getvalue()


def _pickle_mutated(data: bytes, rng: random.Random) -> bytes:
    """An instruction left out, repeated, moved, or with another operand; a pickle is a program."""
    ends: list[int] = []
    try:
        for _, _, position in pickletools.genops(data[:_MOST]):
            assert position is not None
            ends.append(position)
    except Exception:
        pass
    if len(ends) < 4:
        return values.text_mutated(data, rng)
    i = rng.randrange(1, len(ends) - 1)
    begin, end = ends[i], ends[i + 1]
    before, piece, after = data[:begin], data[begin:end], data[end:]
    kind = rng.randrange(7)
    if kind == 0:
        return before + after
    if kind == 1:
        return before + piece + piece + after
    if kind == 2:
        j = rng.randrange(1, len(ends) - 1)
        return before + data[ends[j] : ends[j + 1]] + after
    if kind == 3 and piece[:1] in b"c\x93":
        return before + rng.choice(_GLOBALS) + after
    if kind == 4:
        return before + piece[:1] + bytes(rng.randrange(256) for _ in piece[1:]) + after
    odd: Any = rng.choice((0, 1, -1, 2, 3, 2**31, 2**62, 2**64, 1.5, float("nan"), "", "x", "0", "cpu", "cuda:0", "meta", None, True, [], {}, ()))  # fmt: skip
    put = pickle.dumps(odd, 2)[2:-1]
    return before + put + (after if kind == 5 else piece + after)
