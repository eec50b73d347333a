"""Time and memory of every job, beside what one would use instead, in interleaved rounds.

Each figure is the median over rounds of a fresh process: wall time, the peak of the resident
memory of its process tree, and the anonymous part of that (files that are mapped left out), from
/proc every 10 ms. Outputs are removed before each run. In a round the jobs take turns, so that a
slow minute of the machine's meets all of them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from scripts.models import MODELS, SIZES, make_model_apart

REPOSITORY = Path(__file__).resolve().parent.parent
TL3, TL4 = (str(REPOSITORY / f".venvs/{name}/bin/python") for name in ("tl3", "tl4"))

HOOKED = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformer_lens.pretrained.weight_conversions import convert_neo_weights
from transformer_lens import HookedTransformer, HookedTransformerConfig
source, cfg, out, process = sys.argv[1:]
config = json.load(open(cfg)); config["dtype"] = torch.float32
model = AutoModelForCausalLM.from_pretrained(source)
config = HookedTransformerConfig.from_dict(config)
tl = HookedTransformer(config)
yes = process == "default"
tl.load_and_process_state_dict(convert_neo_weights(model, config), fold_ln=yes,
    center_writing_weights=yes, center_unembed=yes, fold_value_biases=yes)
save_file({k: v.contiguous() for k, v in tl.state_dict().items()}, out + "/model.safetensors")
"""
BRIDGE = """
import sys
from safetensors.torch import save_file
from transformer_lens.model_bridge import TransformerBridge
source, out = sys.argv[1:]
bridge = TransformerBridge.boot_transformers(source)
bridge.enable_compatibility_mode()
save_file({k: v.clone() for k, v in bridge.state_dict().items()}, out + "/model.safetensors")
"""
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
source, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(source).save_pretrained(out)
"""


@dataclass(frozen=True)
class Job:
    name: str
    command: list[str]
    output: Path | None
    beside: str | None = None
    """The job of ours that does the same."""


@dataclass(frozen=True)
class Run:
    seconds: float
    peak: float
    anonymous: float


def jobs(source: Path, place: Path, verified: bool) -> Iterator[Job]:
    """`place` is a folder for outputs. In an order in which each finds what it reads."""
    weights = source / "model.safetensors"
    copy = f'cp "{weights}" "{place}/copy" && sync "{place}/copy"'
    yield Job("cp and sync", ["bash", "-c", copy], place / "copy")

    def ours(name: str, *arguments: str, output: str | None) -> Job:
        given = [str(place / output)] if output else []
        command, first, *rest = arguments
        return Job(
            name, [TL3, "-m", "converter", command, first, *given, *rest, "--quiet"],
            place / output if output else None,
        )  # fmt: skip

    plain = ("--no-verify",)
    hf, processed = str(source), (*plain, "--layout", "hooked", "--process")
    yield ours(
        "hf-to-tl --layout bridge", "hf-to-tl", hf, *plain, "--layout", "bridge", output="bridge"
    )
    yield ours(
        "hf-to-tl --layout hooked", "hf-to-tl", hf, *plain, "--layout", "hooked", output="raw"
    )
    yield ours("… --process default", "hf-to-tl", hf, *processed, "default", output="compact")
    yield ours("… --process default --ledger exact", "hf-to-tl", hf, *processed, "default",
               "--ledger", "exact", output="exact")  # fmt: skip
    yield ours("… --process all", "hf-to-tl", hf, *processed, "all", output="all")
    yield ours("bake", "bake", hf, *plain, output="baked")
    yield ours("tl-to-hf, raw", "tl-to-hf", str(place / "raw"), *plain, output="back-raw")
    yield ours(
        "tl-to-hf, compact ledger", "tl-to-hf", str(place / "compact"), *plain, output="back"
    )
    yield ours(
        "tl-to-hf, exact ledger", "tl-to-hf", str(place / "exact"), *plain, output="back-exact"
    )
    yield ours("tl-to-hf --reverse functional", "tl-to-hf", str(place / "compact"), *plain,
               "--reverse", "functional", output="functional")  # fmt: skip
    yield ours("inspect", "inspect", hf, output=None)
    explain = [TL3, "-m", "converter", "explain", hf, str(place / "compact"), "--json"]
    yield Job("explain", explain, None)
    if verified:
        bridge, record = str(place / "bridge"), str(place / "original.reference")
        yield ours("verify, by the original", "verify", hf, bridge, output=None)
        both = bridge, str(place / "raw")
        yield ours("verify, two artifacts", "verify", hf, *both, output=None)
        yield ours("reference", "reference", hf, output="original.reference")
        yield ours("verify, by the reference file", "verify", record, bridge, output=None)
        for effort in ("quick", "standard"):
            for made, steps in (
                ("hf-to-tl --layout hooked", "none"),
                ("… --process default", "default"),
            ):
                yield ours(f"{made}, verified ({effort})", "hf-to-tl", hf, "--layout", "hooked",
                           "--process", steps, "--effort", effort, output="verified")  # fmt: skip
    cfg = str(place / "raw" / "cfg.json")
    theirs = str(place / "theirs")

    def library(name: str, beside: str, python: str, program: str, *arguments: str) -> Job:
        return Job(name, [python, "-c", program, *arguments], place / "theirs", beside)

    raw, default = "hf-to-tl --layout hooked", "… --process default"
    yield library("TransformerLens 3.9: load, save", raw, TL3, HOOKED, hf, cfg, theirs, "none")
    yield library(
        "TransformerLens 3.9: load, process, save", default, TL3, HOOKED, hf, cfg, theirs, "default"
    )
    yield library(
        "TransformerLens 4.3: bridge, compatibility mode, save", default, TL4, BRIDGE, hf, theirs
    )
    yield library("transformers: load, save", "tl-to-hf, raw", TL3, TRANSFORMERS, hf, theirs)


def run(job: Job, kept: bool) -> Run:
    """`kept`: another job reads the output. All outputs at once would not fit the disk."""
    _remove(job.output)
    if job.beside and job.output:
        job.output.mkdir(parents=True)
    found = measure(job.command)
    if not kept:
        _remove(job.output)
    return found


def _remove(output: Path | None) -> None:
    if output and output.is_dir():
        shutil.rmtree(output)
    elif output:
        output.unlink(missing_ok=True)


def _read_by_others(job: Job, listed: list[Job]) -> bool:
    others = (word for other in listed if other.output != job.output for word in other.command)
    return any(str(job.output) in word for word in others)


def measure(command: list[str]) -> Run:
    """One fresh process and its children."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed neoconvert is compiled
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    peak = anonymous = 0.0
    while process.poll() is None:
        sizes = [_resident(pid) for pid in _tree(process.pid)]
        peak = max(peak, sum(size for size, _ in sizes))
        anonymous = max(anonymous, sum(part for _, part in sizes))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.returncode:
        assert process.stderr is not None
        said = process.stderr.read().decode(errors="replace")[-1500:]
        raise click.ClickException(
            f"ended with {process.returncode}: {' '.join(command)[:200]}\n{said}"
        )
    return Run(seconds, peak, anonymous)


def _tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += _tree(int(child))
    except OSError:
        pass  # it has just ended
    return found


def _resident(pid: int) -> tuple[float, float]:
    """MiB, and how many of them are anonymous."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    fields = dict(line.split(":", 1) for line in lines)
    size, part = (int(fields.get(f, "0").split()[0]) / 1024 for f in ("VmRSS", "RssAnon"))
    return size, part


def _median(runs: list[Run]) -> Run:
    return Run(
        *(statistics.median(getattr(r, f) for r in runs) for f in ("seconds", "peak", "anonymous"))
    )


def table(size: str, medians: dict[str, Run], listed: list[Job]) -> Table:
    """A library's line has its ratios to the line of ours that does the same."""
    result = Table(
        size, "seconds", "÷ cp", "peak MiB", "of it anonymous", "÷ ours (time)", "÷ ours (memory)"
    )
    base = medians["cp and sync"]
    for job in listed:
        mine, ours = medians[job.name], medians.get(job.beside or "")
        ratios = (
            (f"{mine.seconds / ours.seconds:.1f}", f"{mine.peak / ours.peak:.1f}")
            if ours
            else ("", "")
        )
        result.add_row(
            job.name, f"{mine.seconds:.2f}", f"{mine.seconds / base.seconds:.2f}",
            f"{mine.peak:,.0f}", f"{mine.anonymous:,.0f}", *ratios,
        )  # fmt: skip
    return result


@click.command()
@click.option("--sizes", default="125m", show_default=True, help=f"Any of {', '.join(SIZES)}.")
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--only",
    multiple=True,
    default=("",),
    help="Repeatable. Jobs whose names hold this; what they read must be there, or among them.",
)
@click.option("--verified", is_flag=True, help="Also conversions that verify.")
@click.option("--theirs/--no-theirs", default=True, help="Also the libraries.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write every run there.")
def main(
    sizes: str,
    rounds: int,
    only: tuple[str, ...],
    verified: bool,
    theirs: bool,
    report: Path | None,
) -> None:
    console = Console(width=150)
    document: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "rounds": rounds,
    }
    for size in sizes.split(","):
        source, place = MODELS / size, MODELS / f"bench-{size}"
        make_model_apart(source, *SIZES[size])
        place.mkdir(exist_ok=True)
        listed = [
            job
            for job in jobs(source, place, verified)
            if job.name.startswith("cp ") or any(words in job.name for words in only)
        ]
        listed = [j for j in listed if theirs or not j.beside]
        runs: dict[str, list[Run]] = {}
        for turn in range(rounds):
            for job in listed:
                print(f"{size}, round {turn + 1} of {rounds}: {job.name}", file=sys.stderr)
                runs.setdefault(job.name, []).append(run(job, _read_by_others(job, listed)))
                document[size] = {name: [vars(r) for r in each] for name, each in runs.items()}
                if report:  # after each job: a long run may be cut short
                    report.write_text(json.dumps(document, indent=2) + "\n")
        console.print(table(size, {name: _median(r) for name, r in runs.items()}, listed))
        if only == ("",):
            shutil.rmtree(place)
    console.print(f"Medians of {rounds} rounds; {os.cpu_count()} cores; {document['date']}.")


if __name__ == "__main__":
    main()
