"""A step is one file and its line in the list: all commands then know it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from safetensors.numpy import load_file, save_file

import converter
from converter import schema
from converter.choices import STEPS
from converter.demo import MODEL

STEP = "center_positions"
FIVE = ",".join(STEPS)
LAST = '    "refactor_factored_attn_matrices",\n'


@dataclass(frozen=True)
class Command:
    """`neoconvert` of a package with one step more."""

    place: Path

    def __call__(self, *args: Any, code: int = 0) -> dict[str, Any]:
        """The JSON of a command that ends with this exit code."""
        document: dict[str, Any] = json.loads(self.printed(*args, "--json", code=code))
        Draft202012Validator(self._schema()).validate(document)
        return document

    def printed(self, *args: Any, code: int = 0) -> str:
        call = [sys.executable, "-m", "converter", *map(str, args)]
        environment = os.environ | {"PYTHONPATH": str(self.place)}
        done = subprocess.run(
            call, capture_output=True, text=True, cwd=self.place, env=environment, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    def _schema(self) -> dict[str, Any]:
        document = schema.load()
        document["$defs"]["step"]["enum"].append(STEP)
        return document


@pytest.fixture(scope="module")
def neoconvert(tmp_path_factory: pytest.TempPathFactory) -> Command:
    place = tmp_path_factory.mktemp("package")
    here = Path(converter.__file__).parent
    shutil.copytree(here, place / "converter", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name(f"{STEP}.py"), place / "converter/processing")
    listed = place / "converter/choices.py"
    text = listed.read_text()
    assert text.count(LAST) == 1
    listed.write_text(text.replace(LAST, f'{LAST}    "{STEP}",\n'))
    return Command(place)


@pytest.fixture(scope="module", params=["exact", "compact"])
def processed(
    request: pytest.FixtureRequest, neoconvert: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """By all six steps, with a ledger of this kind."""
    kind: str = request.param
    output = tmp_path_factory.mktemp(kind) / "tl"
    done = neoconvert(
        "hf-to-tl", MODEL, output, "--process", f"{FIVE},{STEP}", "--ledger", kind,
        "--effort", "quick",
    )  # fmt: skip
    assert done["verification"]["passed"]
    assert done["steps"] == [*STEPS, STEP]
    return kind, output


def test_it_is_offered(neoconvert: Command) -> None:
    assert STEP in neoconvert.printed("hf-to-tl", "--help")


def test_verify(neoconvert: Command, processed: tuple[str, Path], tmp_path: Path) -> None:
    _, output = processed
    assert neoconvert("verify", MODEL, output, "--effort", "quick")["passed"]
    edited = tmp_path / "edited"
    shutil.copytree(output, edited)
    tensors = load_file(edited / "model.safetensors")
    tensors["pos_embed.W_pos"][5, 3] += 0.1
    save_file(tensors, edited / "model.safetensors")
    found = neoconvert("verify", MODEL, edited, "--check", "weights", code=1)
    assert found["weights"]["mismatched"] == ["pos_embed.W_pos"]


def test_undo(neoconvert: Command, processed: tuple[str, Path], tmp_path: Path) -> None:
    kind, output = processed
    back = neoconvert("tl-to-hf", output, tmp_path / "hf", "--effort", "quick")
    assert back["reverse"] == ("exact" if kind == "exact" else "functional")
    assert back["verification"]["passed"]
    original, restored = (
        load_file(place / "model.safetensors") for place in (MODEL, tmp_path / "hf")
    )
    assert restored.keys() == original.keys()
    for name, array in original.items():
        assert restored[name].dtype == array.dtype
        if kind == "exact":
            assert restored[name].tobytes() == array.tobytes(), name
        else:
            off = np.abs(restored[name].astype(float) - array.astype(float)).max()
            assert off <= 3e-6 * np.abs(array).max(), name


def test_edited_weights_are_undone_in_the_original_basis(
    neoconvert: Command, processed: tuple[str, Path], tmp_path: Path
) -> None:
    _, output = processed
    edited = tmp_path / "edited"
    shutil.copytree(output, edited)
    tensors = load_file(edited / "model.safetensors")
    tensors["embed.W_E"][7] *= 1.5
    save_file(tensors, edited / "model.safetensors")
    neoconvert("tl-to-hf", edited, tmp_path / "hf", "--effort", "quick")
    assert neoconvert("verify", edited, tmp_path / "hf", "--check", "function")["passed"]
    original, restored = (
        load_file(place / "model.safetensors")["transformer.wte.weight"]
        for place in (MODEL, tmp_path / "hf")
    )
    changed = np.abs(restored - original).max(1) > 1e-4
    assert np.flatnonzero(changed).tolist() == [7]


def test_explain(neoconvert: Command, processed: tuple[str, Path], tmp_path: Path) -> None:
    """By the weights alone, both ways round, with an edit, and where only some of it was done."""
    _, output = processed
    expected = [step for step in (*STEPS, STEP) if step != "fold_value_biases"]
    found = neoconvert("explain", MODEL, output)
    assert (found["verdict"], found["steps"]) == ("same-function", expected)
    assert found["unexplained"] == found["undone"] == []
    assert "the mean of all positions moved into the tokens" in found["headline"]
    steps = {tensor["key"]: tensor["steps"] for tensor in found["tensors"]}
    assert {key for key in steps if STEP in steps[key]} == {"embed.W_E", "pos_embed.W_pos"}
    back = neoconvert("explain", output, MODEL)
    assert (back["verdict"], back["undone"], back["unexplained"]) == ("same-function", expected, [])
    tensors = load_file(output / "model.safetensors")
    edited = tmp_path / "edited"
    shutil.copytree(output, edited)
    tensors["embed.W_E"][7] += np.linspace(0, 0.1, tensors["embed.W_E"].shape[1])
    save_file(tensors, edited / "model.safetensors")
    found = neoconvert("explain", MODEL, edited)
    assert (found["verdict"], found["steps"]) == ("different-model", expected)
    assert found["unexplained"] == ["embed.W_E"]
    (place,) = [tensor["place"] for tensor in found["tensors"] if tensor["place"]]
    assert place == "token 7"


def test_explain_without_it(neoconvert: Command, tmp_path: Path) -> None:
    neoconvert("hf-to-tl", MODEL, tmp_path / "tl", "--process", "default", "--no-verify")
    found = neoconvert("explain", MODEL, tmp_path / "tl")
    assert found["steps"] == list(STEPS[:4])
    assert not found["unexplained"]


def test_nothing_to_explain(neoconvert: Command, tmp_path: Path) -> None:
    """Its sentence where it leaves no trace: the mean of the positions is gone already."""
    neoconvert("bake", MODEL, tmp_path / "a", "--process", STEP, "--no-verify")
    neoconvert("hf-to-tl", tmp_path / "a", tmp_path / "b", "--process", "fold_ln", "--no-verify")
    found = neoconvert("explain", tmp_path / "a", tmp_path / "b")
    assert found["steps"] == ["fold_ln"]
    assert found["no_trace"][STEP] == "the positions have no mean"
