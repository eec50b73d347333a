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
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

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


def read(commands: Mapping[str, click.Command]) -> dict[str, dict[str, Any]]:
    """By command, the defaults of the nearest pyproject.toml that has the table, here or above.

    Raises:
        click.UsageError: the table says what no command takes.
    """
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return {}
    path, table = _find(here)
    if path is None:
        return {}
    shared = {name: value for name, value in table.items() if not isinstance(value, dict)}
    _require_known(path, "", shared)
    result = {}
    for name, command in commands.items():
        own = table.get(name, {})
        _require_known(path, f".{name}", own)
        options = {option.removeprefix("--"): p.name for p in command.params for option in p.opts}
        if odd := own.keys() - options.keys():
            raise click.UsageError(f"{path}: neoconvert {name} has no option --{min(odd)}.")
        given = {key: value for key, value in (shared | own).items() if key in options}
        result[name] = {str(options[key]): value for key, value in given.items()}
    if strange := sorted(k for k, v in table.items() if isinstance(v, dict) and k not in commands):
        raise click.UsageError(f"{path}: [tool.neoconvert.{strange[0]}] is of no command.")
    return result


def said(context: click.Context) -> str:
    """Which of a command's options come from there, as they would be typed; "" if none."""
    words = []
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP:
            value = context.params[name]
            words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return f"from {FILE}: {' '.join(words)}" if words else ""


def _find(directory: Path) -> tuple[Path | None, dict[str, Any]]:
    for folder in (directory, *directory.parents):
        path = folder / FILE
        try:
            if not path.is_file() or path.stat().st_size > _LONGEST:
                continue
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # no TOML, or none that Python reads
            continue  # whatever it is, it has nothing to say to us
        tools = document.get("tool")
        table = tools.get("neoconvert") if isinstance(tools, dict) else None
        if isinstance(table, dict):
            return path, table
    return None, {}


def _require_known(path: Path, where: str, table: dict[str, Any]) -> None:
    for name, value in table.items():
        if name not in _KNOWN:
            close = get_close_matches(name, _KNOWN, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise click.UsageError(
                f"{path}: [tool.neoconvert{where}] cannot say {name}. {hint}It may say {', '.join(_KNOWN)}."
            )
        if not isinstance(value, (str, bool, int)) or (
            isinstance(value, int) and abs(value) > sys.maxsize  # hex may be long past str()
        ):
            raise click.UsageError(
                f"{path}: [tool.neoconvert{where}] {name} is written as on the command line, in quotes."
            )
