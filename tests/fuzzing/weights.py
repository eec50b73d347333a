"""Targets whose files hold weights: safetensors, as we read and as we write it, its index, the ledger,
and what torch.save wrote."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize
from safetensors.numpy import save

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.checkpoint.files import read_json, weight_files
from converter.checkpoint.ledger_file import open_ledger
from converter.checkpoint.pickles import PickleReader
from converter.checkpoint.plan import Plan, Planned
from converter.checkpoint.reader import Reader, SafetensorsReader
from converter.checkpoint.writer import Writer
from converter.dtypes import CODES, sha256
from converter.errors import BadInput
from converter.models import to_state_dict
from converter.processing.unit_ledger import UnitLedger
from tests import headers
from tests.fuzzing import pickled, values
from tests.fuzzing.target import Target, require
from tests.hostile import sound

_INDEX = "model.safetensors.index.json"


def digests(reader: Reader) -> dict[str, str]:
    """Every tensor's bytes, by name."""
    return {name: sha256(reader.read(name)) for name in reader.tensors}


def _read_index(data: bytes, place: Path) -> object:
    path = place / "src" / _INDEX
    path.write_bytes(data)
    files = weight_files(place / "src")
    for file in files.weights:
        require(file.resolve().parent == path.resolve().parent, f"{file} is no file beside it")
    readers = files.open(allow_pickle=False)
    said = read_json(path)["weight_map"]
    lost = [name for name in said if name not in files.promised]
    require(not lost or (lost[0].endswith("lm_head.weight") and len(lost) == 1), "it says more")
    kept = {name: file for name, file in said.items() if name not in lost}
    require({name: file.name for name, file in files.promised.items()} == kept, "it says otherwise")
    for name, file in files.promised.items():
        (reader,) = (r for r in readers if name in r.tensors or name in r.other)
        require(isinstance(reader, SafetensorsReader) and reader.path == file, f"{name} is elsewhere")  # fmt: skip
    return files.promised


def _read_header(data: bytes, place: Path) -> bytes:
    accepted, parted = headers.disagreement(data, place / "x.safetensors")
    require(not parted, parted)
    SafetensorsReader(place / "x.safetensors")  # says why it is not accepted
    assert accepted
    return data


def _header_mutated(data: bytes, rng: random.Random) -> bytes:
    return headers.mutated(data, rng.getrandbits(64))


_WRITTEN: list[list[Any]] = [
    ["a", "F32", [2, 3], 0], ["b.weight", "F16", [4], 0], ["\u00e9 \"\\", "BF16", [1, 0, 2], 1],
    ["c" * 90, "F64", [], 0],
]  # fmt: skip


def _read_written(data: bytes, place: Path) -> object:
    """What is written from a plan is what the library reads, and we."""
    path = place / "plan.json"
    path.write_bytes(data)
    tensors = []
    for entry in read_json(path).values():
        name, code, shape, shard = (*entry, None, None, None, None)[:4] if isinstance(entry, list) else ("",) * 4  # fmt: skip
        fits = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 9 for n in shape)  # fmt: skip
        if name != "__metadata__" and isinstance(name, str) and code in list(CODES) and fits:
            file = f"{shard == 1}.safetensors"
            tensors.append(Planned(None, name, code, tuple(shape), None, file))  # type: ignore[arg-type]
    tensors = list({t.name: t for t in tensors if _is_text(t.name)}.values())
    shards = tuple(dict.fromkeys(t.shard for t in tensors))
    plan = Plan("hf", None, False, tuple(tensors), shards, {})  # type: ignore[arg-type]
    rng = np.random.default_rng(len(data))
    arrays = {t.name: rng.integers(0, 256, t.nbytes, np.uint8).view(CODES[t.code]).reshape(t.shape) for t in tensors}  # fmt: skip
    for old in place.glob("*.safetensors"):
        old.unlink()
    with Writer(place, plan) as writer:
        for tensor in tensors:
            writer.write(tensor, arrays[tensor.name])
    for shard in shards:
        content = (place / shard).read_bytes()
        require(hashlib.sha256(content).hexdigest() == writer.files[shard], "its digest is another's")  # fmt: skip
        theirs: dict[str, Any] = dict(deserialize(content))  # type: ignore[no-untyped-call]
        ours = SafetensorsReader(place / shard)
        require(set(theirs) == {t.name for t in tensors if t.shard == shard}, "a name is lost")
        for name, found in theirs.items():
            raw = arrays[name].tobytes()
            require(bytes(found["data"]) == raw == ours.read(name).tobytes(), f"{name} is another")
            require(list(found["shape"]) == list(arrays[name].shape), f"{name} has another shape")
    return writer.sha256


def _is_text(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _read_ledger(data: bytes, place: Path) -> object:
    """As undoing reads it."""
    source = place / "src"
    (source / "ledger.safetensors").write_bytes(data)
    ledger = open_ledger(source)
    assert ledger is not None
    for prefix, unit in ledger.units.items():
        again = UnitLedger.of_json(json.loads(json.dumps(unit.to_json())), prefix, {})
        require(repr(again) == repr(unit), f"written again, {prefix!r} is another")
    opened: Checkpoint = open_checkpoint(source)
    state: Mapping[str, Any] = to_state_dict(opened, layout="hf")
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def _ledger_mutated(data: bytes, rng: random.Random) -> bytes:
    """What the ledger says; or an array of it, its digest put right; or the file's own header."""
    kind = rng.random()
    if kind < 0.2:
        return _header_mutated(data, rng)
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        meta = json.loads(header["__metadata__"]["ledger"])
        arrays = {name: _array(found) for name, found in deserialize(data)}  # type: ignore[no-untyped-call]
        if kind < 0.5:
            name = rng.choice(sorted(arrays))
            changed = _array_mutated(arrays[name], rng)
            arrays[name] = changed
            for unit in meta["units"].values():
                if name in unit["arrays"]:
                    unit["arrays"][name] = sha256(changed)
        else:
            meta = values.changed(meta, rng)
        return save(arrays, metadata={"ledger": json.dumps(meta)})
    except Exception:  # it is no ledger any more
        return values.text_mutated(data, rng)


def _array(found: Any) -> np.ndarray:
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2"}  # fmt: skip
    return np.frombuffer(bytes(found["data"]), kinds[found["dtype"]]).reshape(found["shape"])


def _array_mutated(array: np.ndarray, rng: random.Random) -> np.ndarray:
    result = array.copy()
    kind = rng.randrange(5)
    if kind == 0 and result.size:
        result.reshape(-1)[rng.randrange(result.size)] = rng.choice((0, 1, 2, 7, 127))
    elif kind == 1 and result.size:
        raw = result.reshape(-1).view(np.uint8)
        raw[rng.randrange(raw.size)] = rng.randrange(256)
    elif kind == 2:
        result = result.reshape(-1)[: rng.randrange(result.size + 1)]
    elif kind == 3:
        result = result.reshape(rng.choice(([-1], [1, -1], result.shape[::-1])))
    else:
        result = result.astype(rng.choice(("f8", "f4", "f2", "i8", "u1")))
    return result


def _read_pickle(data: bytes, place: Path) -> object:
    path = place / "pytorch_model.bin"
    path.write_bytes(data)
    reader = PickleReader(path)
    found = digests(reader)
    with suppress(BadInput):
        open_checkpoint(path, allow_pickle=True, cfg=sound.hf() / "config.json")
    return found


TARGETS = [
    Target("model.safetensors", lambda: [headers.sound()], _header_mutated, _read_header),
    Target(
        "written safetensors", lambda: [values.dumped({str(i): e for i, e in enumerate(_WRITTEN)})],
        values.mutated, _read_written,
    ),
    Target(
        "model.safetensors.index.json", lambda: [(sound.sharded() / _INDEX).read_bytes()],
        values.mutated, _read_index, prepare=lambda place: sound.copied(sound.sharded, place / "src"),
    ),
    Target(
        "ledger.safetensors", lambda: [(sound.processed() / "ledger.safetensors").read_bytes()],
        _ledger_mutated, _read_ledger, prepare=lambda place: sound.copied(sound.processed, place / "src"),
    ),
    Target("pickles", pickled.seeds, pickled.mutated, _read_pickle),
]  # fmt: skip
