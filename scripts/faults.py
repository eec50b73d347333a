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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.verification import MAX_RATIO
from converter.verification.loading import installed
from tests.verification.fault import Artifact, Fault
from tests.verification.faults import FAULTS
from tests.verification.faulty import MODELS, Outcome, Workshop, here

T = TypeVar("T")


def run(
    models: Sequence[str],
    faults: Sequence[Fault],
    artifacts: Sequence[Artifact],
    judge: Callable[[Workshop, Fault, Artifact], T | None],
) -> dict[tuple[str, Artifact], list[tuple[str, T]]]:
    """By fault and artifact: the outcomes, with the model's name."""
    gc.collect()
    gc.freeze()  # verification collects garbage twice; the libraries are none
    cells: dict[tuple[str, Artifact], list[tuple[str, T]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for model in models or tuple(MODELS):
            workshop = Workshop(Path(scratch) / model, model)
            for number, fault in enumerate(faults, start=1):
                print(f"\r{model}: {number} of {len(faults)} ", end="", file=sys.stderr)
                for artifact in artifacts:
                    if workshop.applies(fault, artifact) and (
                        outcome := judge(workshop, fault, artifact)
                    ):
                        cells[fault.name, artifact].append((model, outcome))
    print(file=sys.stderr)
    return cells


def table(
    cells: dict[tuple[str, Artifact], list[tuple[str, T]]],
    faults: Sequence[Fault],
    artifacts: Sequence[Artifact],
    cell: Callable[[Sequence[T]], str],
    unit: Callable[[T], str | None],
) -> str:
    """A Markdown table: a row for each fault, with what `cell` says of its outcomes."""
    lines = [f"| fault | {' | '.join(artifacts)} | unit | named |"]
    lines.append(f"|---|{'---|' * (len(artifacts) + 2)}")
    for fault in faults:
        mine = [[o for _, o in cells.get((fault.name, artifact), [])] for artifact in artifacts]
        if not any(mine):
            continue
        named = sorted({name for found in mine for o in found if (name := unit(o))})
        shown = [cell(found) if found else "—" for found in mine]
        row = [fault.name, *shown, fault.unit or "—", ", ".join(named) or "—"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def made_on() -> str:
    """Date, machine and versions, for below a table."""
    names = ("transformer-lens", "transformers", "torch", "onnxruntime")
    return (
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, Python"
        f" {platform.python_version()}, {', '.join(f'{n} {installed(n)}' for n in names)}"
    )


def choosing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options by which models, artifacts and faults are chosen."""
    for option in (
        click.option("--only", default="", help="Faults whose name contains this."),
        click.option("--artifact", "artifacts", multiple=True, type=click.Choice(here())),
        click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS))),
    ):
        command = option(command)
    return command


def cell(found: Sequence[Outcome]) -> str:
    """`1.2e+04 ✓`: the least ratio over the limit, and whether the weight check catches it."""
    least = min(o.ratio for o in found)
    ratio = "∞" if math.isinf(least) else f"{least:.1e}" if least >= 100 else f"{least:.2g}"
    if any(o.by for o in found):
        ratio = "original"
    mark = "✓" if all(o.weights for o in found) else "✗"
    return f"{ratio} {mark}" + (" **!**" if any(o.wrong or o.faint for o in found) else "")


@click.command()
@choosing
def main(models: tuple[str, ...], artifacts: tuple[Artifact, ...], only: str) -> None:
    artifacts = artifacts or here()
    faults = [f for f in FAULTS if only in f.name and set(f.on) & set(artifacts)]
    cells = run(models, faults, artifacts, Workshop.judge)
    click.echo(table(cells, faults, artifacts, cell, lambda o: o.unit if o.function else None))
    outcomes = [(model, o) for found in cells.values() for model, o in found]
    wrong = [(model, o) for model, o in outcomes if o.wrong]
    invisible = sum(not o.function and not o.fault.harmless for _, o in outcomes)
    click.echo(
        f"\nFigures: worst probe's ratio over the limit, least of the models; ✓/✗: the weight check"
        f" alone; 'original': the software runs the original otherwise than its file says.\n{len(faults)} kinds of fault, {len(cells)} cells, {len(outcomes)} artifacts"
        f" ({', '.join(models or MODELS)}); {invisible} change no function and are the weight"
        f" check's; {len(wrong)} wrong.\n{made_on()}"
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
