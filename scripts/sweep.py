"""A sweep of tiny checkpoints, tried: what a second run does, its speed, and the disk it takes.

5 in 100 conversions are killed while they write, 1 in 100 sources is cut off, 10 in 100 are copies of
another. The first run names the failures; the same command then does what is left, and nothing else.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from tests.models import random_hf

SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "num_layers": 4, "num_heads": 16, "window_size": 16,
    "max_position_embeddings": 128, "intermediate_size": 256,
}  # fmt: skip
"""As TinyStories-1M in everything but its size: half its layers, a fiftieth of its vocabulary."""
# A worker that comes to a checkpoint that is named in KILL dies while it writes; none has a second time.
KILLING = """
import os
from pathlib import Path
from converter.checkpoint.writer import Writer
write = Writer.write
def dying(self, *args):
    name = self.directory.parent.name[1:].partition(".")[0]
    if name in os.environ["KILL"].split():
        write(self, *args)
        os.kill(os.getpid(), 9)
    write(self, *args)
Writer.write = dying
from converter.cli import main
if __name__ == "__main__":
    main()
"""


@dataclass
class Run:
    """One `neoconvert batch`."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    came: list[float] = field(default_factory=list)
    """When each line did, in seconds from the start."""
    waited: list[float] = field(default_factory=list)
    """How long each process had waited for a core until then, on average: what others took."""
    seconds: float = 0.0
    cpu: float = 0.0
    code: int = 0
    peak: int = 0
    """Bytes beside the finished outputs, at most."""

    @property
    def counts(self) -> dict[str, int]:
        found = self.lines[-1]["summary"]
        return {k: found[k] for k in ("converted", "there")} | dict(found["failed"])

    def rate(self, skipped: int, *, alone: bool = False) -> float:
        """Checkpoints in a second, once each process has its libraries. `alone`: as if nothing else
        ran here, without the time that the processes were ready and had no core."""
        took = self.came[-2] - self.came[skipped - 1]
        if alone:
            took -= self.waited[-2] - self.waited[skipped - 1]
        return (len(self.lines) - 1 - skipped) / took


def run(root: Path, output: str, *, jobs: int, sources: str = "*", kill: str = "") -> Run:
    """All checkpoints that match, to a directory of outputs."""
    manifest = root / "manifest.csv"
    manifest.write_text(
        "command,source,output,process,effort\n"
        f"hf-to-tl,{root}/runs/{sources},{root}/{output}/{{name}},default,quick\n"
    )
    program = root / "killing.py"
    program.write_text(KILLING)
    start = [str(program)] if kill else ["-m", "converter"]
    command = [sys.executable, *start, "batch", str(manifest), "--json", "--jobs", str(jobs)]
    env = {**os.environ, "KILL": kill, "PYTHONPATH": os.getcwd()}
    if jobs == 1:
        env["OMP_NUM_THREADS"] = "1"  # one core, as each of many has
    done, before, begun = Run(), resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    said = root / "lines.jsonl"
    with open(said, "wb") as to, open(said) as lines, subprocess.Popen(
        command, env=env, stdout=to, stderr=subprocess.DEVNULL
    ) as process:  # fmt: skip
        rest, ended = "", False
        waits: dict[int, float] = {}
        while not ended:
            ended = process.poll() is not None
            *whole, rest = (rest + lines.read()).split("\n")
            done.lines += map(json.loads, whole)
            done.came += [time.monotonic() - begun] * len(whole)
            waits |= waiting(process.pid, jobs)
            done.waited += [sum(waits.values()) / jobs] * len(whole)
            done.peak = max(done.peak, unfinished(root / output))
            time.sleep(0.01)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    done.seconds, done.code = time.monotonic() - begun, process.returncode
    done.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done


def waiting(pid: int, jobs: int) -> dict[int, float]:
    """Seconds that each process that converts was ready and had no core, by its id."""
    try:
        pids = [pid]
        if jobs > 1:
            pids = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return {p: int(Path(f"/proc/{p}/schedstat").read_text().split()[1]) / 1e9 for p in pids}
    except OSError:  # it has ended
        return {}


def unfinished(output: Path) -> int:
    """Bytes in the places where outputs are made."""
    if not output.is_dir():
        return 0
    folders = [entry.path for entry in os.scandir(output) if entry.name.startswith(".")]
    return sum(size(Path(folder)) for folder in folders)


def size(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:  # it was renamed just now
                continue
    return total


def make(root: Path, count: int) -> tuple[list[str], list[str]]:
    """The checkpoints. Returns the names to kill at, and those that are cut off."""
    rng = np.random.default_rng(0)
    names = [f"checkpoint-{i}" for i in range(count)]
    order = rng.permutation(count)
    copies, cut, kill = np.split(order, [count // 10, count // 10 + count // 100])
    made = [i for i in range(count) if i not in set(copies)]
    for i in made:
        random_hf(root / "runs" / names[i], seed=i, **SHAPE)
    whole = [i for i in made if i not in set(cut)]
    for i in copies:
        shutil.copytree(root / "runs" / names[rng.choice(whole)], root / "runs" / names[i])
    for i in cut:
        weights = root / "runs" / names[i] / "model.safetensors"
        os.truncate(weights, weights.stat().st_size * 2 // 3)
    return [names[i] for i in kill[: count // 20]], [names[i] for i in cut]


def speeds(root: Path, jobs: int, rounds: int, timed: int) -> Iterator[tuple[Run, Run]]:
    """One process and many, in turn, on the same sound checkpoints."""
    some = sorted(p for p in (root / "runs").iterdir() if not _is_cut(p))[:timed]
    for path in some:
        os.rename(path, path.with_name(f"timed-{path.name}"))
    for turn in range(rounds):
        pair = []
        for n in (1, jobs) if turn % 2 == 0 else (jobs, 1):
            shutil.rmtree(root / "timed", ignore_errors=True)
            pair.append((n, run(root, "timed", jobs=n, sources="timed-*")))
        yield dict(pair)[1], dict(pair)[jobs]
    for path in some:
        os.rename(path.with_name(f"timed-{path.name}"), path)


def _is_cut(path: Path) -> bool:
    weights = path / "model.safetensors"
    with open(weights, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        end = max(t["data_offsets"][1] for t in json.loads(file.read(header)).values() if "data_offsets" in t)  # fmt: skip
    return bool(weights.stat().st_size != 8 + header + end)


@click.command()
@click.option("--count", default=1000, show_default=True, help="How many checkpoints.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--rounds", default=3, show_default=True, help="Of the comparison of speeds.")
@click.option("--timed", default=60, show_default=True, help="Checkpoints in each of them.")
def main(count: int, jobs: int, rounds: int, timed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
        root = Path(scratch)
        kill, cut = make(root, count)
        faster: dict[bool, list[float]] = {False: [], True: []}
        for one, many in speeds(root, jobs, rounds, timed):
            for alone, found in faster.items():
                ones, manys = one.rate(2, alone=alone), many.rate(2 * jobs, alone=alone)
                found.append(manys / ones / jobs)
                print(f"1 process: {ones:.2f}/s; {jobs}: {manys:.2f}/s{', alone' if alone else ''};"
                      f" load {os.getloadavg()[0]:.1f}", file=sys.stderr)  # fmt: skip
        runs = [
            ("first", run(root, "tl", jobs=jobs, kill=" ".join(kill))),
            ("second", run(root, "tl", jobs=jobs)),
            ("third", run(root, "tl", jobs=jobs)),
        ]
        print("| run | converted | there already | transient | permanent | exit code | seconds |")
        print("|---|---|---|---|---|---|---|")
        for name, ran in runs:
            figures = " | ".join(map(str, ran.counts.values()))
            print(f"| {name} | {figures} | {ran.code} | {ran.seconds:.0f} |")
        first, second, third = (ran for _, ran in runs)
        largest = max(size(path) for path in (root / "tl").iterdir())
        peak = max(ran.peak for _, ran in runs)
        equal = sum(len(group) - 1 for group in first.lines[-1]["summary"]["same_weights"])
        equal_now = sum(len(group) - 1 for group in second.lines[-1]["summary"]["same_weights"])
        print(
            f"\nKilled: {len(kill)}. Cut off: {len(cut)}. Copies reported: {equal}, then {equal_now}."
        )
        for alone, found in faster.items():
            without = ", without the time that others had the cores" if alone else ""
            print(f"Speed of {jobs} processes over {jobs} times that of one{without}: median"
                  f" {statistics.median(found):.2f} ({', '.join(f'{x:.2f}' for x in found)}).")  # fmt: skip
        print(f"Disk beside the finished outputs: at most {peak / largest:.2f} outputs.")
        print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python"
              f" {platform.python_version()}, load {os.getloadavg()[0]:.1f}")  # fmt: skip
        sys.exit(_wrong(kill, cut, root, first, second, third))


def _wrong(kill: list[str], cut: list[str], root: Path, *runs: Run) -> int:
    """How many of the claims do not hold."""
    first, second, third = runs

    def names(ran: Run, status: str, **more: bool) -> list[str]:
        return sorted(
            Path(x["source"]).name for x in ran.lines[:-1]
            if x["status"] == status and all(x.get(k) == v for k, v in more.items())
        )  # fmt: skip

    left = Counter(p.name.startswith(".") for p in (root / "tl").iterdir())
    claims = {
        "those killed are named, as what may pass": names(first, "failed", transient=True)
        == sorted(kill),
        "the others that fail are those cut off": names(first, "failed", transient=False)
        == sorted(cut),
        "the second run converts those killed": names(second, "converted") == sorted(kill),
        "and names those cut off": names(second, "failed") == sorted(cut),
        "the third has nothing to do": names(third, "converted") == [],
        "all others are there": left == {False: len(first.lines) - 1 - len(cut)},
    }
    for claim, holds in claims.items():
        if not holds:
            print(f"DOES NOT HOLD: {claim}", file=sys.stderr)
    return sum(not holds for holds in claims.values())


if __name__ == "__main__":
    main()
