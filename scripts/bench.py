"""Wall time and peak memory of conversions at 125M size, side by side with the libraries' own way.

Each figure is the median over rounds of a fresh process, measured by the kernel (wait4).
"The libraries' way" is what one writes without neoconvert: load the model in transformers, let
TransformerLens convert its weights, save the state dict.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from converter.checkpoint import open_checkpoint
from scripts.models import MODELS, make_model_apart

LIBRARIES = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformer_lens.pretrained.weight_conversions import convert_neo_weights
from transformer_lens import HookedTransformer, HookedTransformerConfig
source, cfg, out = sys.argv[1:]
c = json.load(open(cfg)); c["dtype"] = torch.float32
model = AutoModelForCausalLM.from_pretrained(source)
c = HookedTransformerConfig.from_dict(c)
tl = HookedTransformer(c)
tl.load_state_dict(convert_neo_weights(model, c), strict=False)
save_file({k: v.contiguous() for k, v in tl.state_dict().items()}, out)
"""


def measure(command: list[str], output: Path) -> tuple[float, float]:
    """Seconds and peak MiB of one process."""
    if output.is_dir():
        shutil.rmtree(output)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"failed: {' '.join(command)[:200]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--layers", default=12, show_default=True, help="12 is gpt-neo-125m.")
def main(rounds: int, layers: int) -> None:
    hf = MODELS / f"neo-{layers}"
    make_model_apart(hf, layers)
    size = sum(t.nbytes for t in open_checkpoint(hf).stored.values()) / 2**20
    hooked, bridge, back = MODELS / "bench-hooked", MODELS / "bench-bridge", MODELS / "bench-back"
    neoconvert = [sys.executable, "-m", "converter"]
    plain = ["--no-verify", "--overwrite", "--quiet"]
    tasks = {
        "hf-to-tl --layout hooked": ([*neoconvert, "hf-to-tl", str(hf), str(hooked), *plain], hooked),
        "tl-to-hf": ([*neoconvert, "tl-to-hf", str(hooked), str(back), *plain], back),
        "hf-to-tl --layout bridge": (
            [*neoconvert, "hf-to-tl", str(hf), str(bridge), "--layout", "bridge", *plain], bridge),
    }  # fmt: skip
    results = {
        name: [measure(command, out) for _ in range(rounds)]
        for name, (command, out) in tasks.items()
    }
    theirs = [sys.executable, "-c", LIBRARIES, str(hf), str(hooked / "cfg.json")]
    file = MODELS / "bench-libraries.safetensors"
    results["the libraries' way (HF → hooked)"] = [
        measure([*theirs, str(file)], file) for _ in range(rounds)
    ]
    table = Table("", "seconds", "peak MiB", "÷ ours (time)", "÷ ours (memory)")
    ours = [
        statistics.median(column)
        for column in zip(*results["hf-to-tl --layout hooked"], strict=True)
    ]
    for name, rows in results.items():
        seconds, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{peak:.0f}",
            f"{seconds / ours[0]:.1f}",
            f"{peak / ours[1]:.1f}",
        )
    console = Console(width=100)
    console.print(table)
    console.print(
        f"Model {size:.0f} MiB; {rounds} rounds; {os.cpu_count()} cores; no verification."
    )


if __name__ == "__main__":
    main()
