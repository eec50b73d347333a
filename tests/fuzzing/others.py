"""Targets beside a model's own files: a reference file, and the card that a model came with."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load, save

from converter import strict_json
from converter.checkpoint import open_checkpoint
from converter.checkpoint.record import UNSEALED, sealed
from converter.model_card import CARD, front_matter
from converter.output import inert
from converter.recorded import file
from tests.fuzzing import values
from tests.fuzzing.target import Target, require
from tests.headers import mutated as header_mutated
from tests.hostile import sound


def _read_reference(data: bytes, place: Path) -> object:
    """What it says can be written again, and then says the same."""
    path, again = place / "neo.reference", place / "again.reference"
    path.write_bytes(data)
    contents = file.read(path)
    again.unlink(missing_ok=True)
    file.write(again, contents, overwrite=False)
    require(_meaning(file.read(again)) == _meaning(contents), "written again, it is another")
    return _meaning(contents)


def _meaning(contents: file.Contents) -> str:
    """Without the order of what has none."""
    recipes = [(replace(r, neutral=frozenset()), sorted(r.neutral)) for r in contents.recipes]
    return repr((replace(contents, recipes=()), recipes))


def _reference_mutated(data: bytes, rng: random.Random) -> bytes:
    """An array of it, or what it says, or its header; and mostly sealed again."""
    kind = rng.random()
    if kind < 0.1:
        return header_mutated(data, rng.getrandbits(64))
    try:
        length = int.from_bytes(data[:8], "little")
        said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][file.KEY])
        arrays: dict[str, Any] = load(data)
        if kind < 0.45:
            name = rng.choice(sorted(arrays))
            arrays[name] = _array_mutated(arrays[name].copy(), rng)
        else:
            said = values.changed(said, rng)
        arrays["seal"] = np.frombuffer(UNSEALED.encode(), np.uint8)
        return sealed(save(arrays, {file.KEY: json.dumps(said)}))
    except Exception:  # it is no reference file any more
        return values.text_mutated(data, rng)


def _array_mutated(array: Any, rng: random.Random) -> Any:
    kind = rng.randrange(4)
    if kind == 0 and array.size and array.dtype == np.float64:
        odd = (0.0, 1.0, -1.0, 0.5, 1e9, 1e300, float("nan"), float("inf"))
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice(odd)
    elif kind == 1:
        array = array[: rng.randrange(len(array) + 1)]
    elif kind == 2:
        array = array.reshape(rng.choice(([-1], [1, -1], array.shape[::-1])))
    else:
        array = array.astype(rng.choice(("f8", "f4", "i8", "u1")))
    return array


_CARD = """---
license: mit
license_name: mine
language:
- en
datasets: [a/b, c]
tags: &t [x]
more: *t
---

# A model
"""


def _read_card(data: bytes, place: Path) -> object:
    """What is handed on are words, and YAML that reads as it was meant."""
    source = place / "src"
    (source / CARD).write_bytes(data)
    plan: Any = SimpleNamespace(layout="hooked")
    text = front_matter(open_checkpoint(source), plan, None, False)
    said = yaml.safe_load(text)
    require(said["tags"] == ["neoconvert", "gpt_neo", "transformer-lens"], "the tags are others")
    require("base_model" not in said and "more" not in said, "it says what the source may not say")
    require(all(inert(line) == line for line in text.split("\n")), "it acts on a terminal")
    return strict_json.dumps(said)


TARGETS = [
    Target(
        "reference file", lambda: [(sound.reference() / "neo.reference").read_bytes()],
        _reference_mutated, _read_reference,
    ),
    Target(
        "a source's card", lambda: [_CARD.encode()], values.text_mutated, _read_card,
        prepare=lambda place: sound.copied(sound.hf, place / "src"), codes=frozenset(),
    ),
]  # fmt: skip
