"""An exact round trip at 125M size: every byte compared, and what the ledgers cost.

.venvs/tl3/bin/python -m scripts.ledger [--layers 12]
"""

from __future__ import annotations

import resource
import time

import click
from rich.console import Console
from rich.table import Table

from converter.checkpoint import open_checkpoint
from converter.checkpoint.source import LEDGER
from converter.convert import hf_to_tl, tl_to_hf
from converter.demo.tour import differences
from scripts.models import MODELS, make_model


@click.command()
@click.option("--layers", default=12, show_default=True, help="12 is gpt-neo-125m.")
@click.option("--process", default="default", show_default=True)
def main(layers: int, process: str) -> None:
    source = MODELS / f"neo-{layers}"
    make_model(source, layers)
    original = open_checkpoint(source)
    size = sum(tensor.nbytes for tensor in original.stored.values())
    there, back = MODELS / "ledger-tl", MODELS / "ledger-back"
    table = Table(
        "ledger", "MiB", "of the model", "seconds there", "and back", "tensors that differ"
    )
    for kind in ("compact", "exact"):
        start = time.perf_counter()
        hf_to_tl(original, there, process=process, ledger=kind, overwrite=True, check=False)
        middle = time.perf_counter()
        done = tl_to_hf(there, back, overwrite=True, check=False)
        end = time.perf_counter()
        differing = differences(original, open_checkpoint(back))
        if done.route.reverse == "exact" and differing:
            raise click.ClickException(f"not exact: {differing[:4]}")
        stored = (there / LEDGER).stat().st_size
        table.add_row(
            kind,
            f"{stored / 2**20:.2f}",
            f"{stored / size:.2%}",
            f"{middle - start:.1f}",
            f"{end - middle:.1f}",
            f"{len(differing)} of {len(original.stored)} ({done.route.reverse})",
        )
    console = Console(width=100)
    console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"Model {size / 2**20:.0f} MiB, --process {process}; peak memory {peak:.0f} MiB.")


if __name__ == "__main__":
    main()
