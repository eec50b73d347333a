"""The model card: read by the hub's own reader, its code run, text from elsewhere inert."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import converter
from converter.convert import bake, export_onnx, hf_to_tl, tl_to_hf
from converter.demo import MODEL
from converter.exporting import Graph
from converter.verification.loading import has_hooked_transformer
from tests.docs.pages import blocks
from tests.test_hub import COMMIT

ONNX = Graph()


def _made(kind: str, directory: Path) -> Path:
    card: dict[str, Any] = {"check": False, "model_card": True}
    output = directory / "out"
    if kind == "hf":
        hf_to_tl(MODEL, directory / "tl", check=False)
        tl_to_hf(directory / "tl", output, graph=ONNX, **card)
    elif kind == "baked":
        bake(MODEL, output, max_shard_size="1MB", **card)
    elif kind == "onnx":
        export_onnx(MODEL, output, graph=Graph(weights="external", client="transformers-js"), **card)  # fmt: skip
    else:
        layout, _, process = kind.partition(" ")
        size = "1MB" if process == "all" else "5GB"
        hf_to_tl(MODEL, output, layout=layout, process=process, max_shard_size=size, **card)  # type: ignore[arg-type]
    return output


@pytest.mark.parametrize(
    "kind",
    ["hf", "baked", "onnx", "hooked none", "hooked all", "bridge none", "bridge default", "bridge all"],
)  # fmt: skip
def test_the_code_of_a_card_runs_in_its_directory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = _made(kind, tmp_path)
    text = (output / "README.md").read_text("utf-8")
    monkeypatch.chdir(output)
    ran = 0
    for block in blocks(text, "python"):
        if "import HookedTransformer," in block and not has_hooked_transformer():
            continue
        names: dict[str, Any] = {}
        exec(block, names)
        assert {"model", "bridge", "session"} & set(names)
        ran += 1
    assert ran


def test_what_the_hub_reads(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--me--neo" / "snapshots" / COMMIT
    shutil.copytree(MODEL, snapshot)
    card = "---\nlicense: apache-2.0\nlanguage: [en, de]\nmodel-index: []\n---\n# Theirs\n"
    (snapshot / "README.md").write_text(card)
    (tmp_path / "hub" / "models--me--neo" / "refs").mkdir()
    (tmp_path / "hub" / "models--me--neo" / "refs" / "main").write_text(COMMIT)
    source = converter.open_checkpoint("me/neo", cache=tmp_path / "hub")
    hf_to_tl(source, tmp_path / "tl", model_card=True, check=False)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", model_card=True, check=False)
    for name, library in {"tl": "transformer_lens", "back": "transformers"}.items():
        read = ModelCard.load(tmp_path / name / "README.md")
        assert read.data.license == "apache-2.0"
        assert read.data.language == ["en", "de"]
        assert read.data.base_model == "me/neo"
        assert read.data.library_name == library
        assert "neoconvert" in read.data.tags
        assert "Theirs" not in read.text
    assert f"at revision `{COMMIT}`" in (tmp_path / "tl" / "README.md").read_text()
    assert "neoconvert verify me/neo ." in (tmp_path / "tl" / "README.md").read_text()


def test_what_was_checked_is_there_link_by_link(tmp_path: Path) -> None:
    done = hf_to_tl(MODEL, tmp_path / "tl", layout="bridge", model_card=True, effort="quick")
    text = (tmp_path / "tl" / "README.md").read_text("utf-8")
    assert done.verification is not None
    assert done.verification.evidence
    rows = re.findall(r"^\| .+\? \| .+ \| same.* \|$", text, re.MULTILINE)
    assert len(rows) == len(done.verification.evidence)
    assert "--no-verify" not in text
    hf_to_tl(MODEL, tmp_path / "unchecked", model_card=True, check=False)
    assert "--no-verify" in (tmp_path / "unchecked" / "README.md").read_text("utf-8")


def test_the_same_conversion_writes_the_same_card(tmp_path: Path) -> None:
    for place in ("a", "b"):
        hf_to_tl(MODEL, tmp_path / place / "tl", model_card=True, effort="quick")
    a, b = ((tmp_path / place / "tl" / "README.md").read_bytes() for place in ("a", "b"))
    assert a == b
    assert str(tmp_path).encode() not in a


@pytest.mark.parametrize(
    "name", ["x<script>alert(1)</script>", "a|b`c`", "[x](javascript:1)", "a\n# b", "\x1b[31mred", "‮evil"]
)  # fmt: skip
def test_names_from_elsewhere_are_words(name: str, tmp_path: Path) -> None:
    source = shutil.copytree(MODEL, tmp_path / name.replace("/", "-"))
    hf_to_tl(source, tmp_path / "out", model_card=True, check=False)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f‮]", text)
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


BOMB = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [\n---\n", "---\nlicense: {a: 1}\n---\n", "\xff", "x" * 2**18, '---\nlicense: "a\\eb"\n---\n',
        f"---\nlicense: {'[' * 20_000}\n---\n", f"---\nx0: &x0 [lol]\n{BOMB}license: *x39\n---\n",
        "# No front matter\n", "---\nlicense: 2026-01-01\n---\n", "---\n!!python/object/apply:os.system [exit]\n---\n",
    ],
)  # fmt: skip
def test_a_card_of_the_source_that_cannot_be_read_says_nothing(
    card: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = shutil.copytree(MODEL, tmp_path / "hf")
    (source / "README.md").write_bytes(card.encode("latin-1"))
    started = time.process_time()
    hf_to_tl(source, tmp_path / "out", model_card=True, check=False)
    assert time.process_time() - started < 5
    assert not caplog.records
    assert not any(capfd.readouterr())
    assert "license" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()


@pytest.mark.parametrize("said", [{"revision": "x"}, {"revision": "x", "given": 3}, {"revision": "x", "given": "a: b"}, []])  # fmt: skip
def test_a_record_that_says_no_base(said: Any, tmp_path: Path) -> None:
    source = converter.hf_to_tl(MODEL, tmp_path / "tl", check=False).output
    document = json.loads((source / "neoconvert.json").read_text("utf-8"))
    (source / "neoconvert.json").write_text(json.dumps(document | {"source": said}))
    tl_to_hf(source, tmp_path / "out", model_card=True, check=False)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model is None


def test_the_card_is_a_file_of_ours_until_it_is_changed(tmp_path: Path) -> None:
    for _ in range(2):
        hf_to_tl(MODEL, tmp_path / "tl", model_card=True, check=False, overwrite=True)
    document = json.loads((tmp_path / "tl" / "neoconvert.json").read_text("utf-8"))
    assert "README.md" in document["files"]
    with open(tmp_path / "tl" / "README.md", "a") as file:
        file.write("My own words.\n")
    with pytest.raises(converter.OutputExists, match="README"):
        hf_to_tl(MODEL, tmp_path / "tl", model_card=True, check=False, overwrite=True)


def test_a_directory_that_is_not_ours_gets_no_card(tmp_path: Path) -> None:
    source = shutil.copytree(MODEL, tmp_path / "hf")
    with pytest.raises(converter.UsageError, match="card"):
        export_onnx(source, model_card=True, check=False)
    assert not (source / "model.onnx").exists()


@pytest.mark.skipif(has_hooked_transformer(), reason="TransformerLens 3 runs the hooked layout")
def test_what_ran_in_place_of_transformerlens_is_said_once(tmp_path: Path) -> None:
    hf_to_tl(MODEL, tmp_path / "tl", model_card=True, effort="quick")
    text = (tmp_path / "tl/README.md").read_text("utf-8")
    assert text.count("cannot run this layout") == 1
    assert text.count("neoconvert's own forward") == 4
