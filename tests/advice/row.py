"""A refusal, what brings it about, and its advice, followed as a user would.

A row is carried out in an empty directory whose name has a space. `ask` makes what is wrong there
and says what is asked for; the refusal must come from the place that the row names. `follow` does
what the last line says, and gives what is asked for next, which must succeed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from converter.cli import main
from converter.errors import NeoconvertError

Asked = list[str] | Callable[[], Any]
"""A command line, or a call of the Python API."""
Follow = Callable[[str, Asked], Asked | None]
"""Of the advice, and what was asked for. None: following it was the test."""


@dataclass(frozen=True)
class Row:
    file: str
    """Below converter/."""
    says: str
    """A constant part of the first line, or, where that is made elsewhere, the function's name."""
    ask: Callable[[], Asked]
    follow: Follow | None = None
    advice: str = ""
    """A part of the last line."""
    why: str = ""
    """Why the advice cannot be followed here."""

    def __post_init__(self) -> None:
        assert (self.follow is None) is bool(self.why), self.says

    @property
    def name(self) -> str:
        return f"{self.file.removesuffix('.py')}: {self.says[:50]}"


class Ran(Exception):
    """A command ended with another exit code than 0."""


def run(asked: Asked) -> None:
    """
    Raises:
        NeoconvertError: of a call. Ran: of a command; what it printed.
    """
    if callable(asked):
        asked()
        return
    result = CliRunner().invoke(main, asked)
    if result.exit_code:
        raise Ran(result.stderr or repr(result.exception))


def refusal(asked: Asked) -> tuple[str, str, str]:
    """The three lines, as they are printed."""
    try:
        run(asked)
    except NeoconvertError as error:
        lines = list(error.lines())
        assert all(line and "\n" not in line for line in lines), lines
    except Ran as ran:
        lines = str(ran).splitlines()
        starts = ["Error: ", "   in: ", "   do: "]
        if len(lines) != 3 or not all(map(str.startswith, lines, starts)):
            raise AssertionError(str(ran)) from ran
        lines = [line[7:] for line in lines]
    else:
        raise AssertionError(f"{asked} was not refused")
    return lines[0], lines[1], lines[2]


def again(change: Callable[[], object] | None = None) -> Follow:
    """Do this, as the advice says, and ask once more."""

    def follow(_: str, asked: Asked) -> Asked:
        if change:
            change()
        return asked

    return follow


def plus(*options: str) -> Follow:
    """Add these options, the first of which the advice names."""

    def follow(do: str, asked: Asked) -> Asked:
        assert isinstance(asked, list)
        assert " ".join(options) in do or options[0] in do, do
        return [*asked, *options]

    return follow


def less(*words: str) -> Follow:
    """Leave these words out."""

    def follow(_: str, asked: Asked) -> Asked:
        assert isinstance(asked, list)
        assert set(words) <= set(asked)
        return [word for word in asked if word not in words]

    return follow


def instead(old: str, new: str = "") -> Follow:
    """A word of the command line is another; without `new`, what stands at the advice's end."""

    def follow(do: str, asked: Asked) -> Asked:
        assert isinstance(asked, list)
        assert old in asked
        words = [new] if new else last_words(do)
        at = asked.index(old)
        return [*asked[:at], words[0], *asked[at + 1 :], *words[1:]]

    return follow


def last_words(do: str) -> list[str]:
    """What stands behind the last colon and space: a place or a command, as a shell reads it."""
    return shlex.split(do.rpartition(": ")[2])


def command(then: Asked | None = None, after: str = ": ", **names: str) -> Follow:
    """Run the command at the advice's end; `names`: what stands for its words in capitals."""

    def follow(do: str, _: Asked) -> Asked | None:
        line = do.partition(after)[2] if after != ": " else do.rpartition(": ")[2]
        shell(line, **names)
        return then

    return follow


def shell(line: str, **names: str) -> None:
    """A command as a user would paste it, with the placeholders filled in."""
    words = [names.get(word, word) for word in shlex.split(line.rstrip("."))]
    if words[0] == "neoconvert":
        run(words[1:])
        return
    if words[0] == "python":
        words[0] = sys.executable
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr[-2000:])


def write(path: str, content: str | bytes) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file
