"""A manifest's lines become jobs by the commands' own options."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from converter import cli_defaults
from converter.choices import Command, meant
from converter.cli_running import request_of, require_report
from converter.errors import NeoconvertError, UsageError

if TYPE_CHECKING:
    from converter.batch import Job, Outcome
    from converter.batch.manifest import Line, Named

COMMANDS = get_args(Command)
_OWN = ("command", "source", "output")
_NOT_HERE = ("json", "quiet", "debug", "dry-run", "help", "push-to", "jobs")
"""Options that are the batch's, or no batch's, and not a line's."""
_MOST_WRONG = 100
"""Findings after which a manifest is taken for no manifest at all."""
_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def jobs_of(
    manifest: Path, commands: Mapping[str, click.Command], **also: Any
) -> tuple[list[Job], list[Outcome], dict[str, dict[str, Any]]]:
    """Every line checked, and what it stands for; the lines of which the hub does not say; and by
    command, the project's defaults for what a line leaves open.

    Args:
        commands: those of the command line, by name.
        also: options of every line: `dry_run`, `overwrite`, `delete_fetched`.

    Raises:
        UsageError: some lines cannot be carried out as they are written; the message names them.
    """
    from converter.batch.manifest import read
    from converter.batch.running import apart

    jobs: list[Job] = []
    lost: list[Outcome] = []
    wrong: list[tuple[int, NeoconvertError]] = []
    defaults: dict[str, dict[str, Any]] = {}
    for line in read(manifest):
        cells = {_plain(name): value for name, value in line.cells.items()}
        name = str(cells.get("command"))
        if name in COMMANDS and name not in defaults:
            defaults[name] = cli_defaults.read(name, commands)
        try:
            jobs += _jobs(line, cells, commands, defaults, also, lost)
        except NeoconvertError as error:
            wrong.append((line.number, error))
            if len(wrong) == _MOST_WRONG:
                break
    for job, place, how in islice(apart(jobs), _MOST_WRONG - len(wrong)):
        do = "Give each line an OUTPUT, and a report, of its own; with a pattern, use {name}, {parent} or, for the hub, {revision}."
        if how.startswith("SOURCE"):
            do = "Put it into a second manifest, and run that afterwards."
        wrong.append((job.line, UsageError(f"{how}.", where=str(place), do=do)))
    if wrong:
        raise _refused(manifest, wrong)
    return jobs, lost, defaults


def _refused(manifest: Path, wrong: list[tuple[int, NeoconvertError]]) -> UsageError:
    (line, first), more = wrong[0], len({line for line, _ in wrong}) - 1
    others = ", ".join(dict.fromkeys(str(n) for n, _ in wrong[:10] if n != line))
    what = f"Line {line}: {first.what}"
    if more:
        what += (
            f" Nor can line{'s' if more > 1 else ''} {others}{' …' if more > 9 else ''} be done."
        )
    if len(wrong) == _MOST_WRONG:
        what += f" After {_MOST_WRONG} such findings, no more was looked for."
    lines = [dict(zip(("line", "what", "where", "do"), (n, *e.lines()), strict=True)) for n, e in wrong]  # fmt: skip
    return UsageError(
        what, where=f"{manifest}, line {line}: {first.where}", do=first.do, details={"lines": lines}
    )


def _jobs(
    line: Line,
    cells: dict[str, Any],
    commands: Mapping[str, click.Command],
    defaults: dict[str, dict[str, Any]],
    also: dict[str, Any],
    lost: list[Outcome],
) -> Iterator[Job]:
    from converter.batch.job import failed
    from converter.batch.manifest import AS_WRITTEN, Named, named_by

    command = commands[_command(cells)]
    options, left_open = _options(command), defaults[str(command.name)]
    for name in cells:
        _require_known(name, line.cells, options, commands)
    if "source" not in cells:
        raise UsageError("There is no source.", where="source", do="Name a checkpoint, or a pattern.")  # fmt: skip
    if "output" not in cells:
        raise UsageError(
            "There is no output.", where="output", do="Name a directory; {name} is the source's."
        )
    source = _text("source", cells["source"])
    try:
        stands_for = named_by(source)
    except UsageError:
        raise
    except NeoconvertError as error:  # the line is right, and fails as one that is converted does
        job = _job(
            line.number, command, options, cells, Named(source, None, AS_WRITTEN), left_open, also
        )
        lost.append(failed(job, error))
        return
    for found in stands_for:
        yield _job(line.number, command, options, cells, found, left_open, also)


def _job(
    line: int,
    command: click.Command,
    options: dict[str, click.Option],
    cells: dict[str, Any],
    found: Named,
    left_open: dict[str, Any],
    also: dict[str, Any],
) -> Job:
    from converter.batch import Job

    arguments = []
    for name, value in cells.items():
        if name not in _OWN:
            arguments += _arguments(name, value, options[name], found)
    if found.revision and "revision" in cells:
        raise UsageError(
            "The revision is named twice.", where="revision", do="Leave one of the two out."
        )
    output = found.fill(_text("output", cells["output"]))
    try:
        name = command.name or ""
        typed = [*arguments, "--", found.source, output]
        given = command.make_context(name, typed, default_map=left_open).params
    except click.UsageError as error:
        where = getattr(getattr(error, "param", None), "name", None) or command.name or ""
        raise UsageError(error.format_message(), where=where, do=f"See neoconvert {command.name} --help.") from error  # fmt: skip
    for name in ("as_json", "quiet", "debug", "cores", "source", "push_to"):
        del given[name]
    place = given.pop("output")
    reading = {name: given.pop(name) for name in ("revision", "cfg", "allow_pickle", "adapter")}
    reading["revision"] = found.revision or reading["revision"]
    report = given.pop("report")
    require_report(report, place)
    given["dry_run"] = also["dry_run"]
    given["overwrite"] |= also["overwrite"]
    request = request_of(command.name, layers=report is not None, **given)
    return Job(
        found.source, place, request, line, report=report,
        delete_fetched=also["delete_fetched"], **reading,
    )  # fmt: skip


def _plain(column: str) -> str:
    """A column's name as an option's: `--max-shard-size` and `max_shard_size` are one."""
    return column.strip().lstrip("-").replace("_", "-").lower()


def _command(cells: dict[str, Any]) -> str:
    name = str(cells.get("command", ""))
    if name in COMMANDS:
        return name
    raise UsageError(
        f"{name!r} is no command of a batch." if name else "There is no command.",
        where=f"command {name}".strip(),
        do=f"{meant(name, COMMANDS)}Choose from {', '.join(COMMANDS)}.",
    )


def _options(command: click.Command) -> dict[str, click.Option]:
    """A command's options by every long name."""
    return {
        name.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--") and name.removeprefix("--") not in _NOT_HERE
    }


def _require_known(
    name: str, written: Mapping[str, Any], options: dict[str, Any], commands: Mapping[str, Any]
) -> None:
    if name in _OWN or name in options:
        return
    where = next(column for column in written if _plain(column) == name)
    elsewhere = [other for other in COMMANDS if name in _options(commands[other])]
    if name in _NOT_HERE:
        do = f"Give --{name} to batch itself, for all lines."
    elif elsewhere:
        do = f"It is one of {', '.join(elsewhere)}. Leave the cell empty."
    else:
        there = [*_OWN, *options]
        do = meant(name, there).rstrip() or f"There are {', '.join(there)}."
    raise UsageError(
        f"The column {where!r} is no option of this command.", where=f"column {where}", do=do
    )


def _text(name: str, value: Any) -> str:
    if isinstance(value, (dict, list, bool)):
        raise UsageError(f"{name} is {value!r}.", where=name, do="Give a text or a number.")
    text = str(value)
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        possible = False
    if not possible:
        raise UsageError(f"{name} holds a character that no path or name has.", where=name, do="Leave that character out.")  # fmt: skip
    return text


def _arguments(name: str, value: Any, option: click.Option, found: Named) -> list[str]:
    """A cell as it would be typed."""
    if option.is_flag:
        said = str(value).lower()
        if said not in (*_TRUE, *_FALSE):
            raise UsageError(f"{name} is {value!r}.", where=name, do="Give true or false.")
        on = said in _TRUE
        if name in (spelt.removeprefix("--") for spelt in option.secondary_opts):
            name, on = option.opts[0].removeprefix("--"), not on
        if on:
            return [f"--{name}"]
        return option.secondary_opts[:1]
    values = [value]
    if option.multiple:
        values = value if isinstance(value, list) else str(value).split()
    return [f"--{name}={found.fill(_text(name, one))}" for one in values]
