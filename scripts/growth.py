"""docs/growth.svg: how time and memory grow with the model, from what `scripts/bench --json` wrote."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from scripts.models import SIZES, weight_bytes

OUT = Path(__file__).resolve().parent.parent / "docs/growth.svg"
DRAWN = {
    "cp and sync": "cp and sync",
    "hf-to-tl --layout hooked": "hf-to-tl --layout hooked",
    "… --process default": "hf-to-tl --process default",
    "tl-to-hf, exact ledger": "tl-to-hf, exact ledger",
    "TransformerLens 3.9: load, process, save": "TransformerLens 3.9",
}
"""Jobs of scripts/bench, and what they are called in the picture."""


def main(files: list[Path]) -> None:
    sizes = {
        name: each
        for file in files
        for name, each in json.loads(file.read_text()).items()
        if name in SIZES
    }
    gigabytes = {name: weight_bytes(*SIZES[name]) / 1e9 for name in sizes}
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "neoconvert", "font.size": 9}
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for job, label in DRAWN.items():
        runs = {name: each[job] for name, each in sizes.items() if job in each}
        across = [gigabytes[name] for name in runs]
        for axes, field in ((time, "seconds"), (memory, "peak")):
            up = [statistics.median(run[field] for run in each) for each in runs.values()]
            axes.plot(across, up, "o-", markersize=4, linewidth=1.2, label=label)
    for axes, title in ((time, "seconds"), (memory, "peak MiB")):
        axes.set(title=title, xlabel="GB of weights", xscale="log", yscale="log")
        axes.set_xticks(
            list(gigabytes.values()), [f"{gb:.1f}\n{name}" for name, gb in gigabytes.items()]
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time.legend(frameon=False, fontsize=8)
    figure.savefig(OUT, metadata={"Date": None})
    print(OUT)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
