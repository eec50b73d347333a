"""converter/recorded: reference files that are damaged, of another kind, or asked for too much."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

import converter
from converter.demo import MODEL
from tests.advice.converting import then
from tests.advice.making import edited, prepared
from tests.advice.opening import WEIGHTS
from tests.advice.row import Asked, Row, instead, less, run, shell, write

WRITE = ["reference", "m", "m.ref", "--effort", "quick"]
QUICK = ["verify", "m.ref", "m", "--effort", "quick"]


def recorded(asked: Asked, *steps: Callable[[], object]) -> Callable[[], Asked]:
    return prepared(asked, lambda: run(WRITE), *steps)


def _damaged() -> None:
    content = bytearray(Path("m.ref").read_bytes())
    content[-9] ^= 1
    write("m.ref", bytes(content))


def _written_again(do: str, asked: Asked) -> Asked:
    assert "remove it" in do
    Path("m.ref").unlink()
    shell(f"{do.rpartition(': ')[2]} --effort quick", ORIGINAL="m", FILE="m.ref")
    return asked


def _with_the_text(do: str, asked: Asked) -> Asked:
    assert "Give --text to neoconvert reference" in do
    run([*WRITE, "--text", "t", "--overwrite"])
    assert isinstance(asked, list)
    return [word for word in asked if word not in ("--text", "t")]


def _endless(tensors: dict[str, np.ndarray]) -> None:
    tensors["transformer.wte.weight"][3, 1] = np.inf


def _verified_with(do: str, _: Asked) -> Asked:
    assert do.endswith("neoconvert verify m.ref ARTIFACT")
    return QUICK


def _the_original_itself(do: str, _: Asked) -> Asked:
    assert "Verify with the original itself" in do
    return ["verify", "m", "m", "--effort", "quick"]


def _demo() -> list[str]:
    shutil.copytree(MODEL, "m")
    run(WRITE)
    write("t", "Once upon a time")
    return [*QUICK, "--text", "t"]


ROWS = [
    Row("checkpoint/foreign_files.py", "refuse_foreign", recorded(["inspect", "m.ref"]), _verified_with),
    Row("cli_verify.py", "A reference file is read by itself", recorded([*QUICK, "--revision", "main"]), less("--revision", "main"), "Leave --revision out"),
    Row("recorded/file.py", "The reference file cannot be used", recorded(QUICK, _damaged), _written_again),
    Row("recorded/recording.py", "There is no such directory for the file", prepared(["reference", "m", "no/m.ref", "--effort", "quick"]), instead("no/m.ref", "m.ref"), "in a directory that is there"),
    Row("recorded/recording.py", "A reference file has its own probes.", recorded(lambda: converter.verify("m.ref", "m", probes=[], effort="quick")), then(lambda: converter.verify("m.ref", "m", effort="quick"), "Leave them out")),
    Row("recorded/recording.py", "and this text is none of them", _demo, _with_the_text),
    Row("recorded/recording.py", "The reference file was written with", recorded(["verify", "m.ref", "m", "--effort", "standard"]), less("--effort", "standard"), "Leave --effort out"),
    Row("recorded/sampled.py", "not all finite", prepared(WRITE, lambda: edited(WEIGHTS, _endless)), _the_original_itself),
]  # fmt: skip
