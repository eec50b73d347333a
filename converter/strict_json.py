"""JSON from strangers and for them: read no deeper than any file of ours goes, written so that every
reader takes it."""

from __future__ import annotations

import json
import math
from typing import Any

Json = dict[str, Any]
_DEEPEST = 64


def loads(text: str) -> Any:
    """The value, nested so little that whatever walks through it has the stack for it.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(_DEEPEST):
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [x for one in inner for x in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def dumps(document: Any, indent: int | None = None) -> str:
    """Python writes NaN and infinities, which JSON has not: those that a file of someone else's brought
    along become null."""
    try:
        return json.dumps(document, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(document), indent=indent, allow_nan=False)


def file_of(document: Any, indent: int) -> bytes:
    """A file's content. A name that is not UTF-8 is written as JSON's escapes."""
    text = json.dumps(document, indent=indent, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
