"""Commands killed, or refused by the system, at each of their calls that change files: a Markdown
table. See `tests.crashes`."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import platform
import sys

import click

from converter.cli import main as neoconvert
from tests.crashes import COMMANDS, KILL, SYSTEMS, Crash, states, trial

_STEPS = {KILL: 1, "full": 1, "broken": 1, "full+": 2, "quota": 4, "read-only": 4}
"""For each thing that happens: at every how manieth call. "+": at all calls that write from then on."""
_NEEDED = ["torch", "onnx", "converter.convert", "converter.onnx.export", "converter.verification.report"]  # fmt: skip
Task = tuple[int, str, int, tuple[str, ...]]
Found = tuple[Task, int, list[tuple[str, int, list[str]]]]


def of_command(task: Task) -> Found:
    """All crashes of a command on one kind of system: how, at which call, what does not hold."""
    number, system, every, hows = task
    for name in _NEEDED:
        importlib.import_module(name)
    command, found = COMMANDS[number], []
    known = states(command, system, neoconvert)
    for how in hows:
        step = _STEPS[how]
        if how != KILL and system != SYSTEMS[0]:
            continue
        for at in range(1, known.calls + 1, step * every):
            found.append((how, at, trial(Crash(command, system, how, at), known, neoconvert)))
    return task, known.calls, found


@click.command()
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--only", default="", help="Commands whose name contains this.")
@click.option("--every", default=1, show_default=True, help="Only each so manieth call.")
@click.option("--how", "hows", multiple=True, type=click.Choice(list(_STEPS)), default=list(_STEPS))
def main(jobs: int, only: str, every: int, hows: tuple[str, ...]) -> None:
    tasks = [(n, s, every, hows) for n, c in enumerate(COMMANDS) if only in c.name for s in SYSTEMS]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        found = sorted(pool.imap_unordered(of_command, tasks))
    click.echo(f"| command | calls | {' | '.join(_STEPS)} | wrong |")
    click.echo(f"|---|---|{'---|' * (len(_STEPS) + 1)}")
    for (number, system, *_), calls, crashes in found:
        counts = [str(sum(how == one for how, _, _ in crashes)) for one in _STEPS]
        bad = sum(bool(wrong) for _, _, wrong in crashes)
        name = f"{COMMANDS[number].name}{'' if system == SYSTEMS[0] else ', no exchange'}"
        click.echo(f"| {name} | {calls} | {' | '.join(counts)} | {bad} |")
    every_one = [one for _, _, crashes in found for one in crashes]
    kills = sum(how == KILL for how, _, _ in every_one)
    bad = sum(bool(wrong) for _, _, wrong in every_one)
    click.echo(
        f"\n{kills:,} times killed, {len(every_one) - kills:,} errors injected; {bad} wrong."
        f" {datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}"
    )
    for (number, system, *_), _, crashes in found:
        for how, at, wrong in crashes:
            if wrong:
                click.echo(f"WRONG {COMMANDS[number].name} / {system} / {how} at {at}: {wrong}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
