"""The software that opens ONNX exports generates exactly what transformers generates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from converter.checkpoint import open_checkpoint
from converter.checkpoint.reader import SafetensorsReader
from converter.demo import MODEL
from converter.onnx import export
from converter.verification.quiet import quiet
from tests.clients.generation import (
    ROOT,
    Answer,
    Client,
    Process,
    Prompt,
    bridge,
    plain_onnxruntime,
    transformers,
)
from tests.models import random_hf
from tests.onnx_.quantising import int8, q4

VENVS = ROOT / ".venvs"
HERE = Path(__file__).parent


def start(environment: str, *command: str | Path) -> Iterator[Process]:
    directory = VENVS / environment
    if not (directory / "stamp").exists():
        pytest.skip(f"no .venvs/{environment}: scripts/environment {environment} makes it")
    process = Process([directory / "bin" / command[0], *command[1:]], directory)
    yield process
    process.close()


@pytest.fixture(scope="session")
def optimum() -> Iterator[Process]:
    yield from start("optimum", "python", HERE / "optimum_generate.py")


@pytest.fixture(scope="session")
def node() -> Iterator[Process]:
    yield from start("node", "node", HERE / "transformers_js" / "generate.mjs")


@pytest.fixture(params=["optimum", "transformers.js"])
def client(request: pytest.FixtureRequest) -> Client:
    """Either, on a directory with the graph beside config.json."""
    if request.param == "optimum":
        return request.getfixturevalue("optimum")  # type: ignore[no-any-return]
    return partial(request.getfixturevalue("node"), subfolder="")


def prompt(*lengths: int) -> Prompt:
    """One row of random tokens for each length, padded to the longest."""
    rng = np.random.default_rng(0)
    mask = np.array([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    return Prompt(rng.integers(1, 61, mask.shape) * mask, mask, new_tokens=40)


PADDED = prompt(9, 2, 5)


def require_same(found: Answer, expected: Answer) -> None:
    """The same tokens, and logits so near that none of them is the same by luck."""
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    real = expected.real
    np.testing.assert_allclose(
        found.logits[real], expected.logits[real], rtol=0, atol=expected.margin / 2
    )


def random_model(directory: Path, **config: Any) -> Path:
    """Window 7 of 96, and no greedy choice of PADDED's is a near tie."""
    shape: dict[str, Any] = {
        "num_layers": 4, "hidden_size": 32, "vocab_size": 61,
        "window_size": 7, "max_position_embeddings": 96, "eos_token_id": None,
    }  # fmt: skip
    return random_hf(directory, seed=2, scale=1.5, **shape | config)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_model(tmp_path / "model")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_generates_what_transformers_generates(client: Client, dtype: str, tmp_path: Path) -> None:
    """Left-padded rows, a prefill and steps with the cache, well across the window."""
    model = random_model(tmp_path / "model", dtype=dtype)
    export(open_checkpoint(model))
    require_same(client(model, PADDED), transformers(model, PADDED))


def test_a_lost_window_is_seen(client: Client, model: Path) -> None:
    checkpoint = open_checkpoint(model)
    everywhere = ("global",) * checkpoint.config.n_layers
    export(replace(checkpoint, config=replace(checkpoint.config, attn_types=everywhere)))
    found = client(model, PADDED)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        require_same(found, transformers(model, PADDED))


def test_lost_padding_is_seen(client: Client, model: Path) -> None:
    export(open_checkpoint(model))
    unmasked = replace(PADDED, mask=np.ones_like(PADDED.mask))
    found, expected = client(model, unmasked), transformers(model, PADDED)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        require_same(found, expected)
    np.testing.assert_array_equal(found.tokens[0], expected.tokens[0])  # a row without padding


def test_stops_where_transformers_stops(client: Client, tmp_path: Path) -> None:
    """At the end of text that config.json names. (One row: transformers.js 4.3 does not keep
    account of rows that are done before the others.)"""
    question = prompt(9)
    free = transformers(random_model(tmp_path / "free"), question)
    end = int(free.tokens[0, 30])
    model = random_model(tmp_path / "model", eos_token_id=end)
    export(open_checkpoint(model))
    expected = transformers(model, question)
    assert 10 < expected.tokens.shape[1] <= 31
    require_same(client(model, question), expected)


def test_the_demo_model(client: Client, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = shutil.copytree(MODEL, tmp_path / "model")
    export(open_checkpoint(model))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(
        ["def read(path):\n    with open(path)", "return"], padding=True, return_tensors="np"
    )
    question = Prompt(encoded["input_ids"], encoded["attention_mask"], new_tokens=20)
    require_same(client(model, question), transformers(model, question))


@pytest.mark.parametrize("options", [{}, {"use_external_data_format": True}])
def test_the_folder_layout_of_transformers_js(
    node: Process, model: Path, options: dict[str, Any]
) -> None:
    """What the hub's ONNX repositories look like: onnx/model.onnx, the config at the root."""
    export(open_checkpoint(model), model / "onnx", weights="external")
    assert {p.name for p in (model / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    expected = transformers(model, PADDED)
    (model / "model.safetensors").unlink()
    require_same(node(model, PADDED, **options), expected)


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_quantised_graphs_in_transformers_js(node: Process, dtype: str, tmp_path: Path) -> None:
    """By onnxruntime's own tools; generated as onnxruntime itself generates from the same file."""
    model = shutil.copytree(MODEL, tmp_path / "model")
    path = export(open_checkpoint(model), model / "onnx", weights="external").path
    quantised = {"q8": int8, "q4": q4}[dtype](path)
    (model / "model.safetensors").unlink()
    question = prompt(9, 9)
    found = node(model, question, dtype=dtype)
    shutil.copy(quantised, tmp_path / "model.onnx")
    expected = plain_onnxruntime(tmp_path, question)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_directory_one_weight_file(
    sharded: bool, model: Path, optimum: Process, node: Process, tmp_path: Path
) -> None:
    """An HF directory serves five libraries, and gains some kilobytes by it."""
    directory = model
    if sharded:
        directory = _save_pretrained(model, tmp_path / "sharded", max_shard_size="40KB")
        assert len(list(directory.glob("model-*.safetensors"))) > 2
    before = _digests(directory)

    export(open_checkpoint(directory))

    after = _digests(directory)
    assert set(after) - set(before) == {"model.onnx"}
    assert before.items() <= after.items()
    assert (directory / "model.onnx").stat().st_size < 100_000  # no room for weights

    clients: list[Client] = [bridge, plain_onnxruntime, optimum, partial(node, subfolder="")]
    question = prompt(9, 9)
    expected = transformers(directory, question)
    for ask in clients:
        require_same(ask(directory, question), expected)

    # There is one copy of the weights: an edit in place changes what everyone says.
    _negate(directory, "transformer.h.1.mlp.c_proj.weight")
    edited = transformers(directory, question)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        require_same(edited, expected)
    for ask in clients:
        require_same(ask(directory, question), edited)


def _digests(directory: Path) -> dict[str, str]:
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def _negate(directory: Path, name: str) -> None:
    """Change the sign of a float32 weight where it lies."""
    for path in directory.glob("*.safetensors"):
        if place := SafetensorsReader(path).places.get(name):
            offset, size = place
            values = -load_file(path)[name]
            with open(path, "r+b") as file:
                file.seek(offset)
                assert file.write(values.tobytes()) == size


def _save_pretrained(source: Path, directory: Path, **options: Any) -> Path:
    from transformers import AutoModelForCausalLM

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(source)
        model.save_pretrained(directory, **options)
    return directory
