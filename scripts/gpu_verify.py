"""Artifacts of published sizes, verified on the GPU: a table, and the same as JSON.

Weights are seeded and made here. What is not installed (TransformerLens, onnxruntime) is left out,
and said to be.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import converter
from converter.checkpoint import Checkpoint
from converter.errors import NeoconvertError
from converter.verification import Probe, verify
from converter.verification.loading import has_bridge, has_hooked_transformer, installed
from converter.verification.subjects import subjects_of
from scripts.models import MODELS, SIZES, make_model

ROUNDS = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Artifact:
    """What is made of a model, and what must be installed to run it."""

    name: str
    make: Callable[[Path, Path], object]
    there: bool


def artifacts() -> list[Artifact]:
    """HF, processed HF, and as far as they can run here, TransformerLens's layouts and ONNX."""
    quick: dict[str, Any] = {"check": False, "overwrite": True}
    ort = bool(installed("onnxruntime") or installed("onnxruntime-gpu"))

    def tl(layout: Any, process: str) -> Callable[[Path, Path], object]:
        return lambda source, out: converter.hf_to_tl(
            source, out, layout=layout, process=process, **quick
        )

    return [
        Artifact("hf", lambda source, out: shutil.copytree(source, out, dirs_exist_ok=True), True),
        Artifact("baked", lambda source, out: converter.bake(source, out, **quick), True),
        Artifact("hooked", tl("hooked", "none"), has_hooked_transformer()),
        Artifact("hooked, default steps", tl("hooked", "default"), has_hooked_transformer()),
        Artifact("bridge", tl("bridge", "none"), has_bridge()),
        Artifact("bridge, default steps", tl("bridge", "default"), has_bridge()),
        Artifact("onnx", lambda source, out: converter.export_onnx(source, out, **quick), ort),
    ]


def rows(size: str, options: argparse.Namespace) -> Iterator[Row]:
    """Each artifact of one model, in each runtime."""
    source = options.work / f"neo-{size}"
    print(f"making {source} ...", flush=True)
    make_model(source, *SIZES[size])
    original = converter.open_checkpoint(source)
    for artifact in artifacts():
        base = {"model": size, "artifact": artifact.name}
        if not artifact.there:
            yield base | {"skipped": "its software is not installed"}
            continue
        out = options.work / "artifact"
        shutil.rmtree(out, ignore_errors=True)
        try:
            artifact.make(source, out)
            yield from measured(base, original, converter.open_artifact(out), options)
        except NeoconvertError as error:
            yield base | {"skipped": error.what}
        shutil.rmtree(out, ignore_errors=True)


def measured(
    base: Row, original: Checkpoint, artifact: Checkpoint, options: argparse.Namespace
) -> Iterator[Row]:
    began = time.perf_counter()
    result = verify(original, artifact, device=options.device, effort=options.effort)
    seconds = time.perf_counter() - began
    throughput = tokens_per_second(artifact, options.device)
    for ran in (r for r in result.runtimes if r.role == "artifact"):
        probes = [p for p in result.probes if p.runtime == ran.what]
        yield base | {
            "runtime": ran.what,
            "version": ran.version,
            "device": ran.device,
            "passed": result.passed,
            "max_abs_logprob_diff": max(p.max_abs_logprob_diff for p in probes),
            "noise_floor": max(p.noise_floor for p in probes),
            "ratio": max(p.ratio for p in probes),
            "top1_agreement": min(p.top1_agreement for p in probes),
            "tokens_per_second": throughput.get(ran.what),
            "verification_seconds": seconds,
            "probes": [{k: v for k, v in asdict(p).items() if k != "by_position"} for p in probes],
        }


def tokens_per_second(artifact: Checkpoint, device: str) -> dict[str, float]:
    """Median throughput of a forward pass over 4 sequences of 512 tokens, by runtime."""
    rng = np.random.default_rng(0)
    length = min(512, artifact.config.n_ctx)
    probe = Probe("speed", rng.integers(0, artifact.config.d_vocab, (4, length), dtype=np.int64))
    found = {}
    for subject in subjects_of(artifact, device):
        runtime = subject.open()
        times = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            float(runtime.logits(probe)[0, 0, 0])  # waits for the GPU
            times.append(time.perf_counter() - began)
        found[runtime.what] = probe.tokens.size / statistics.median(times[1:])
        del runtime
    return found


def machine(device: str) -> Row:
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    names = ("torch", "transformers", "transformer-lens", "onnxruntime", "onnxruntime-gpu")
    return {
        "date": date.today().isoformat(),
        "card": torch.cuda.get_device_name() if cuda else None,
        "cpu": platform.processor() or platform.machine(),
        "tf32": False,
        "versions": {n: installed(n) for n in names if installed(n)},
    }


def table(found: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| model | artifact | runtime | device | max \\|Δ log p\\| | ratio to the floor | tokens/s | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        head = f"| {row['model']} | {row['artifact']} |"
        if "skipped" in row:
            lines.append(f"{head} — | — | — | — | — | {row['skipped']} |")
            continue
        speed = row["tokens_per_second"]
        lines.append(
            f"{head} {row['runtime']} {row['version']} | {row['device']} |"
            f" {row['max_abs_logprob_diff']:.1e} | {row['ratio']:.2f} |"
            f" {'—' if speed is None else f'{speed:,.0f}'} |"
            f" {'verified' if row['passed'] else 'NOT VERIFIED'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["125m", "1.3b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--effort", choices=["quick", "standard", "thorough"], default="standard")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=MODELS / "gpu", help="where models are made")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU here. (--device cpu runs the same there.)")
        return 4
    facts, found = machine(options.device), []
    for size in options.sizes:
        for row in rows(size, options):
            found.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    print(f"\n{facts['date']}, {facts['card'] or facts['cpu']}, TF32 off, {facts['versions']}\n")
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": found}, indent=1, default=str) + "\n")
    ran = [row for row in found if "skipped" not in row]
    return 0 if ran and all(row["passed"] for row in ran) else 1


if __name__ == "__main__":
    raise SystemExit(main())
