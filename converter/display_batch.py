"""What a person sees of a batch, and the lines that a program reads."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.console import Console

from converter.output import LONGEST, drawing, inert, shown

if TYPE_CHECKING:
    from converter.batch import Outcome, Tally
    from converter.display import Display

_MARK = {"converted": "[green]✓[/]", "there": "[dim]=[/]", "planned": "·", "failed": "[red]✗[/]"}


class Showing:
    """One line for each job, how far it is, and the sum."""

    def __init__(self, display: Display, total: int) -> None:
        self.quiet = display.console.quiet
        stderr = Console(file=drawing(sys.stderr), quiet=self.quiet, highlight=False)
        self._bar = bars.Progress(
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeRemainingColumn(),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal or self.quiet,
        )
        # Where the bar is drawn, lines go above it; a pipe gets them all the same.
        drawn = not self._bar.disable and display.console.is_terminal
        self._console = stderr if drawn else display.console
        self._display, self._start, self._done = display, time.monotonic(), 0
        self._task = self._bar.add_task("", total=total, rate="")

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Count, rate and time left, on a terminal only."""
        with self._bar:
            yield

    def _say(self, text: str) -> None:
        self._console.print(inert(text, keep="\n"))

    def outcome(self, outcome: Outcome, same: str | None) -> None:
        job = outcome.job
        what = f"{_MARK[outcome.status]} {shown(job.given)} → {shown(job.output)}"
        said = {"converted": f"{outcome.seconds:.1f} s", "there": "there already"}
        notes = [said.get(outcome.status, outcome.status)]
        if outcome.status == "failed":
            notes = ["transient: may pass" if outcome.transient else "permanent"]
        if same:
            notes.append(f"the weights of {shown(same)}")
        self._say(f"{what}: {', '.join(notes)}")
        if outcome.error:
            lines = [inert(outcome.error[k], longest=LONGEST) for k in ("what", "where", "do")]
            what, where, do = map(shown, lines)
            self._say(f"    line {job.line}: {what}\n      in: {where}\n      do: {do}")
            if self.quiet:
                print(f"Error: line {job.line}: {lines[0]}\n   in: {lines[1]}\n   do: {lines[2]}", file=sys.stderr)  # fmt: skip
        for warning in outcome.warnings:
            self._display.warn(warning)
        self._done += 1
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=f"{rate:.1f}/s")

    def tally(self, tally: Tally) -> None:
        counts, seconds = tally.counts, time.monotonic() - self._start
        words = {
            "converted": "converted",
            "there": "there already",
            "planned": "planned",
            "permanent": "failed for good",
            "transient": "failed for now (run again)",
        }
        parts = [f"{counts[name]} {text}" for name, text in words.items() if counts[name]]
        self._say(f"[bold]{', '.join(parts)}[/], in {seconds:.1f} s")
        if tally.equal:
            most = sum(len(group) - 1 for group in tally.equal)
            have = "1 source has" if most == 1 else f"{most} sources have"
            self._say(f"{have} the weights of another:")
            for group in tally.equal[:10]:
                self._say(f"  {shown(' = '.join(group[:6]))}{' …' if len(group) > 6 else ''}")
