"""Does the tokenizer beside the weights fit their vocabulary, and does it need code of its own? Its
files are read, never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from converter.checkpoint.files import read_json
from converter.errors import NeoconvertError
from converter.strict_json import Json

_MAX_TEXT_BYTES = 64 * 2**20


def misfit(files: list[Path], d_vocab: int) -> str | None:
    """A sentence where the tokenizer has a token that the embedding has no row for, or cannot be
    read; None where all fits, or nothing is known of it.

    Args:
        files: the tokenizer's files, by their usual names.
        d_vocab: rows of the embedding.
    """
    for path in files:
        try:
            largest = max(_ids(path), default=-1)
        except (NeoconvertError, OSError, ValueError) as error:
            reason = error.what if isinstance(error, NeoconvertError) else str(error)
            return (
                f"{path.name} cannot be read, and was copied as it is: {reason.rstrip('.')[:120]}"
            )
        if largest >= d_vocab:
            return (
                f"the tokenizer does not fit the weights: {path.name} has token {largest}, the"
                f" embedding has rows 0 to {d_vocab - 1}"
            )
    return None


def own_code(files: list[Path], config: Json | None) -> list[str]:
    """A sentence for each config that names code of its own beside it: other code than the library's
    is neither run nor copied.

    Args:
        files: the tokenizer's files. config: config.json.
    """
    said = {"config.json": config or {}}
    for path in files:
        if path.name == "tokenizer_config.json":
            with suppress(NeoconvertError):
                said[path.name] = read_json(path)
    found = []
    for name, document in said.items():
        classes = document.get("auto_map")
        listed = list(classes.values()) if isinstance(classes, dict) else [classes]
        each = [c for entry in listed for c in (entry if isinstance(entry, list) else [entry])]
        # owner/name--module.Class is another repository's code.
        modules = {c.rpartition(".")[0] for c in each if isinstance(c, str) and "--" not in c}
        if code := ", ".join(f"{module}.py" for module in sorted(modules)):
            found.append(
                f"{name} names code of its own, {code[:120]}: it is neither run nor copied"
            )
    return found


def _ids(path: Path) -> Iterator[int]:
    if path.name == "vocab.txt":  # one token a line, as BERT's
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise ValueError("it is over 64 MiB")
        with open(path, "rb") as file:
            yield sum(1 for line in file if line.strip()) - 1
    elif path.name in ("vocab.json", "added_tokens.json"):
        yield from _integers(read_json(path).values())
    elif path.name == "tokenizer.json":
        document = read_json(path)
        model, added = document.get("model"), document.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield from _integers(vocabulary.values())
        elif isinstance(vocabulary, list):  # Unigram: a list of tokens and their scores
            yield len(vocabulary) - 1
        tokens = added if isinstance(added, list) else []
        yield from _integers(token.get("id") for token in tokens if isinstance(token, dict))


def _integers(values: Any) -> Iterator[int]:
    return (value for value in values if isinstance(value, int))
