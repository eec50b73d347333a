"""ONNX exports at 125M size, side by side: ours, optimum's, torch's, and transformers itself.

Exports and sessions are measured in fresh processes, by the kernel; speed in `onnx_speed`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version

import click
from rich.console import Console
from rich.table import Table

from scripts.bench import measure
from scripts.models import MODELS, make_model_apart

HF, SCRATCH = MODELS / "neo-12", MODELS / "onnx-side-by-side"
GRAPHS = {
    "neoconvert": HF / "side-by-side.onnx",
    "optimum": SCRATCH / "optimum" / "model.onnx",
    "dynamo": SCRATCH / "dynamo" / "model.onnx",
}

# The exporters, as their own documentation calls them. argv: the HF directory, the graph.
EXPORTERS = {
    "neoconvert": """
import sys; from pathlib import Path
from converter.checkpoint import open_checkpoint
from converter.onnx import export
export(open_checkpoint(Path(sys.argv[1])), file_name=Path(sys.argv[2]).name)
""",
    "optimum": """
import sys; from pathlib import Path
from optimum.exporters.onnx import main_export
task = "text-generation-with-past"
main_export(sys.argv[1], Path(sys.argv[2]).parent, task=task, do_validation=False)
""",
    "dynamo": """
import sys, torch; from pathlib import Path; from transformers import AutoModelForCausalLM
class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits
inputs = {name: torch.ones(2, 16, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
program = torch.onnx.export(Logits().eval(), (), kwargs=inputs, dynamo=True, verbose=False,
                            output_names=["logits"], dynamic_shapes=dict.fromkeys(inputs, free))
Path(sys.argv[2]).parent.mkdir(parents=True)
program.save(sys.argv[2], external_data=True)
""",
}
OPEN = """
import json, sys, time; from pathlib import Path
import onnxruntime
from converter.onnx import Session
start = time.perf_counter()
session = Session(Path(sys.argv[1]), lean=sys.argv[2] == "lean")
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([seconds, int(status["VmRSS"].split()[0]) / 1024]))
"""

Samples = Mapping[str, list[float]]


def measure_exports(rounds: int) -> tuple[Samples, Samples, dict[str, int]]:
    """Seconds, peak MiB, and bytes on disk beyond the weights that were there."""
    seconds, peaks, written = defaultdict(list), defaultdict(list), {}
    for _ in range(rounds):
        for name, program in EXPORTERS.items():
            graph = GRAPHS[name]
            ours = graph.parent == HF
            graph.unlink(missing_ok=True)
            if not ours:
                shutil.rmtree(graph.parent, ignore_errors=True)
            python = sys.executable if ours else ".venvs/optimum/bin/python"
            run = measure([python, "-c", program, str(HF), str(graph)])
            seconds[name].append(run.seconds)
            peaks[name].append(run.peak)
            files = [graph] if ours else graph.parent.iterdir()
            written[name] = sum(file.stat().st_size for file in files)
    return seconds, peaks, written


def measure_opening(rounds: int) -> tuple[Samples, Samples]:
    """Seconds to open a session in a fresh process, and the resident MiB of that process."""
    seconds, resident = defaultdict(list), defaultdict(list)
    for _ in range(rounds):
        for how in ("lean", "default"):
            command = [sys.executable, "-c", OPEN, str(GRAPHS["neoconvert"]), how]
            took, size = json.loads(subprocess.check_output(command))
            seconds[how].append(took)
            resident[how].append(size)
    return seconds, resident


def table(title: str, rows: Mapping[str, tuple[str, Samples]], base: str) -> Table:
    """Medians, each with its ratio to that of `base`. `rows`: a number format and samples."""
    names = list(dict.fromkeys(name for _, samples in rows.values() for name in samples))
    out = Table(title, *names)
    for label, (style, samples) in rows.items():
        medians = {name: statistics.median(values) for name, values in samples.items()}
        cells = [
            f"{medians[n]:{style}} (×{medians[n] / medians[base]:.2f})" if n in medians else "–"
            for n in names
        ]
        out.add_row(label, *cells)
    return out


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    load = f"{os.getloadavg()[0]:.1f}"
    make_model_apart(HF, 12)
    SCRATCH.mkdir(exist_ok=True)
    try:
        seconds, peaks, written = measure_exports(min(rounds, 3))
        opening, resident = measure_opening(rounds)
        from scripts.onnx_speed import measure_speed

        speed, errors = measure_speed(GRAPHS, HF, rounds)
    finally:
        shutil.rmtree(SCRATCH)
        GRAPHS["neoconvert"].unlink(missing_ok=True)
    console = Console(width=100)
    size = {name: [n / 1e6] for name, n in written.items()}
    export = {"seconds": (".2f", seconds), "peak MiB": (".0f", peaks), "MB written": (".2f", size)}
    console.print(table("export", export, "neoconvert"))
    milliseconds = {task: (".1f", samples) for task, samples in speed.items()}
    console.print(table("milliseconds", milliseconds, "neoconvert"))
    start = {"seconds": (".3f", opening), "resident MiB": (".0f", resident)}
    console.print(table("opening a session", start, "lean"))
    worst = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    packages = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "onnxruntime"))
    console.print(
        f"Logits, at most off transformers' by: {worst}.\n"
        f"Medians of {rounds} rounds. {datetime.now():%Y-%m-%d %H:%M}, {platform.platform()},"
        f" {os.cpu_count()} cores, load {load} before and {os.getloadavg()[0]:.1f} after; {packages}."
    )


if __name__ == "__main__":
    main()
