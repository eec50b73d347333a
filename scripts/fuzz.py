"""Fuzzing of each parser of our own, one after another: a Markdown table. See `tests.fuzzing`.

Each runs in a process of its own, `scripts.fuzz_one`, which is started again where an input ends it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path("build/fuzz")
HEAD = (
    "| parser | minutes | processor time, min | inputs | accepted | of our code reached | findings |\n"
    "|---|---|---|---|---|---|---|"
)


def fuzz(name: str, minutes: float) -> int:
    """Fuzz one parser, print its row, and return its number of findings."""
    folder = ROOT / name.replace(" ", "-").replace(",", "")
    shutil.rmtree(folder / "findings", ignore_errors=True)
    for part in ("corpus", "findings"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    before, begun = _used(), time.monotonic()
    executed = accepted = 0
    said = folder / "said.json"
    with open(folder / "log.txt", "wb") as log:
        while (left := minutes * 60 - (time.monotonic() - begun)) > 1:
            said.unlink(missing_ok=True)
            command = [sys.executable, "-W", "ignore", "-m", "scripts.fuzz_one", name, str(folder)]
            subprocess.run([*command, str(int(left))], stdout=log, stderr=log, check=False)
            if not said.exists():
                raise click.ClickException(f"{name} could not be fuzzed: see {log.name}")
            found = json.loads(said.read_text())
            executed += found["executed"]
            accepted += found["accepted"]
    reached = max(
        map(int, re.findall(rb"cov: (\d+)", (folder / "log.txt").read_bytes())), default=0
    )
    findings = len(list((folder / "findings").iterdir()))
    figures = [
        f"{(time.monotonic() - begun) / 60:.1f}", f"{(_used() - before) / 60:.1f}", f"{executed:,}",
        f"{accepted:,}", f"{reached:,}", findings,
    ]  # fmt: skip
    click.echo(f"| {' | '.join(map(str, [name, *figures]))} |")
    return findings


def _used() -> float:
    """Seconds of processor time of all children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


@click.command()
@click.argument("parsers", nargs=-1)
@click.option("--minutes", default=30.0, show_default=True, help="For each parser.")
def main(parsers: tuple[str, ...], minutes: float) -> None:
    from tests.fuzzing import TARGETS

    if strange := set(parsers) - set(TARGETS):
        raise click.BadParameter(f"{', '.join(strange)}: there are {', '.join(TARGETS)}")
    click.echo(HEAD)
    found = sum(fuzz(name, minutes) for name in parsers or TARGETS)
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())  # fmt: skip
    click.echo(
        f"\nCode reached: edges of bytecode in converter/, as atheris counts them. {datetime.date.today()},"
        f" {os.cpu_count()} cores ({model}), Python {platform.python_version()}"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
