"""How a command ends: JSON, errors as three lines, exit codes. Printing decides none of them."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from converter import cli_defaults, strict_json
from converter.errors import NeoconvertError, UsageError, classified, panicked
from converter.interrupts import Interrupted, handled
from converter.output import LONGEST, inert, occupy_standard, shown, steady

SCHEMA_VERSION = 1
_PROGRAM = "neoconvert"
Callback = TypeVar("Callback", bound=Callable[..., Any])


class Group(click.Group):
    """The command line: interrupts, and output that cannot fail, around every command."""

    def main(self, *args: Any, **extra: Any) -> Any:
        _published().clear()
        occupy_standard()
        with steady():
            try:
                with handled(_give_up):
                    return super().main(*args, **extra)
            except Interrupted as interrupt:
                _abandon()  # it may have come where nothing was ready for it yet
                _say_interrupted()
                sys.exit(interrupt.exit_code)
            except Exception as error:  # where no command had begun
                if "--debug" in (extra.get("args") or sys.argv):
                    traceback.print_exc()
                _fail(self.name or "", classified(error), as_json=False)

    def make_context(self, info_name: Any, args: list[str], *more: Any, **extra: Any) -> Any:
        as_json = "--json" in args
        with _refusals(as_json):
            context = super().make_context(info_name, args, *more, **extra)
        context.meta[__name__] = as_json
        return context

    def invoke(self, context: click.Context) -> Any:
        with _refusals(context.meta[__name__], context):
            return super().invoke(context)


@contextlib.contextmanager
def _refusals(as_json: bool, context: click.Context | None = None) -> Iterator[None]:
    """What is refused before a command runs: of click's own, which it prints, the document too."""
    try:
        yield
    except (click.ClickException, NeoconvertError) as error:
        name = (context and context.invoked_subcommand) or _PROGRAM
        if isinstance(error, NeoconvertError):
            _fail(name, error, as_json)
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            raise  # its message is the help
        error.message = inert(error.message, longest=LONGEST)  # type: ignore[misc]  # it may be any file's name
        if as_json:
            command = name if name == _PROGRAM else f"{_PROGRAM} {name}"
            do = f"See {command} --help."
            _print_error(name, UsageError(error.format_message(), where=command, do=do))
        raise


def reporting(command: Callback) -> Callback:
    """Errors as three lines and an exit code, whatever went wrong."""

    @functools.wraps(command)
    def wrapper(
        *args: Any,
        as_json: bool,
        quiet: bool,
        debug: bool,
        cores: int | None = None,
        **options: Any,
    ) -> None:
        name = click.get_current_context().info_name or ""
        try:
            from converter.parallel import numpy_without_threads, share_memory, use_cores

            share_memory()
            if cores is not None:
                use_cores(cores)
            numpy_without_threads()
            # Looking for garbage while libraries are imported takes a fifth of their time.
            gc.set_threshold(100_000)
            from converter.display import Display

            display = Display(as_json=as_json, quiet=quiet)
            if line := cli_defaults.said(click.get_current_context()):
                display.say(shown(line))
            document, exit_code = command(*args, display=display, **options)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BaseException as error:
            if not (isinstance(error, Exception) or panicked(error)):
                raise
            if debug:
                traceback.print_exc()
            _fail(name, classified(error), as_json)
        if as_json:
            print_json(name, exit_code, document)
        sys.exit(exit_code)

    return wrapper  # type: ignore[return-value]


def print_json(command: str, exit_code: int, document: dict[str, Any]) -> None:
    """One document; of a batch, one line, since more come."""
    indent = None if command == "batch" else 2
    head = {"schema_version": SCHEMA_VERSION, "command": command, "exit_code": exit_code}
    click.echo(strict_json.dumps(head | document, indent))


def _fail(command: str, error: NeoconvertError, as_json: bool) -> NoReturn:
    what, where, do = (inert(line, longest=LONGEST) for line in error.lines())
    red = None if os.environ.get("NO_COLOR") else "red"  # which rich heeds, and click does not
    click.echo(f"{click.style('Error', fg=red, bold=True)}: {what}", err=True)
    click.echo(f"   in: {where}", err=True)
    click.echo(f"   do: {do}", err=True)
    if as_json:
        _print_error(command, error)
    sys.exit(error.exit_code)


def _print_error(command: str, error: NeoconvertError) -> None:
    what, where, do = error.lines()
    fault = {"type": type(error).__name__, "what": what, "where": where, "do": do}
    print_json(command, error.exit_code, {"error": fault} | error.details)


def _published() -> list[Path]:
    """What was published, without importing what publishes."""
    module = sys.modules.get("converter.checkpoint.publish")
    return module.PUBLISHED if module else []


def _say_interrupted() -> None:
    published = _published()
    done = ", ".join(inert(str(path)) for path in published[-3:])
    if len(published) > 3:
        done = f"{len(published)} outputs, the last of them {done}"
    click.echo(f"Interrupted; {done or 'nothing'} was published.", err=True)


def _abandon() -> None:
    if module := sys.modules.get("converter.checkpoint.workspace"):
        module.abandon()


def _give_up() -> None:
    """The main thread hangs in a library: tidy in its place."""
    _abandon()
    done = "nothing" if not _published() else "what was finished"
    with contextlib.suppress(OSError):
        os.write(2, f"Interrupted; {done} was published.\n".encode())
