"""Hostile and broken files of every kind, against the commands that read them: a Markdown table.

Each runs in a process of its own; see `tests.hostile.trial` for what must hold.
"""

from __future__ import annotations

import datetime
import importlib
import platform
import sys

import click

from converter.cli import main as neoconvert
from tests.hostile import inputs
from tests.hostile.trial import NBYTES, SECONDS, Input, Outcome, run

_NEEDED = [
    "onnx", "onnxruntime", "torch", "tokenizers", "transformers.models.gpt_neo.modeling_gpt_neo",
    "transformers.models.gpt2.tokenization_gpt2", "transformer_lens", "converter.adapter",
    "converter.convert", "converter.explaining", "converter.onnx.export", "converter.inspection",
    "converter.verification.function", "converter.verification.onnx_runtime",
    "converter.verification.libraries", "converter.verification.program", "converter.display",
]  # fmt: skip
"""In memory before the first, so that each is charged with its own."""

Found = list[tuple[Input, Outcome]]


def row(name: str, found: Found) -> str:
    codes = [outcome.code for _, outcome in found]
    others = sum(code not in (0, 3) for code in codes)
    seconds = max(outcome.seconds for _, outcome in found)
    nbytes = max(outcome.nbytes for _, outcome in found) >> 20
    wrong = sum(bool(outcome.wrong) for _, outcome in found)
    figures = [len(found), codes.count(3), codes.count(0), others, f"{seconds:.1f}", nbytes, wrong]
    return f"| {' | '.join(map(str, [name, *figures]))} |"


@click.command()
@click.option("--only", default="", help="Inputs whose kind or name contains this.")
@click.option("--show", is_flag=True, help="What each says.")
def main(only: str, show: bool) -> None:
    for name in _NEEDED:
        importlib.import_module(name)
    chosen = [one for one in inputs() if only in f"{one.kind}: {one.name}"]
    found: Found = []
    for one in chosen:
        outcome = run(one, neoconvert)
        found.append((one, outcome))
        if sys.stderr.isatty():
            print(f"\r{len(found)} of {len(chosen)} ", end="", file=sys.stderr, flush=True)
        if outcome.wrong or show:
            click.echo(f"{'WRONG' if outcome.wrong else 'right'} {one.kind}: {one.name}: {outcome.wrong}\n{(outcome.out + outcome.err)[-1500:]!r}", err=True)  # fmt: skip
    click.echo(
        "| kind of file | inputs | exit 3 | harmless: 0 | other codes | most s | most MiB | wrong |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(one.kind for one in chosen):
        click.echo(row(kind, [pair for pair in found if pair[0].kind == kind]))
    click.echo(row("all", found))
    click.echo(
        f"\nSeconds of processor time ({SECONDS:g} are allowed), memory beyond the libraries'"
        f" ({NBYTES >> 20} MiB are allowed). Other codes: 1 for a sound file of another model, 2 for"
        f" usage.\n{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}"
    )
    sys.exit(any(outcome.wrong for _, outcome in found))


if __name__ == "__main__":
    main()
