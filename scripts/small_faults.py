"""Every deliberate fault at a thousandth of its size, and one weight of each kind moved by one unit
in the last place: do the links that are measured in float64 catch it, and where?

The function check alone runs. The figure is the worst of the program and route links over what is
allowed, the least of all models: above 1, what the artifact computes gives it away.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import click

from scripts.faults import choosing, made_on, run, table
from tests.verification.fault import Artifact
from tests.verification.faults import FAULTS
from tests.verification.faulty import MODELS, here
from tests.verification.small import ALLOWED, SHARE, ULPS, Small, judge, smaller


def cell(found: Sequence[Small]) -> str:
    """The least that was found, over what is allowed."""
    least = min(small.times for small in found)
    figure = "∞" if math.isinf(least) else f"{least:.2g}"
    return figure + (" **!**" if any(small.wrong for small in found) else "")


@click.command()
@choosing
@click.option("--share", default=SHARE, show_default=True, help="Of each fault's size.")
def main(models: tuple[str, ...], artifacts: tuple[Artifact, ...], only: str, share: float) -> None:
    artifacts = artifacts or here()
    made = [smaller(fault, share) for fault in FAULTS if not fault.harmless]
    all_ = [*(fault for fault in made if fault), *ULPS]
    faults = [f for f in all_ if only in f.name and set(f.on) & set(artifacts)]
    cells = run(models, faults, artifacts, judge)
    faults = [fault for fault in faults if any(name == fault.name for name, _ in cells)]
    click.echo(table(cells, faults, artifacts, cell, lambda small: small.unit))
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
        f" ({ALLOWED:g} must be seen); {len(wrong)} wrong.\n{made_on()}"
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
