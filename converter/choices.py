"""Values that may not be anything: a wrong one is refused by name, with what there is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from converter.errors import UsageError

STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""Processing, in the order in which TransformerLens's `process_weights` carries it out. Each name
is that of a module of `converter.processing`, which holds all that is known of the step."""
DEFAULT_STEPS = STEPS[:4]
"""What TransformerLens's `from_pretrained` does."""


def one_of(value: Any, choices: Collection[str], option: str) -> None:
    """
    Raises:
        UsageError: the value is none of the choices; the message offers the nearest.
    """
    if isinstance(value, str) and value in choices:
        return
    close = get_close_matches(str(value).lower(), choices, n=1, cutoff=0.4)
    raise UsageError(
        f"{value!r} is no value of {_keyword(option)}.",
        where=f"{option} {value}",
        do=f"Did you mean {close[0]}? There are {', '.join(choices)}."
        if close
        else f"Choose from {', '.join(choices)}.",
    )


def of_kind(value: Any, kinds: type | tuple[type, ...], option: str, do: str) -> None:
    """
    Raises:
        UsageError: the value is of another kind; `do` says what to give. A word such as "no"
            must not count as true.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise UsageError(
            f"{_keyword(option)} is {value!r}, a {type(value).__name__}.",
            where=f"{option} {value}",
            do=do,
        )


def flags(option_values: Mapping[str, Any]) -> None:
    """
    Raises:
        UsageError: one of these values, by option, is neither True nor False.
    """
    for option, value in option_values.items():
        of_kind(value, bool, option, "Give True or False.")


def _keyword(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
