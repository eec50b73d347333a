"""`neoconvert batch`: a manifest's rows become jobs by the commands' own options, and are done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli_ending import print_json, reporting
from converter.cli_options import Place, printing
from converter.cli_running import request_of, require_report
from converter.errors import NeoconvertError, UsageError

if TYPE_CHECKING:
    from converter.batch import Job, Outcome
    from converter.batch.manifest import Found, Row

COMMANDS = ("hf-to-tl", "tl-to-hf", "bake", "export-onnx")
_OWN = ("command", "source", "output")
_NOT_HERE = ("json", "quiet", "debug", "dry-run", "help", "push-to")
"""Options that are the batch's, or no batch's, and not a line's."""
_MOST_WRONG = 100
"""Findings after which a manifest is taken for no manifest at all."""
_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def jobs_of(
    manifest: Path, commands: Mapping[str, click.Command], **also: Any
) -> tuple[list[Job], list[Outcome]]:
    """Every line checked, and what it stands for; and the lines of which the hub does not say.

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
    for row in read(manifest):
        try:
            jobs += _jobs(row, commands, also, lost)
        except NeoconvertError as error:
            wrong.append((row.line, error))
            if len(wrong) == _MOST_WRONG:
                break
    for job, place, how in islice(apart(jobs), _MOST_WRONG - len(wrong)):
        do = "Give each line an OUTPUT, and a report, of its own; with a pattern, use {name}, {parent} or, for the hub, {revision}."
        if how.startswith("SOURCE"):
            do = "Put it into a second manifest, and run that afterwards."
        wrong.append((job.line, UsageError(f"{how}.", where=str(place), do=do)))
    if wrong:
        raise _refused(manifest, wrong)
    return jobs, lost


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
    row: Row, commands: Mapping[str, click.Command], also: dict[str, Any], lost: list[Outcome]
) -> Iterator[Job]:
    from converter.batch.job import failed
    from converter.batch.manifest import AS_WRITTEN, Found, expand

    cells = {_plain(name): value for name, value in row.cells.items()}
    command = commands[_command(cells)]
    options = _options(command)
    for name in cells:
        _require_known(name, row.cells, options, commands)
    if "source" not in cells:
        raise UsageError("There is no source.", where="source", do="Name a checkpoint, or a pattern.")  # fmt: skip
    if "output" not in cells:
        raise UsageError(
            "There is no output.", where="output", do="Name a directory; {name} is the source's."
        )
    source = _text("source", cells["source"])
    try:
        stands_for = expand(source)
    except UsageError:
        raise
    except NeoconvertError as error:  # the line is right, and fails as one that is converted does
        job = _job(row.line, command, options, cells, Found(source, None, AS_WRITTEN), also)
        lost.append(failed(job, error))
        return
    for found in stands_for:
        yield _job(row.line, command, options, cells, found, also)


def _job(
    line: int,
    command: click.Command,
    options: dict[str, click.Option],
    cells: dict[str, Any],
    found: Found,
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
        given = command.make_context(name, [*arguments, "--", found.source, output]).params
    except click.UsageError as error:
        where = getattr(getattr(error, "param", None), "name", None) or command.name or ""
        raise UsageError(error.format_message(), where=where, do=f"See neoconvert {command.name} --help.") from error  # fmt: skip
    for name in ("as_json", "quiet", "debug", "source", "push_to"):
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
    close = get_close_matches(name, COMMANDS, n=1)
    there = f"Choose from {', '.join(COMMANDS)}."
    raise UsageError(
        f"{name!r} is no command of a batch." if name else "There is no command.",
        where=f"command {name}".strip(),
        do=f"Did you mean {close[0]}? {there}" if close else there,
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
    close = get_close_matches(name, [*_OWN, *options], n=1)
    where = next(column for column in written if _plain(column) == name)
    elsewhere = [other for other in COMMANDS if name in _options(commands[other])]
    if name in _NOT_HERE:
        do = f"Give --{name} to batch itself, for all lines."
    elif elsewhere:
        do = f"It is one of {', '.join(elsewhere)}. Leave the cell empty."
    elif close:
        do = f"Did you mean {close[0]}?"
    else:
        do = f"There are {', '.join([*_OWN, *options])}."
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


def _arguments(name: str, value: Any, option: click.Option, found: Found) -> list[str]:
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


def run(
    manifest: Path, commands: Mapping[str, click.Command], display: Any, jobs: int,
    keep_going: bool, **also: Any,
) -> Any:  # fmt: skip
    """Check, do, show. Returns the summary and the exit code."""
    from converter.batch import Tally, outcomes
    from converter.batch.running import settle
    from converter.display_batch import Showing

    todo, lost = jobs_of(manifest, commands, **also)
    tally = Tally()
    showing = Showing(display, len(todo) + len(lost))
    for kept in [] if also["dry_run"] else settle(todo):
        display.warn(kept)
    with showing.progress(), closing(outcomes(todo, processes=jobs)) as ran:
        for outcome in chain(lost, ran):
            same = tally.add(outcome)
            showing.outcome(outcome, same)
            if display.as_json:
                document = outcome.to_json() | {"same_weights_as": same}
                print_json("batch", outcome.exit_code, document)
            if outcome.status == "failed" and not keep_going:
                break
    showing.tally(tally)
    return tally.to_json(), tally.exit_code


@click.command("batch")
@click.argument("manifest", type=Place(exists=True, dir_okay=False))
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="How many at a time, each in a process of its own.",
)
@click.option(
    "--keep-going/--stop",
    default=True,
    show_default=True,
    help="After a line that fails, do the others; or stop there.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace OUTPUTs that are not what is asked for, if neoconvert wrote all of them.",
)
@click.option(
    "--delete-fetched",
    is_flag=True,
    help="Fetch what comes from the hub to a place beside OUTPUT, and remove it afterwards.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")
@printing
@reporting
def batch(manifest: Path, display: Any, **options: Any) -> Any:
    """Convert many checkpoints.

    MANIFEST is CSV with a header, or JSON lines: command, source, output, and any option of the
    command by its long name. A source may be a pattern; with @, a revision of the hub or a pattern
    of them. In the output, {name} is the source's name. What is there already, of the same source
    and made as asked, is left as it is: the same command goes on where a run was ended.

    \b
    command,source,output,process
    hf-to-tl,runs/checkpoint-*,tl/{name},default
    hf-to-tl,roneneldan/TinyStories-33M@main,tl/{name},

    Exit code 0 if all is there, 75 if running again may do more, else that of the worst failure.
    """
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    return run(manifest, group.commands, display, **options)
