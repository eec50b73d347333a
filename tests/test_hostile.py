"""Some of the hostile inputs of `scripts/hostile`, and that its checks can fail."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from converter.cli import main
from tests.hostile import inputs, trial
from tests.hostile.trial import Input, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

EXPANDED = ".bin, .pt, .ckpt: one element expanded to a gigabyte"
CHOSEN = [
    EXPANDED,
    "model.safetensors: a header of 100,000,001 bytes",
    "model.safetensors: names that forge an error",
    "ledger.safetensors: half a byte",
    "config.json: deep, beside what is there",
    "config.json: a link to zeros without end",
    "config.json: num_layers = -1",
    "cfg.json: d_head = 0",
    "model.safetensors.index.json: a shard '../model.safetensors'",
    "neoconvert.json: deep lists",
    "reference file: sealed: what it says: deep objects",
    "reference file: sealed: dimensions whose product overflows",
    "adapter_config.json: r = inf",
    ".bin, .pt, .ckpt: os.system",
    ".bin, .pt, .ckpt: zeros",
    ".bin, .pt, .ckpt: ten to the ninth by reference",
    ".onnx: functions that double 30 times (verify)",
    ".onnx: seed 1 (verify)",
    "external data: data at location 'model.onnx' (verify)",
    "tokenizer files: merges.txt: a pipe",
    "tokenizer files: vocab.json: a link to text elsewhere",
    "--text: not UTF-8",
    "--cfg: two documents",
    "names and places: OUTPUT is SOURCE",
]
"""By kind and name; each has been let in once, or stands for its kind."""


@pytest.fixture(scope="module")
def known() -> dict[str, Input]:
    for library in ("torch", "onnx"):  # so that neither counts as what an input took
        importlib.import_module(library)
    return {f"{one.kind}: {one.name}": one for one in inputs()}


def test_there_are_many(known: dict[str, Input]) -> None:
    assert len(known) == len(inputs()) > 1500  # and no two of one name
    assert {name.split(": ")[0] for name in known} == {name.split(": ")[0] for name in CHOSEN} | {
        "generation_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_why_what_is_expanded_is_refused(known: dict[str, Input]) -> None:
    assert "of which the file holds 4" in run(known[EXPANDED], main).err


@pytest.mark.parametrize("name", CHOSEN)
def test_hostile(name: str, known: dict[str, Input]) -> None:
    outcome = run(known[name], main)
    assert not outcome.wrong, (outcome.wrong, outcome.out, outcome.err)


def _waste_memory() -> None:
    np.ones(2**26)  # 512 MiB


def _waste_time() -> None:
    while True:
        os.getpid()
        if sum(os.times()[:2]) > 1:
            break


def _import() -> None:
    sys.path.insert(0, "src")
    importlib.import_module("odd")


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "writes elsewhere": (lambda: Path("../../elsewhere").write_text(""), "to write"),
    "removes elsewhere": (lambda: Path("../nothing").unlink(missing_ok=True), "os.remove"),
    "changes the source": (lambda: Path("src/model").write_text("changed"), "changed"),
    "leaves something": (lambda: Path("src/left").touch(), "changed"),
    "leaves OUTPUT": (lambda: Path("out").mkdir(), "changed"),
    "runs a program": (lambda: os.system("true"), "os.system"),
    "imports from the model": (_import, "imported"),
    "takes memory": (_waste_memory, "MiB"),
    "takes time": (_waste_time, " s"),
    "shows a traceback": (lambda: click.echo("Traceback", err=True), "traceback"),
    "acts on the terminal": (lambda: sys.stderr.write("\x1b[2J"), "control"),
    "says more than three lines": (lambda: click.echo("and more", err=True), "three lines"),
    "dies": (lambda: os.kill(os.getpid(), signal.SIGKILL), "died"),
    "succeeds": (lambda: sys.exit(0), "exit code 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_checks_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 0.5)
    fault, says = FAULTS[name]

    def make(place: Path) -> list[str]:
        (place / "src").mkdir()
        (place / "src/model").touch()
        (place / "src/odd.py").touch()
        return []

    def command(_arguments: list[str], **_: str) -> None:
        fault()
        click.echo("Error: what\n   in: where\n   do: this", err=True)
        sys.exit(3)

    wrong = run(Input("kind", name, make), command).wrong
    assert any(says in one for one in wrong), wrong


def test_a_refusal_is_right() -> None:
    def command(_arguments: list[str], **_: str) -> None:
        click.echo("Error: what\n   in: where\n   do: this", err=True)
        sys.exit(3)

    assert not run(Input("kind", "sound", lambda _: []), command).wrong
