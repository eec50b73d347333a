"""Mutations of a protocol buffer, by its own description of its fields."""

from __future__ import annotations

import random
from typing import Any

from tests.fuzzing import values

_NUMBERS = [0, 1, 2, -1, 3, 7, 10, 11, 16, 255, 2**20, 2**31 - 1, 2**31, 2**62, -(2**63)]
_TEXTS = [
    "", "input_ids", "logits", "attention_mask", "position_ids", "past_key_values.0.key", "present.0.value",
    "Identity", "If", "Loop", "Cast", "MatMul", "Gemm", "com.microsoft", "my.ops", "location", "offset", "length",
    "../x", "model.onnx", "/etc/passwd", "..", "9" * 30, "-1", "1e3", "\0", "\u202e", "x" * 300, "{", "{}", "[]",
    "neoconvert.config", "neoconvert.provenance", "neoconvert.dialect", "neoconvert", "transB", "axis",
]  # fmt: skip


def mutated(message: Any, rng: random.Random) -> None:
    """Change one field of the message, or of one somewhere inside it."""
    holder = _inside(message, rng)
    fields = [f for f, _ in holder.ListFields()]
    if not fields or rng.random() < 0.15:
        fields = list(holder.DESCRIPTOR.fields)
    field = rng.choice(fields)
    if field.is_repeated:
        _repeated(getattr(holder, field.name), field, message, rng)
    elif field.message_type is not None:
        _message(holder, field, message, rng)
    elif rng.random() < 0.15:
        holder.ClearField(field.name)
    else:
        _put(holder, field, _value(field, getattr(holder, field.name), message, rng))


def _put(holder: Any, field: Any, value: Any) -> None:
    try:
        setattr(holder, field.name, value)
    except (ValueError, TypeError):  # no value of this enumeration, or too large
        holder.ClearField(field.name)


def _inside(message: Any, rng: random.Random) -> Any:
    """A message at any depth, larger ones no more often than small ones."""
    while rng.random() < 0.85:
        found = []
        for field, value in message.ListFields():
            if field.message_type is not None:
                found.append(rng.choice(list(value)) if field.is_repeated else value)
        if not found:
            break
        message = rng.choice(found)
    return message


def _repeated(found: Any, field: Any, root: Any, rng: random.Random) -> None:
    kind = rng.randrange(5)
    at = rng.randrange(len(found)) if len(found) else -1
    if at >= 0 and kind == 0:
        del found[at]
    elif at >= 0 and kind == 1:
        to = rng.randrange(len(found))
        one, two = _copied(found[at]), _copied(found[to])
        _at(found, field, at, two)
        _at(found, field, to, one)
    elif at >= 0 and kind == 2:
        more = rng.choice((1, 1, 2, 50))
        found.extend([_copied(found[at])] * more)
    elif field.message_type is not None:
        other = _like(root, field.message_type, rng)
        if other is not None and at >= 0 and kind == 3:
            found[at].CopyFrom(other)
        elif other is not None:
            found.append(other)
        else:
            found.add()
    else:
        value = _value(field, found[at] if at >= 0 else None, root, rng)
        try:
            if at >= 0:
                found[at] = value
            else:
                found.append(value)
        except (ValueError, TypeError):
            pass


def _at(found: Any, field: Any, index: int, value: Any) -> None:
    if field.message_type is not None:
        found[index].CopyFrom(value)
    else:
        found[index] = value


def _copied(value: Any) -> Any:
    if not hasattr(value, "CopyFrom"):
        return value
    copy = type(value)()
    copy.CopyFrom(value)
    return copy


def _message(holder: Any, field: Any, root: Any, rng: random.Random) -> None:
    other = _like(root, field.message_type, rng)
    if other is None or rng.random() < 0.3:
        holder.ClearField(field.name)
    else:
        getattr(holder, field.name).CopyFrom(other)


def _like(root: Any, kind: Any, rng: random.Random) -> Any:
    """A copy of a message of this kind from somewhere else."""
    for _ in range(20):
        found = _inside(root, rng)
        if found.DESCRIPTOR is kind or found.DESCRIPTOR.full_name == kind.full_name:
            return _copied(found)
    return None


def _value(field: Any, now: Any, root: Any, rng: random.Random) -> Any:
    kinds = type(field)
    if field.cpp_type in (kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE):
        return rng.choice((0.0, 1.0, -1.0, 1e-5, 1e30, float("nan"), float("inf")))
    if field.cpp_type == kinds.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.type == kinds.TYPE_BYTES:
        return values.text_mutated(now or b"", rng)
    if field.cpp_type == kinds.CPPTYPE_STRING:
        return rng.choice(_TEXTS) if rng.random() < 0.5 else _text(root, rng)
    if rng.random() < 0.4 and isinstance(now, int):
        return now + rng.choice((-1, 1, 4, -4))
    return rng.choice(_NUMBERS)


def _text(root: Any, rng: random.Random) -> str:
    """A name from somewhere else: of a value, a node, an operator."""
    for _ in range(20):
        found = [
            value if not field.is_repeated else rng.choice(list(value))
            for field, value in _inside(root, rng).ListFields()
            if field.type == field.TYPE_STRING
        ]
        if found:
            return str(rng.choice(found))
    return ""
