"""Edits brought back through files, many of them: a Markdown table by layout and dtype.

A trial processes a small model, changes one stored tensor of the file (or all), undoes the processing
and compares both files in float64. See `tests.edits`.
"""

from __future__ import annotations

import datetime
import multiprocessing
import platform
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch

from tests.edits import MAX_RATIO, Edit, Outcome, drawn, run

Trial = tuple[int, Edit, Outcome]


def trial(seed: int) -> Trial:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        edit = drawn(seed)
        return seed, edit, run(edit, Path(scratch))


def row(name: str, found: list[Trial]) -> str:
    ratios = [o.ratio for _, _, o in found if o.names and not o.refused]
    refused = sum(bool(o.refused) for _, _, o in found)
    figures = " | ".join(f"{x:.2f}" for x in np.quantile(ratios or [0], [0.5, 0.99, 1]))
    moved = sum(bool(o.moved) for _, _, o in found)
    lost = sum(ratio > MAX_RATIO for ratio in ratios)
    return f"| {name} | {len(found)} | {refused} | {lost} | {moved} | {figures} |"


@click.command()
@click.option("--count", default=20000, show_default=True, help="How many edits.")
@click.option("--start", default=0, show_default=True, help="The first seed.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
def main(count: int, start: int, jobs: int) -> None:
    found: list[Trial] = []
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for one in pool.imap_unordered(trial, range(start, start + count), chunksize=8):
            found.append(one)
            print(f"\r{len(found)} of {count} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    click.echo("| artifact | edits | refused | lost | others moved | median | 99 % | max |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for layout in ("hooked", "bridge", "baked"):
        for dtype in ("float32", "float16", "bfloat16"):
            mine = [t for t in found if (t[1].layout, t[1].stored or t[1].dtype) == (layout, dtype)]
            click.echo(row(f"{layout}, {dtype}", mine))
    click.echo(row("all", found))
    click.echo(
        f"\nRatios to what storing the edited file and the result costs; {MAX_RATIO:g} are allowed."
        f" Seeds {start} to {start + count - 1}.\n{datetime.date.today()}, {platform.machine()},"
        f" Python {platform.python_version()}, torch {torch.__version__}"
    )
    bad = [t for t in found if t[2].ratio > MAX_RATIO or t[2].moved]
    for seed, edit, outcome in sorted(bad, key=lambda t: t[0]):
        click.echo(f"SEED {seed}: {edit}\n{outcome}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
