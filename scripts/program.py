"""How far each runtime is from our float64 reference, on every artifact that it runs: a table.

Artifacts are of the demo model, or of one of published widths: HF, HookedTransformer and
TransformerBridge files, raw and processed, in float32 and bfloat16, and graphs of each.
"""

from __future__ import annotations

import datetime
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.choices import Effort
from converter.demo import MODEL
from converter.layout import Layout
from converter.onnx import export
from converter.opening import open_artifact
from converter.verification.loading import has_hooked_transformer, installed
from converter.verification.probes import standard_probes
from converter.verification.program import MAX_TIMES, Program, Reference, compare_program
from converter.verification.runtimes import open_runtime
from scripts.models import MODELS, make_model_apart


def artifacts(original: Checkpoint, directory: Path) -> Iterator[tuple[str, Checkpoint]]:
    """All there is to run here, with the name of each. What was made is removed by the caller."""
    layouts: tuple[Layout, ...] = ("hooked", "bridge") if has_hooked_transformer() else ("bridge",)
    yield "hf", original
    for layout in layouts:
        for process, dtype in (("none", None), ("all", None), ("default", "bfloat16")):
            name = f"{layout}, {process}" + (f", {dtype}" if dtype else "")
            output = directory / name
            converter.hf_to_tl(
                original, output, layout=layout, process=process, dtype=dtype, check=False
            )
            made = open_checkpoint(output)
            yield name, made
            yield f"graph of {name}", open_artifact(export(made).path)
    copied = directory / "hf"
    converter.bake(original, copied, process="default", check=False)
    yield "hf, default", open_checkpoint(copied)
    yield "graph of hf, default", open_artifact(export(open_checkpoint(copied)).path)


def rows(name: str, found: Program) -> Iterator[str]:
    if not found.probes:
        yield f"| {name} | {found.evidence} | | | |"
    for probe in found.probes:
        yield (
            f"| {name} | {found.evidence.subject} | {probe.name} |"
            f" {probe.max_abs_logprob_diff:.1e} | {probe.noise_floor:.1e} |"
        )


@click.command()
@click.option("--layers", default=0, help="Of a model of gpt-neo-125m's widths; 0: the demo model.")
@click.option("--effort", default="standard", type=click.Choice(get_args(Effort)))
def main(layers: int, effort: Effort) -> None:
    path = MODELS / f"neo-{layers}" if layers else MODEL
    if layers:
        make_model_apart(path, layers)
    original = open_checkpoint(path)
    probes = standard_probes(original.config, None, 0, effort)
    failed, worst = [], 0.0
    click.echo(
        "| artifact | software | probe | max abs Δ log p | float64's noise |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name, artifact in artifacts(original, Path(scratch)):
            start = time.perf_counter()
            reference = Reference.of(artifact, probes)
            middle = time.perf_counter()
            found = compare_program(open_runtime(artifact, "cpu"), reference)
            spent = f"{middle - start:.1f} s reference, {time.perf_counter() - middle:.1f} s run"
            click.echo("\n".join(rows(name, found)))
            print(f"{name}: {spent}", file=sys.stderr)
            worst = max([worst, *(p.max_abs_logprob_diff for p in found.probes)])
            failed += [name] if found.evidence.outcome != "same" else []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    names = ("transformer-lens", "transformers", "torch", "onnxruntime")
    click.echo(
        f"\nAt most {worst:.1e}; {MAX_TIMES:g} times the noise is allowed. Peak {peak:.0f} MiB."
        f"\n{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()},"
        f" {', '.join(f'{name} {installed(name)}' for name in names)}"
    )
    if failed:
        click.echo(f"NOT THE SAME: {', '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
