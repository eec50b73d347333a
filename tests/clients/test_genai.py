"""onnxruntime-genai opens a graph by the genai_config.json beside it, and generates what transformers does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import converter
from converter.checkpoint import open_checkpoint
from converter.checkpoint.record import changes
from converter.exporting import Addition
from converter.onnx import export, genai
from tests.clients.generation import Answer, Process, Prompt, transformers
from tests.clients.test_onnx_clients import HERE, random_model, require_same, start

NAME = "genai_config.json"
WINDOW = 7


@pytest.fixture(scope="session")
def client() -> Iterator[Process]:
    yield from start("optimum", "python", HERE / "genai_generate.py")


def prompt(rows: int = 1) -> Prompt:
    """60 tokens more than 5, well across the window; no greedy choice of them is a near tie."""
    tokens = np.random.default_rng(4).integers(1, 61, (rows, 5))
    return Prompt(tokens, np.ones_like(tokens), new_tokens=60)


def centred(answer: Answer) -> Answer:
    """Processing moves the logits of a position by a constant."""
    return replace(answer, logits=answer.logits - answer.logits.mean(-1, keepdims=True))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "beside": ("export_onnx", {}),
    "its own weights": ("export_onnx", {"graph": converter.Graph("inline")}),
    "float16": ("export_onnx", {"dtype": "float16"}),
    "bfloat16": ("export_onnx", {"dtype": "bfloat16"}),
    "transformers.js": ("bake", {"graph": converter.Graph("external", client="transformers-js")}),
    "processed": ("hf_to_tl", {"graph": converter.Graph(hooks=("*.hook_z",)), "process": "all"}),
}


@pytest.mark.parametrize("case", CASES)
def test_sixty_tokens_across_the_window(case: str, client: Process, tmp_path: Path) -> None:
    direction, options = CASES[case]
    model = random_model(tmp_path / "model")
    output = None if case == "beside" else tmp_path / "out"
    getattr(converter, direction)(model, output, check=False, **options)
    expected = transformers(tmp_path / "out" if "float" in case else model, prompt())
    assert expected.tokens.shape[1] == 65 > 9 * WINDOW
    found = client(output or model, prompt())
    require_same(centred(found), centred(expected))


def test_rows_of_one_length(client: Process, tmp_path: Path) -> None:
    model = random_model(tmp_path / "model")
    converter.export_onnx(model, check=False)
    require_same(client(model, prompt(3)), transformers(model, prompt(3)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_not_supported(side: str, client: Process, tmp_path: Path) -> None:
    """As docs/onnx.md says. The longest row has no padding, and is right."""
    model = random_model(tmp_path / "model", pad_token_id=0)
    converter.export_onnx(model, check=False)
    whole, mask = prompt(2), np.ones((2, 5), int)
    mask[1, slice(2) if side == "left" else slice(3, 5)] = 0
    short = replace(whole, tokens=whole.tokens[1:, mask[1] == 1], mask=mask[1:, mask[1] == 1])
    found = client(model, replace(whole, tokens=whole.tokens * mask, mask=mask)).tokens
    np.testing.assert_array_equal(found[0], transformers(model, prompt(2)).tokens[0])
    expected = transformers(model, short).tokens[0, 3:]
    assert not np.array_equal(found[1, 5:], expected[:60])


def test_a_lost_window_is_seen(client: Process, tmp_path: Path) -> None:
    model = random_model(tmp_path / "model")
    checkpoint = open_checkpoint(model)
    everywhere = ("global",) * checkpoint.config.n_layers
    export(replace(checkpoint, config=replace(checkpoint.config, attn_types=everywhere)))
    genai.write(model / NAME, checkpoint, "model.onnx")
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        require_same(client(model, prompt()), transformers(model, prompt()))


def test_stops_where_transformers_stops(client: Process, tmp_path: Path) -> None:
    free = transformers(random_model(tmp_path / "free"), prompt())
    end = int(free.tokens[0, 30])
    model = random_model(tmp_path / "model", eos_token_id=end)
    converter.export_onnx(model, check=False)
    expected = transformers(model, prompt())
    assert 5 < expected.tokens.shape[1] <= 31
    assert expected.tokens[0, -1] == end
    # genai leaves the end of text out of what it gives.
    np.testing.assert_array_equal(client(model, prompt()).tokens, expected.tokens[:, :-1])


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, {"bos": 1, "eos": 2, "pad": 2}),
        ({"bos_token_id": None, "eos_token_id": [3, 4]}, {"eos": [3, 4], "pad": 3}),
        ({"bos_token_id": None, "eos_token_id": None}, {}),
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, {"bos": 1, "eos": 2, "pad": 0}),
    ],
)
def test_tokens(tokens: dict[str, Any], kept: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(random_model(tmp_path / "model", **tokens))
    said = genai.genai_config(checkpoint, "model.onnx")["model"]
    found = {name: said[f"{name}_token_id"] for name in ("bos", "eos", "pad") if f"{name}_token_id" in said}  # fmt: skip
    assert found == kept


def test_it_is_there_with_a_cache_and_not_without(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model")
    converter.export_onnx(model, check=False)
    assert json.loads((model / NAME).read_text())["model"]["type"] == "decoder"
    converter.export_onnx(model, graph=converter.Graph(with_past=False), overwrite=True, check=False)  # fmt: skip
    assert not (model / NAME).exists()
    out = tmp_path / "out"
    converter.export_onnx(model, out, graph=converter.Graph(with_past=False), check=False)
    assert not (out / NAME).exists()
    converter.export_onnx(model, out, overwrite=True, check=False)
    assert (out / NAME).exists()
    assert changes(out) == {}


def test_one_that_someone_wrote_stays(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model")
    (model / NAME).write_text("mine")
    done = converter.export_onnx(model, check=False)
    assert (model / "model.onnx").exists()
    assert (model / NAME).read_text() == "mine"
    assert isinstance(done, Addition)
    assert done.warnings == (f"{NAME} is not neoconvert's, and was left as it is",)
