"""Every deliberate fault in every artifact that can have it: is it caught, and where is it seen?

For each cell both layers of verification run alone. The figure is the worst probe's ratio over
what is allowed, the least of all models: above 1, what the artifact computes gives it away.
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

from converter.verification import MAX_RATIO
from converter.verification.loading import installed
from tests.verification.fault import Artifact, Fault
from tests.verification.faults import FAULTS
from tests.verification.faulty import MODELS, Outcome, Workshop, here

Cells = dict[tuple[str, Artifact], list[tuple[str, Outcome]]]
"""By fault and artifact: the outcomes, with the model's name."""


def run(models: Sequence[str], faults: Sequence[Fault], artifacts: Sequence[Artifact]) -> Cells:
    cells: Cells = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            workshop = Workshop(Path(scratch) / model, model)
            for number, fault in enumerate(faults, start=1):
                print(f"\r{model}: {number} of {len(faults)} ", end="", file=sys.stderr)
                for artifact in artifacts:
                    if workshop.applies(fault, artifact):
                        outcome = workshop.judge(fault, artifact)
                        cells[fault.name, artifact].append((model, outcome))
    print(file=sys.stderr)
    return cells


def cell(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """`1.2e+04 ✓`: the least ratio over the limit, and whether the weight check catches it."""
    if not outcomes:
        return "—"
    found = [outcome for _, outcome in outcomes]
    least = min(o.ratio for o in found)
    ratio = "∞" if math.isinf(least) else f"{least:.1e}" if least >= 100 else f"{least:.2g}"
    if any(o.by for o in found):
        ratio = "original"
    mark = "✓" if all(o.weights for o in found) else "✗"
    return f"{ratio} {mark}" + (" **!**" if any(o.wrong or o.faint for o in found) else "")


def table(cells: Cells, faults: Sequence[Fault], artifacts: Sequence[Artifact]) -> list[str]:
    lines = [f"| fault | {' | '.join(artifacts)} | unit | named |"]
    lines.append(f"|---|{'---|' * (len(artifacts) + 2)}")
    for fault in faults:
        mine = [cells.get((fault.name, artifact), []) for artifact in artifacts]
        units = {o.unit or "—" for found in mine for _, o in found if o.function}
        named = ", ".join(sorted(units - {"—"})) or "—"
        row = [fault.name, *map(cell, mine), fault.unit or "—", named]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def versions() -> str:
    names = ("transformer-lens", "transformers", "torch", "onnxruntime")
    return ", ".join(f"{name} {installed(name)}" for name in names)


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)))
@click.option("--artifact", "artifacts", multiple=True, type=click.Choice(here()))
@click.option("--only", default="", help="Faults whose name contains this.")
def main(models: tuple[str, ...], artifacts: tuple[Artifact, ...], only: str) -> None:
    artifacts = artifacts or here()
    faults = [f for f in FAULTS if only in f.name and set(f.on) & set(artifacts)]
    gc.collect()
    gc.freeze()  # verification collects garbage twice; the libraries are none
    cells = run(models or tuple(MODELS), faults, artifacts)
    click.echo("\n".join(table(cells, faults, artifacts)))
    outcomes = [(model, o) for found in cells.values() for model, o in found]
    wrong = [(model, o) for model, o in outcomes if o.wrong]
    invisible = sum(not o.function and not o.fault.harmless for _, o in outcomes)
    click.echo(
        f"\nFigures: worst probe's ratio over the limit, least of the models; ✓/✗: the weight check"
        f" alone; 'original': the software runs the original otherwise than its file says.\n{len(faults)} kinds of fault, {len(cells)} cells, {len(outcomes)} artifacts"
        f" ({', '.join(models or MODELS)}); {invisible} change no function and are the weight"
        f" check's; {len(wrong)} wrong.\n{datetime.date.today()}, {platform.processor() or platform.machine()},"
        f" Python {platform.python_version()}, {versions()}"
    )
    for model, o in wrong:
        change = "unknown" if o.change is None else f"{o.change:.3g}"
        click.echo(
            f"WRONG {o.fault.name} / {o.artifact} / {model}: {o.wrong} (ratio {o.ratio:.3g} of the"
            f" limit, change in float64 {change} floors, weights {'✓' if o.weights else '✗'})"
        )
    for model, o in outcomes:
        if o.faint:
            click.echo(
                f"LIMIT {o.fault.name} / {o.artifact} / {model}: {o.change:.2g} floors in float64,"
                f" found as {o.ratio * MAX_RATIO:.2g}; {MAX_RATIO:g} are allowed, and no weight tells."
            )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
