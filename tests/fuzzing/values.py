"""Mutations of JSON: of the values that it holds, and now and then of its text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 8, 255, 2**16, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400,
    0.5, 1.0, -0.0, 1e-5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "1", "global", "local", "NaN", "\0", "\x1b[2J", "\ud800", "\u202e", "e\u0301", "x" * 300, "..",
    "../x", "/etc/passwd", "a\nb", "{name}", "(a+)+", [], {}, [[]], [None], [[["global"], 2]], {"": {}},
]  # fmt: skip
_DEEP = 3000
Change = Callable[[Any, random.Random], Any]


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A JSON document with one value of it changed, or its text."""
    if rng.random() < 0.85:
        try:
            value = json.loads(data)
            return dumped(changed(value, rng))
        except (ValueError, RecursionError):
            pass
    return text_mutated(data, rng)


def changed(value: Any, rng: random.Random) -> Any:
    """A value with something in it changed: itself, or what a list or an object of it holds."""
    places = _places(value)
    if not places or rng.random() < 0.02:
        return _other(value, rng)
    holder, key = rng.choice(places)
    rng.choice(_CHANGES)(holder, key, rng)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every list or object, with an index or a key of it."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder)) if isinstance(holder, list) else []  # fmt: skip
        found += [(holder, key) for key, _ in items]
        waiting += [child for _, child in items if isinstance(child, (dict, list))]
    return found


def _other(value: Any, rng: random.Random) -> Any:
    """A value like this one, or an odd one."""
    if rng.random() < 0.5:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            steps: list[Callable[[Any], Any]] = [
                lambda n: n + 1, lambda n: n - 1, lambda n: -n, lambda n: n * 2, lambda n: n / 2, str,
                lambda n: n * 1.0, lambda n: n * 10**12,
            ]  # fmt: skip
            try:
                return rng.choice(steps)(value)
            except OverflowError:
                return 0
        if isinstance(value, str) and value:
            at = rng.randrange(len(value))
            return rng.choice((value[:at], value[at:], value * 2, value.upper(), value[:at] + rng.choice("\0/.*{}é%\n 0") + value[at:]))  # fmt: skip
    return rng.choice(_ODD)


def _set(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = _other(holder[key], rng)


def _drop(holder: Any, key: Any, _rng: random.Random) -> None:
    del holder[key]


def _swap(holder: Any, key: Any, rng: random.Random) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


def _wrap(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    holder[key] = rng.choice(([value], [value, value], {"a": value}, {str(key): value}))


def _unwrap(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    if isinstance(value, (list, dict)) and value:
        holder[key] = rng.choice(list(value.values()) if isinstance(value, dict) else value)


def _again(holder: Any, key: Any, rng: random.Random) -> None:
    """The same value in another place too."""
    if isinstance(holder, dict):
        holder[f"{_other(str(key), rng)}"] = holder[key]
    else:
        holder.insert(rng.randrange(len(holder) + 1), holder[key])


def _rename(holder: Any, key: Any, rng: random.Random) -> None:
    if isinstance(holder, dict):
        value = holder.pop(key)
        holder[f"{_other(str(key), rng)}"] = value


def _many(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = [holder[key]] * rng.choice((0, 2, 100, 3000))


def _deep(holder: Any, key: Any, rng: random.Random) -> None:
    for _ in range(rng.choice((2, 20, 400, 700, 900))):
        holder[key] = [holder[key]]


_CHANGES: list[Callable[[Any, Any, random.Random], None]] = [
    _set, _set, _set, _set, _drop, _swap, _wrap, _unwrap, _again, _rename, _many, _deep,
]  # fmt: skip
_PIECES = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\0", b"\n", b"\xff", b"\xef\xbb\xbf", b"-", b"e9", b"NaN", b"-Infinity", b"null", b"\\ud800", b"[" * _DEEP, b"9" * 5000)  # fmt: skip


def text_mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a piece put in, taken out, repeated or changed."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    near = min(len(data), at + rng.randint(1, 12))
    return rng.choice(
        (
            data[:at] + rng.choice(_PIECES) + data[at:],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data[:at] + data[near:],
            data[:to] + data[at:to] + data[to:],
            data[:at],
        )
    )
