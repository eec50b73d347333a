"""Reference files: damaged, and damaged by someone who seals them again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from converter.checkpoint.record import SEAL, UNSEALED, sealed
from converter.recorded.file import KEY
from tests.hostile import sound
from tests.hostile.damage import JSON, NO_FILE, NONSENSE, ODD_JSON, Bytes, flipped, replace, rewrite
from tests.hostile.trial import Input
from tests.hostile.weights import BREAKS, MAY_BE, head_of, with_text

KIND, FILE = "reference file", "neo.reference"
BROKEN, ANY = frozenset({3}), frozenset({0, 1, 3})
_SEAL = re.compile(re.escape(SEAL.encode()) + rb"[0-9a-f]{64}")


def inputs() -> Iterator[Input]:
    for name, damage in {**NONSENSE, **BREAKS}.items():
        yield _input(name, damage, BROKEN)
    for name, damage in {**BREAKS, **MAY_BE}.items():
        # What was changed may not be what is needed.
        yield _input(f"sealed: {name}", _sealed(damage), ANY)
    for name, damage in JSON.items():
        yield _input(f"sealed: what it says: {name}", _sealed(_said(damage)), BROKEN)
    for name, damage in ODD_JSON.items():
        yield _input(f"sealed: what it says: {name}", _sealed(_said(damage)), ANY)
    for seed in range(40):
        yield _input(f"seed {seed}", flipped(seed), BROKEN)
        yield _input(f"sealed: seed {seed}", _sealed(flipped(seed)), ANY)
        yield _input(f"sealed: header, seed {seed}", _sealed(flipped(seed, 0, 6000)), ANY)
    for name, other in NO_FILE.items():

        def make(place: Path, other: object = other) -> list[str]:
            replace(sound.copied(sound.reference, place / "src") / FILE, other)  # type: ignore[arg-type]
            return _command()

        yield Input(KIND, name, make, BROKEN)


def _command() -> list[str]:
    return sound.filled(["verify", f"src/{FILE}", sound.HF, "--effort", "quick"])


def _input(name: str, damage: Bytes, codes: frozenset[int]) -> Input:
    def make(place: Path) -> list[str]:
        rewrite(sound.copied(sound.reference, place / "src") / FILE, damage)
        return _command()

    return Input(KIND, name, make, codes)


def _sealed(damage: Bytes) -> Bytes:
    """Sealed again, where there still is a place for it."""

    def change(data: bytes) -> bytes:
        changed = damage(_SEAL.sub(UNSEALED.encode(), data))
        return sealed(changed) if UNSEALED.encode() in changed else changed

    return change


def _said(damage: Bytes) -> Bytes:
    """Of the JSON in its metadata."""

    def change(data: bytes) -> bytes:
        header, body = head_of(data)
        text = damage(header["__metadata__"][KEY].encode()).decode("utf-8", "surrogateescape")
        header["__metadata__"][KEY] = text
        return with_text(json.dumps(header, ensure_ascii=True).encode(), body)

    return change
