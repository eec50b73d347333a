"""Every deliberate fault at a thousandth of its size, and one weight of each kind moved by one unit
in the last place: do the links that are measured in float64 catch it, and where?

The function check alone runs. The figure is the worst of the program and route links over what is
allowed, the least of all models: above 1, what the artifact computes gives it away.
"""

from __future__ import annotations

import datetime
import gc
import math
import platform
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import click

from scripts.faults import versions
from tests.verification.fault import Artifact, Fault
from tests.verification.faults import FAULTS
from tests.verification.faulty import MODELS, Workshop, here
from tests.verification.small import ALLOWED, SHARE, ULPS, Small, judge, smaller

Cells = dict[tuple[str, Artifact], list[tuple[str, Small]]]
"""By fault and artifact: the outcomes, with the model's name."""


def run(models: Sequence[str], faults: Sequence[Fault], artifacts: Sequence[Artifact]) -> Cells:
    cells: Cells = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            workshop = Workshop(Path(scratch) / model, model)
            for number, fault in enumerate(faults, start=1):
                print(f"\r{model}: {number} of {len(faults)} ", end="", file=sys.stderr)
                for artifact in artifacts:
                    if workshop.applies(fault, artifact) and (
                        small := judge(workshop, fault, artifact)
                    ):
                        cells[fault.name, artifact].append((model, small))
    print(file=sys.stderr)
    return cells


def cell(outcomes: Sequence[tuple[str, Small]]) -> str:
    if not outcomes:
        return "—"
    least = min((small for _, small in outcomes), key=lambda small: small.times)
    figure = "∞" if math.isinf(least.times) else f"{least.times:.2g}"
    return figure + (" **!**" if any(small.wrong for _, small in outcomes) else "")


def table(cells: Cells, faults: Sequence[Fault], artifacts: Sequence[Artifact]) -> list[str]:
    lines = [f"| fault | {' | '.join(artifacts)} | unit | named |"]
    lines.append(f"|---|{'---|' * (len(artifacts) + 2)}")
    for fault in faults:
        mine = [cells.get((fault.name, artifact), []) for artifact in artifacts]
        if not any(mine):
            continue
        units = {small.unit for found in mine for _, small in found if small.unit}
        named = ", ".join(sorted(units)) or "—"
        lines.append(f"| {' | '.join([fault.name, *map(cell, mine), fault.unit or '—', named])} |")
    return lines


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)))
@click.option("--artifact", "artifacts", multiple=True, type=click.Choice(here()))
@click.option("--only", default="", help="Faults whose name contains this.")
@click.option("--share", default=SHARE, show_default=True, help="Of each fault's size.")
def main(models: tuple[str, ...], artifacts: tuple[Artifact, ...], only: str, share: float) -> None:
    artifacts = artifacts or here()
    made = [smaller(fault, share) for fault in FAULTS if not fault.harmless]
    all_ = [*(fault for fault in made if fault), *ULPS]
    faults = [f for f in all_ if only in f.name and set(f.on) & set(artifacts)]
    gc.collect()
    gc.freeze()  # verification collects garbage twice; the libraries are none
    cells = run(models or tuple(MODELS), faults, artifacts)
    click.echo("\n".join(table(cells, faults, artifacts)))
    outcomes = [(model, small) for found in cells.values() for model, small in found]
    wrong = [(model, small) for model, small in outcomes if small.wrong]
    caught = sum(small.times > 1 for _, small in outcomes)
    thorough = sum(small.effort == "thorough" for _, small in outcomes)
    hidden = [small for _, small in outcomes if not small.times > 1]
    most = max((small.change for small in hidden if small.change is not None), default=0.0)
    click.echo(
        f"\n{len(faults)} kinds of fault, {len(cells)} cells, {len(outcomes)} artifacts"
        f" ({', '.join(models or MODELS)}): {caught} caught by the program and route links alone,"
        f" {thorough} of them at thorough effort, which takes every token; {len(hidden)} change the function by no more than {most:.3g} of float64's noise floors"
        f" ({ALLOWED:g} must be seen); {len(wrong)} wrong.\n{datetime.date.today()},"
        f" {platform.processor() or platform.machine()}, Python {platform.python_version()},"
        f" {versions()}"
    )
    for model, small in wrong:
        change = "unknown" if small.change is None else f"{small.change:.3g}"
        click.echo(
            f"WRONG {small.fault.name} / {small.artifact} / {model}: {small.wrong} ({small.times:.3g}"
            f" of what is allowed, change {change} floors of float64)"
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
