"""neoconvert.json: every file by its digest, no place of the machine, and what was changed since."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import converter
from converter.checkpoint.provenance import placeless
from converter.checkpoint.record import UNSEALED, changes, rerecord, sealed
from converter.cli import main
from converter.demo import MODEL
from converter.inspection import changed_files
from tests.adapter import making
from tests.models import random_hf

CONVERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "hooked": ("hf_to_tl", {"process": "all", "ledger": "exact"}),
    "bridge": ("hf_to_tl", {"layout": "bridge"}),
    "shards": ("bake", {"max_shard_size": 4000}),
    "float16": ("hf_to_tl", {"dtype": "float16"}),
    "graph": ("export_onnx", {}),
    "graph alone": ("bake", {"graph": converter.Graph("external", client="transformers-js")}),
    "adapter": ("bake", {"adapter": True}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which some tensors are wider than others, with a tokenizer and places in its config."""
    path = random_hf(tmp_path_factory.mktemp("deep") / "neo", _name_or_path="/home/ada/neo")
    weights = load_file(path / "model.safetensors")
    name = "transformer.ln_f.weight"  # the last that is made is the first in the file
    save_file(weights | {name: weights[name].astype(np.float64)}, path / "model.safetensors", {"format": "pt"})  # fmt: skip
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, path)
    return path


def converted(kind: str, source: Path, output: Path) -> dict[str, Any]:
    direction, options = CONVERSIONS[kind]
    if "adapter" in options:
        making.write(output.parent, making.Recipe())
        source, options = output.parent / "base", {"adapter": output.parent / "adapter"}
    getattr(converter, direction)(source, output, check=False, **options)
    return read(output)


def read(output: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((output / "neoconvert.json").read_text())
    return document


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for item in value.items() for text in texts(item))
    elif isinstance(value, (list, tuple)):
        yield from (text for item in value for text in texts(item))
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_every_file_by_its_digest(kind: str, source: Path, tmp_path: Path) -> None:
    document = converted(kind, source, tmp_path / "out")
    there = {
        file.relative_to(tmp_path / "out").as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (tmp_path / "out").rglob("*")
        if file.is_file() and file.name != "neoconvert.json"
    }
    assert len(there) > 3
    assert {name: entry["sha256"] for name, entry in document["files"].items()} == there


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_no_place_of_the_machine(kind: str, source: Path, tmp_path: Path) -> None:
    document = converted(kind, source, tmp_path / "out")
    assert document["source"]["given"] == ("base" if kind == "adapter" else "neo")
    found = [text for text in texts(document) if re.search(r"(^|\s)(/|~|[A-Za-z]:\\)\w", text)]
    assert found == []


@pytest.mark.parametrize("kind", ["hooked", "shards", "graph"])
def test_the_same_bytes_anywhere(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted(kind, source, tmp_path / "here")
    (tmp_path / "else/where").mkdir(parents=True)
    shutil.copytree(source, tmp_path / "else/where/neo")
    monkeypatch.chdir(tmp_path / "else")
    converted(kind, Path("where/../where/neo/"), Path("out"))
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == sorted(path.name for path in Path("out").iterdir())
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == Path("out", name).read_bytes(), name


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/ada/models/neo", "neo"),
        ("C:\\Users\\ada\\neo", "neo"),
        ("EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-125m"),
        ("models/neo", "models/neo"),
        ("/", "/"),
        ({"a": ["/x/y", 1, None]}, {"a": ["y", 1, None]}),
    ],
)
def test_a_place_is_shortened_to_a_name(value: Any, kept: Any) -> None:
    assert placeless(value) == kept


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


TAMPERED: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "nothing": (Path.exists, {}),
    "a config": (lambda out: _flip(out / "cfg.json"), {"cfg.json": "changed"}),
    "a tokenizer": (lambda out: _flip(out / "tokenizer.json"), {"tokenizer.json": "changed"}),
    "a weight": (lambda out: _flip(out / "model.safetensors"), {"model.safetensors": "changed"}),
    "a file gone": (lambda out: (out / "tokenizer.json").unlink(), {"tokenizer.json": "missing"}),
    "a file more": (lambda out: (out / "README.md").write_text("mine"), {}),
    "the record": (lambda out: _flip(out / "neoconvert.json"), {"neoconvert.json": "changed"}),
    "no record": (lambda out: (out / "neoconvert.json").unlink(), {}),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_since(what: str, source: Path, tmp_path: Path) -> None:
    converted("hooked", source, tmp_path / "out")
    TAMPERED[what][0](tmp_path / "out")
    assert changes(tmp_path / "out") == TAMPERED[what][1]


def test_a_record_that_leads_out_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/neoconvert.json").write_text("{}")
    rerecord(tmp_path / "out")
    assert changes(tmp_path / "out") == {}
    for name in ("../secret", str(tmp_path / "secret")):
        document = read(tmp_path / "out") | {"files": {name: {"bytes": 1, "sha256": "0"}}}
        text = json.dumps(document | {"seal": UNSEALED})
        (tmp_path / "out/neoconvert.json").write_bytes(sealed(text.encode()))
        assert changes(tmp_path / "out") == {name: "missing"}


@pytest.mark.parametrize("client", [None, "transformers-js"])
def test_beside_a_graph(client: str | None, source: Path, tmp_path: Path) -> None:
    graph = converter.Graph("external", client=client)
    converter.bake(source, tmp_path / "out", graph=graph, check=False)
    (path,) = (tmp_path / "out").rglob("model.onnx")
    assert changed_files(converter.open_artifact(path)) == {}
    _flip(tmp_path / "out/tokenizer.json")
    assert changed_files(converter.open_artifact(path)) == {"tokenizer.json": "changed"}


def test_inspect_and_verify_say_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted("hooked", source, out)
    with (out / "tokenizer.json").open("a") as file:
        file.write(" ")

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result

    shown = run("inspect", out).output
    assert "tokenizer.json was changed since neoconvert wrote it" in shown
    document = json.loads(run("inspect", out, "--json").stdout)
    assert document["changed_files"] == {"tokenizer.json": "changed"}
    verify = ("verify", source, out, "--check", "weights")
    done = run(*verify, "--json")
    assert "tokenizer.json was changed since neoconvert wrote it" in done.stderr
    assert json.loads(done.stdout)["changed_files"] == {
        "original": {},
        "artifact": {"tokenizer.json": "changed"},
    }
