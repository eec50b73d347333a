"""Output that cannot fail, and text from strangers that cannot act."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

LONGEST = 600
"""Characters of one line that is shown of what others wrote."""
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_DRAWING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Moves of the cursor too."""


def inert(text: str, *, keep: str = "", longest: int | None = None) -> str:
    """Text without what acts on a terminal or a page: control characters, marks of direction and
    lone surrogates become visible escapes. `keep`: those that may stay. `longest`: where it ends."""
    if longest and len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 4 :]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _acts(c) else _escape(c) for c in text)


def shown(value: object) -> str:
    """A name or path from elsewhere, for rich: no markup, no control characters."""
    from rich.markup import escape

    return escape(inert(str(value)))


def _acts(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class Steady:
    """A text stream whose writes never raise: what its encoding lacks is escaped, and once it is full
    or closed, the rest goes nowhere. Of escape sequences, a terminal gets colours and styles; all else
    is made visible."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failed = ""
        """What the system said when it could not be written; "": all is well."""
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        if self._stream is None or name == "buffer":  # click would write past us
            raise AttributeError(name)
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def write(self, text: str | bytes, passing: re.Pattern[str] = _STYLE) -> int:
        """`passing`: the escape sequences that a terminal gets."""
        if not isinstance(text, str):
            if not text:  # so click asks whether the bytes must be written past us
                raise TypeError("text is written here")
            text = text.decode(errors="backslashreplace")
        if self._stream is not None and not self.failed:
            try:
                self._stream.write(self._plain(text, passing))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def _plain(self, text: str, passing: re.Pattern[str]) -> str:
        if text.isprintable():
            return text
        if not self.isatty():
            return inert(text, keep="\n\t\r")
        parts = passing.split(text)
        styles = [*passing.findall(text), ""]
        return "".join(
            inert(part, keep="\n\t\r") + style for part, style in zip(parts, styles, strict=True)
        )

    def flush(self) -> None:
        if self._stream is not None and not self.failed:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failed = getattr(error, "strerror", None) or str(error)
        # What is buffered is flushed once more when Python ends, which must not fail either.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # type: ignore[union-attr]
            os.close(nowhere)


class _Drawing:
    def __init__(self, stream: Steady) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(text, _DRAWING)


def drawing(stream: Any) -> Any:
    """The stream for what draws bars, and makes others' text inert itself: the cursor may move."""
    return _Drawing(stream) if isinstance(stream, Steady) else stream


def occupy_standard() -> None:
    """Have stdin, stdout and stderr lead nowhere where they are closed: else the next pipe or file
    that is opened gets their number, and what is printed by number, or by a child, goes into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # all below are taken, so that the next one opened is this
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """stdout and stderr cannot fail while the block runs, whoever writes to them."""
    before = sys.stdout, sys.stderr
    out, err = Steady(sys.stdout), Steady(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        if out.failed and "pipe" not in out.failed.lower():
            err.write(f"Warning: stdout could not be written: {out.failed}.\n")
        err.flush()
        sys.stdout, sys.stderr = before
