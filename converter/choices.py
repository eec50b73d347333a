"""The values that options take: a wrong one is refused by name, with what there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

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

Command = Literal["hf-to-tl", "tl-to-hf", "bake", "export-onnx"]
"""Those that convert."""
LensLayout = Literal["hooked", "bridge"]
"""TransformerLens's."""
Reverse = Literal["auto", "exact", "functional"]
"""How processing is undone."""
LedgerKind = Literal["compact", "exact"]
LedgerOption = Literal[LedgerKind, "none"]
Format = Literal["safetensors", "onnx"]
GraphWeights = Literal["shared", "external", "inline"]
"""Where a graph's weights are."""
Client = Literal["transformers-js"]
Check = Literal["weights", "function"]
Effort = Literal["quick", "standard", "thorough"]
RuntimeName = Literal["torch", "onnxruntime"]


def one_of(value: Any, choices: Collection[str], option: str) -> None:
    """
    Raises:
        UsageError: the value is none of the choices; the message offers the nearest.
    """
    if isinstance(value, str) and value in choices:
        return
    raise UsageError(
        f"{value!r} is no value of {_keyword(option)}.",
        where=f"{option} {value}",
        do=f"{meant(str(value).lower(), choices)}Choose from {', '.join(choices)}.",
    )


def meant(
    given: str,
    known: Iterable[str],
    *,
    written: Callable[[str], str] = str,
    most: int = 1,
    alike: float = 0.5,
) -> str:
    """What a name that is not known may stand for: "Did you mean …? ", or "" where none is like it.

    Args:
        written: how a name is to be typed.
        most: names.
        alike: from 0 to 1, as `difflib` has it.
    """
    near = get_close_matches(given, list(known), n=most, cutoff=alike)
    return f"Did you mean {' or '.join(map(written, near))}? " if near else ""


def of_kind(value: Any, kinds: type | tuple[type, ...], option: str, do: str) -> None:
    """
    Raises:
        UsageError: the value is of another kind; `do` says what to give. A word such as "no"
            must not count as true.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise UsageError(
            f"{_keyword(option)} is {value!r}, of type {type(value).__name__}.",
            where=f"{option} {value}",
            do=do,
        )


def place(value: Any, option: str, do: str) -> Path:
    """A path as a user writes it, `~` for the home directory as a shell has it.

    Raises:
        UsageError: it is none; or empty, as a variable is that was never set, which must not mean
            the current directory.
    """
    of_kind(value, (str, os.PathLike), option, do)
    text = os.fspath(value)
    if not text or "\0" in text:
        raise UsageError(
            f"{_keyword(option)} is {text!r}, which names no place.", where=f"{option} {text!r}", do=do
        )  # fmt: skip
    return Path(os.path.expanduser(text))


def seed_of(value: Any) -> int:
    """
    Raises:
        UsageError: the value is no seed of random numbers.
    """
    do = "Give a whole number, 0 or more, of at most 63 bits."
    of_kind(value, Integral, "seed", do)
    if not 0 <= value < 2**63:
        raise UsageError(f"seed is {value}.", where="seed", do=do)
    return int(value)


def flags(option_values: Mapping[str, Any]) -> None:
    """
    Raises:
        UsageError: one of these values, by option, is neither True nor False.
    """
    for option, value in option_values.items():
        of_kind(value, bool, option, "Give True or False.")


def _keyword(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
