"""Mutated safetensors headers, a million of them, through our reader and the library's. See
`tests.headers`."""

from __future__ import annotations

import datetime
import multiprocessing
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click

from tests.headers import disagreement, mutated, sound

_CHUNK = 2000
Found = tuple[int, list[tuple[int, str]]]


def chunk(start: int) -> Found:
    """How many of a chunk were accepted, and the seeds at which we and the library part."""
    data, accepted, parted = sound(), 0, []
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch:
        for seed in range(start, start + _CHUNK):
            ours, how = disagreement(mutated(data, seed), Path(scratch) / "x.safetensors")
            accepted += ours
            if how:
                parted.append((seed, how))
    return accepted, parted


@click.command()
@click.option("--count", default=1_000_000, show_default=True, help="How many mutations.")
@click.option("--start", default=0, show_default=True, help="The first seed.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
def main(count: int, start: int, jobs: int) -> None:
    begun = time.monotonic()
    starts = range(start, start + count, _CHUNK)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        found = list(pool.imap_unordered(chunk, starts))
    accepted = sum(accepted for accepted, _ in found)
    parted = sorted(one for _, some in found for one in some)
    click.echo(
        f"{len(starts) * _CHUNK:,} mutated headers: {accepted:,} accepted, {len(parted)} of them read"
        f" otherwise than by safetensors {version('safetensors')}.\nSeeds from {start},"
        f" {time.monotonic() - begun:.0f} s. {datetime.date.today()}, {platform.machine()},"
        f" Python {platform.python_version()}"
    )
    for seed, how in parted[:20]:
        click.echo(f"SEED {seed}: {how}")
    sys.exit(bool(parted))


if __name__ == "__main__":
    main()
