"""A value that must be one of a few: refused by name, with the nearest of those there are."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from converter.errors import UsageError


def one_of(value: Any, choices: Collection[str], option: str) -> None:
    """
    Raises:
        UsageError: the value is none of the choices; the message offers the nearest.
    """
    if isinstance(value, str) and value in choices:
        return
    close = get_close_matches(str(value), choices, n=1, cutoff=0.4)
    raise UsageError(
        f"{value!r} is no value of {option.removeprefix('--').replace('-', '_')}.",
        where=f"{option} {value}",
        do=f"Did you mean {close[0]}? There are {', '.join(choices)}."
        if close
        else f"Choose from {', '.join(choices)}.",
    )
