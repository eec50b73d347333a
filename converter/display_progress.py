"""What is being done, on stderr: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from converter.output import inert, shown
from converter.progress import Progress, silent
from converter.wording import duration, size

SECONDS = 60.0
"""Between two lines where there is no terminal."""
_BAR, _PACE = 10, 46
"""Columns of the terminal."""


class Pace:
    """How far a phase is, how fast it goes, and how long it will take."""

    def __init__(self) -> None:
        self._total = self._done = self._base = 0
        self._begun = time.monotonic()

    def at(self, done: int, total: int) -> str:
        """Bytes, rate and time left; nothing where bytes are not counted."""
        now = time.monotonic()
        if total != self._total or done < self._done:  # another phase
            self._total, self._begun, self._base = total, now, done
        self._done = done
        if not total:
            return ""
        said = f"{size(done)} of {size(total)}"
        seconds, moved = now - self._begun, done - self._base
        if seconds < 1 or moved <= 0:
            return said
        left = seconds * (total - done) / moved
        return f"{said} · {size(round(moved / seconds))}/s · {duration(left)} left"


@contextmanager
def shown_on(console: Console) -> Iterator[Progress]:
    """A function that tells a person what is going on."""
    if console.quiet:
        yield silent
    elif console.is_terminal:
        yield from _bar(console)
    else:
        yield _lines(console)


def _bar(console: Console) -> Iterator[Progress]:
    columns = bars.TextColumn("{task.description}"), bars.BarColumn(_BAR), _PaceColumn()
    pace, room = Pace(), min(48, max(16, console.width - _BAR - _PACE - 2))
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading headers".ljust(room), total=None, pace="")

        def report(what: str, done: int = 0, total: int = 0) -> None:
            description = shown(_fitting(what, room))
            bar.tasks[0].total = total or None  # update() cannot make it unknown again
            bar.update(task, description=description, completed=done, pace=pace.at(done, total))

        yield report


def _fitting(what: str, room: int) -> str:
    """Of a long name, its beginning and its end."""
    if len(what) > room:
        what = f"{what[: room // 3]}…{what[room // 3 + 1 - room :]}"
    return what.ljust(room)


class _PaceColumn(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        return Text(str(task.fields["pace"]), no_wrap=True)


def _lines(console: Console) -> Progress:
    pace, last = Pace(), time.monotonic()

    def report(what: str, done: int = 0, total: int = 0) -> None:
        nonlocal last
        said, now = pace.at(done, total), time.monotonic()
        if now - last >= SECONDS:
            last = now
            line = f"{what}: {said}" if said else what
            console.print(inert(line), markup=False, highlight=False, soft_wrap=True)

    return report
