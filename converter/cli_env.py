"""`neoconvert --version` and `neoconvert env`: what this is, and what it runs with."""

from __future__ import annotations

from typing import Any

import click

from converter import __version__
from converter.cli_ending import reporting
from converter.cli_options import printing


def _say_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from converter.environment import python_version, versions

    found = versions()
    found.pop("neoconvert", None)
    used = " · ".join([python_version(), *(f"{name} {version}" for name, version in found.items())])
    click.echo(f"neoconvert {__version__}\n{used}")
    context.exit()


version = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_version,
    help="Show the version, and those of what it uses.",
)


@click.command("env")
@printing
@reporting
def env(display: Any) -> Any:
    """Show what a bug report needs.

    Versions, devices, and what this TransformerLens can open. No names of places are in it.
    """
    from converter.environment import describe
    from converter.wording import environment

    facts = describe()
    display.rows(environment(facts))
    return facts, 0
