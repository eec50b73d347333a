"""`neoconvert batch`: a manifest's jobs are done, and shown."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import click

from converter import cli_defaults
from converter.cli_ending import print_json, reporting
from converter.cli_manifest import jobs_of
from converter.cli_options import UserPath, printing
from converter.output import shown


def run(
    manifest: Path, commands: Mapping[str, click.Command], display: Any, jobs: int,
    keep_going: bool, **also: Any,
) -> Any:  # fmt: skip
    """Check, do, show. Returns the summary and the exit code."""
    from converter.batch import Tally, outcomes
    from converter.batch.running import clean_beside
    from converter.display_batch import Showing

    todo, lost, defaults = jobs_of(manifest, commands, **also)
    for name, given in defaults.items():
        if line := cli_defaults.typed(commands[name], given):
            display.say(shown(f"{name}, {line}"))
    tally = Tally()
    showing = Showing(display, len(todo) + len(lost))
    for kept in [] if also["dry_run"] else clean_beside(todo):
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
@click.argument("manifest", type=UserPath(exists=True, dir_okay=False))
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
