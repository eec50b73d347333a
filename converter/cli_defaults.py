"""Defaults of a project: the table [tool.neoconvert] of its pyproject.toml.

    [tool.neoconvert]
    effort = "quick"

    [tool.neoconvert.hf-to-tl]
    layout = "bridge"

Options that let something in, or something be lost, are for each run to say, and have no place there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from converter.choices import meant
from converter.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "pyproject.toml"
_KNOWN = (
    "layout", "process", "ledger", "reverse", "dtype", "max-shard-size", "model-card", "device",
    "effort", "runtime",
)  # fmt: skip
_LONGEST = 2**20


def read(name: str, commands: Mapping[str, click.Command]) -> dict[str, Any]:
    """A command's defaults: of the nearest pyproject.toml that has the table, here or above. What it
    says to other commands alone is theirs to refuse.

    Raises:
        UsageError: the table says what no command takes, or what this one does not.
    """
    takes = {key: command for key, command in commands.items() if _options(command).keys() & _KNOWN}
    if name not in takes:
        return {}
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return {}
    path, table = _find(here)
    if path is None:
        return {}
    if strange := sorted(k for k, v in table.items() if isinstance(v, dict) and k not in takes):
        kind = "a command that takes none" if strange[0] in commands else "no command"
        there = f"{meant(strange[0], takes)}There are {', '.join(takes)}."
        raise _refused(path, "", f"[tool.neoconvert.{strange[0]}] is of {kind}.", there)
    given = {}
    options = _options(commands[name])
    for key, value in table.items():
        if not isinstance(value, dict):
            _require_known(path, "", key, value)
            if key in options:
                given[key] = "", value
    for key, value in table.get(name, {}).items():
        _require_known(path, f".{name}", key, value)
        if key not in options:
            what = f"neoconvert {name} has no option --{key}."
            raise _refused(path, f".{name}", what, f"Take {key} out of that table.")
        given[key] = f".{name}", value
    context = click.Context(commands[name])
    for key, (where, value) in given.items():
        try:
            options[key].type_cast_value(context, value)
        except click.BadParameter as error:
            what = f"{key} cannot be {value!r}: {error.message}"
            raise _refused(path, where, what, f"Change {key} there.") from error
    return {str(options[key].name): value for key, (_, value) in given.items()}


def said(context: click.Context) -> str:
    """Which of a command's options come from there, as they would be typed; "" if none."""
    taken = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP
    }
    return typed(context.command, taken)


def typed(command: click.Command, defaults: Mapping[str, Any]) -> str:
    """Defaults from there as they would be typed; "" if there are none."""
    words = []
    for parameter in command.params:
        if (name := parameter.name) in defaults:
            value = defaults[str(name)]
            words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return f"from {FILE}: {' '.join(words)}" if words else ""


def _options(command: click.Command) -> dict[str, click.Parameter]:
    return {option.removeprefix("--"): p for p in command.params for option in p.opts}


def _find(directory: Path) -> tuple[Path | None, dict[str, Any]]:
    for folder in (directory, *directory.parents):
        path = folder / FILE
        content = b""
        try:
            if not path.is_file() or path.stat().st_size > _LONGEST:
                continue
            content = path.read_bytes()
            document = tomllib.loads(content.decode())
        except (OSError, ValueError, RecursionError) as error:  # no TOML, or none that Python reads
            if b"tool.neoconvert" not in content:
                continue  # whatever it is, it has nothing to say to us
            what = f"This is not TOML, and has defaults for neoconvert: {error}."
            raise _refused(path, None, what, "Mend it there.") from error
        tools = document.get("tool")
        table = tools.get("neoconvert") if isinstance(tools, dict) else None
        if isinstance(table, dict):
            return path, table
        if table is not None:
            example = 'Write a table: [tool.neoconvert], and below it, say, effort = "quick".'
            raise _refused(path, None, f"tool.neoconvert is {_written(table)}.", example)
    return None, {}


def _require_known(path: Path, where: str, name: str, value: Any) -> None:
    if name not in _KNOWN:
        may = f"{meant(name, _KNOWN)}It may say {', '.join(_KNOWN)}."
        raise _refused(path, where, f"[tool.neoconvert{where}] cannot say {name}.", may)
    if not isinstance(value, (str, bool, int)) or (
        isinstance(value, int) and abs(value) > sys.maxsize
    ):
        words = value if isinstance(value, list) else [value]
        bare = (word if isinstance(word, str) else _written(word) for word in words)
        example = f'{name} = "{",".join(bare)}"'
        what = f"{name} must be one string, and is {_written(value)}."
        raise _refused(path, where, what, f"Write it as on the command line, in quotes: {example}")


def _written(value: Any) -> str:
    """A value as Python writes it, if it does: hexadecimal numbers may be too long for it."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _refused(path: Path, table: str | None, what: str, do: str) -> UsageError:
    """`table`: which of the file's, behind [tool.neoconvert; None: no matter which."""
    where = str(path) if table is None else f"{path}, [tool.neoconvert{table}]"
    return UsageError(what, where=where, do=do)
