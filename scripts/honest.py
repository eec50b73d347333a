"""Honest conversions of random and ill-conditioned models: verification must flag none.

One seed makes a model, a way to convert it and the artifact: weights at up to four times the size
that keeps activations as they are, LayerNorm gains over up to six decades, float16, bfloat16 and
float32, every layout, any of the 32 sets of steps, their reversal, and graphs.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import NotRepresentable
from converter.onnx import export
from converter.opening import Given, open_artifact
from converter.processing import STEPS
from converter.verification import MAX_RATIO, Verification, verify
from converter.verification.loading import installed
from tests.models import random_hf

Rng = np.random.Generator
Pair = tuple[Checkpoint, Checkpoint]
"""The original and the artifact, as verification is to compare them."""


@dataclass(frozen=True)
class Honest:
    """What verification says of one honest conversion."""

    seed: int
    kind: str
    what: str
    """The model and how it was converted."""
    result: Verification | None
    """None: the conversion itself refused, as where float16 cannot hold a weight."""

    @property
    def ratios(self) -> list[float]:
        return [probe.ratio for probe in self.result.probes] if self.result else []


def model(rng: Rng) -> dict[str, Any]:
    """Arguments of `random_hf`: from well-conditioned to nearly chaotic."""
    heads, width, layers = (int(rng.choice(x)) for x in ((1, 2, 4), (4, 8), (1, 2, 3, 4, 6)))
    return {
        "seed": int(rng.integers(2**31)),
        "scale": float(np.round(rng.uniform(1, 4), 2)),
        "gain_decades": float(np.round(rng.choice([0.3, 1, 2, 3]), 2)),
        "dtype": str(rng.choice(["float32", "float32", "float16", "bfloat16"])),
        "tied": bool(rng.random() < 0.5),
        "num_layers": layers,
        "num_heads": heads,
        "hidden_size": heads * width,
        "intermediate_size": int(rng.integers(3, 40)),
        "window_size": int(rng.integers(1, 12)),
        "max_position_embeddings": int(rng.integers(2, 40)),
        "vocab_size": int(rng.integers(2, 140)),
        "activation_function": str(rng.choice(["gelu_new", "gelu_new", "gelu", "relu"])),
    }


@dataclass
class Maker:
    """One model on its way through one conversion."""

    rng: Rng
    directory: Path
    original: Checkpoint
    said: list[str]
    """What was chosen."""

    def steps(self) -> str:
        """Any set of steps but the empty one."""
        chosen = [step.name for step in STEPS if self.rng.random() < 0.6]
        spec = ",".join(chosen) or "default"
        self.said.append(spec)
        return spec

    def dtype(self) -> str | None:
        drawn = str(self.rng.choice(["", "", "float32", "float16", "bfloat16"]))
        self.said += [f"stored as {drawn}"] if drawn else []
        return drawn or None

    def made(self, function: Callable[..., Any], source: Checkpoint, **options: Any) -> Checkpoint:
        output = self.directory / f"made-{len(list(self.directory.iterdir()))}"
        function(source, output, check=False, **options)
        return open_checkpoint(output)

    def tl(self, layout: str, process: str = "none", **options: Any) -> Checkpoint:
        return self.made(
            converter.hf_to_tl, self.original, layout=layout, process=process, **options
        )

    def any_layout(self) -> Checkpoint:
        """The model in any layout, processed or not, to export."""
        kind = str(self.rng.choice(["hf", "hooked", "bridge", "baked", "processed"]))
        self.said.append(f"of {kind}")
        if kind == "hf":
            return self.made(shutil_copy, self.original)
        if kind == "baked":
            return self.made(converter.bake, self.original, process=self.steps())
        if kind == "processed":
            return self.tl(str(self.rng.choice(["hooked", "bridge"])), self.steps())
        return self.tl(kind)


def shutil_copy(source: Checkpoint, output: Path, **_: Any) -> None:
    shutil.copytree(source.directory, output)


def _undone(maker: Maker, reverse: str, ledger: str) -> Pair:
    layout = str(maker.rng.choice(["hooked", "bridge"]))
    maker.said.append(f"in {layout}, ledger {ledger}")
    processed = maker.tl(layout, maker.steps(), ledger=ledger)
    return processed, maker.made(converter.tl_to_hf, processed, reverse=reverse)


def _graph(maker: Maker, mode: Any) -> Pair:
    source = maker.any_layout()
    output = source.directory if mode == "shared" else maker.directory / "graph"
    past = bool(maker.rng.random() < 0.8)
    return maker.original, open_artifact(export(source, output, weights=mode, with_past=past).path)


KINDS: dict[str, Callable[[Maker], Pair]] = {
    "hooked": lambda m: (m.original, m.tl("hooked", dtype=m.dtype())),
    "bridge": lambda m: (m.original, m.tl("bridge", dtype=m.dtype())),
    "hooked, processed": lambda m: (m.original, m.tl("hooked", m.steps(), dtype=m.dtype())),
    "bridge, processed": lambda m: (m.original, m.tl("bridge", m.steps(), dtype=m.dtype())),
    "HF, baked": lambda m: (
        m.original, m.made(converter.bake, m.original, process=m.steps(), dtype=m.dtype())),
    "HF again, not processed": lambda m: (
        m.original, m.made(converter.tl_to_hf, m.tl(str(m.rng.choice(["hooked", "bridge"]))))),
    "HF again, functional": lambda m: _undone(m, "functional", "none"),
    "HF again, by the ledger": lambda m: _undone(m, "auto", str(m.rng.choice(["compact", "exact"]))),
    "ONNX, shared": lambda m: _graph(m, "shared"),
    "ONNX, external": lambda m: _graph(m, "external"),
}  # fmt: skip


def honest(seed: int, directory: Path, *, recorded: bool = False) -> Honest:
    """The conversion of this seed, made in an empty directory, and its verification.

    `recorded`: by a reference file of the original.
    """
    rng = np.random.default_rng([seed, 2026])
    kind = list(KINDS)[seed % len(KINDS)]
    drawn = model(rng)
    original = open_checkpoint(random_hf(directory / "original", **drawn))
    maker = Maker(rng, directory, original, [])
    try:
        source, artifact = KINDS[kind](maker)
        given: Given = source
        if recorded:
            given = directory / "original.reference"
            converter.reference(source, given, device="cpu")
        result = verify(given, artifact, device="cpu")
    except NotRepresentable:
        result = None
    return Honest(seed, kind, f"{drawn}, {', '.join(maker.said)}", result)


def row(kind: str, found: list[Honest]) -> str:
    ratios = [ratio for one in found for ratio in one.ratios]
    refused = sum(one.result is None for one in found)
    flagged = sum(one.result is not None and not one.result.passed for one in found)
    if not ratios:
        return f"| {kind} | {len(found)} | {refused} | {flagged} | 0 | | | |"
    worst = max(found, key=lambda one: max(one.ratios, default=0))
    figures = " | ".join(f"{x:.2f}" for x in np.quantile(ratios, [0.5, 0.99, 1]))
    return (
        f"| {kind} | {len(found)} | {refused} | {flagged} | {len(ratios)} | {figures}"
        f" (seed {worst.seed}) |"
    )


def ready() -> None:
    """A process that verifies for a long time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # verification collects garbage twice; the libraries are none


def of_seed(seed: int, recorded: bool) -> Honest:
    with tempfile.TemporaryDirectory() as scratch:
        return honest(seed, Path(scratch), recorded=recorded)


@click.command()
@click.option("--count", default=240, show_default=True, help="How many conversions.")
@click.option("--start", default=0, show_default=True, help="The first seed.")
@click.option("--recorded", is_flag=True, help="Verify by a reference file of the original.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
def main(count: int, start: int, recorded: bool, jobs: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where it was started with &
    found: list[Honest] = []
    make = partial(of_seed, recorded=recorded)
    # Ctrl-C ends it with what there is.
    with (
        multiprocessing.get_context("spawn").Pool(jobs, ready) as pool,
        suppress(KeyboardInterrupt),
    ):
        for each in pool.imap(make, range(start, start + count)):
            found.append(each)
            print(f"\rseed {each.seed} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    click.echo("| artifact | conversions | refused | flagged | probes | median | 99 % | max |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        click.echo(row(kind, [one for one in found if one.kind == kind]))
    click.echo(row("all", found))
    names = ("transformer-lens", "transformers", "torch", "onnxruntime")
    click.echo(
        f"\nRatios to float32's own noise, by probe; {MAX_RATIO:g} are allowed. Seeds {start} to"
        f" {start + len(found) - 1}, weights and function.\n{datetime.date.today()},"
        f" {platform.machine()}, Python {platform.python_version()},"
        f" {', '.join(f'{name} {installed(name)}' for name in names)}"
    )
    flagged = [one for one in found if one.result is not None and not one.result.passed]
    for one in flagged:
        assert one.result is not None
        click.echo(f"FLAGGED seed {one.seed}, {one.kind}: {one.what}\n{one.result.summary()}")
    sys.exit(bool(flagged))


if __name__ == "__main__":
    main()
