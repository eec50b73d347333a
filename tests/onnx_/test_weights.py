"""Where the bytes are: offsets into safetensors files, one file beside, or within the graph."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_tensor

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import NeoconvertError, OutputExists, UsageError
from converter.onnx import Session, export, read_onnx
from converter.onnx import weights as placing
from tests.checkpoints import Recipe, read_all, write_hf
from tests.models import random_hf, write_as
from tests.onnx_.running import tokens_of


def initializers(path: Path) -> dict[str, np.ndarray]:
    """Weights through onnx's own reader of external data."""
    graph = onnx.load(str(path), load_external_data=False).graph
    tensors = [t for t in graph.initializer if not t.name.startswith("constant_")]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
    return {t.name: onnx.numpy_helper.to_array(t) for t in tensors}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("headless", [False, True])
def test_shared_offsets(tmp_path: Path, dtype: str, shards: int, headless: bool) -> None:
    """Shards in any order of tensors, with buffers of other dtypes in between."""
    recipe = Recipe(
        dtype=dtype, shards=shards, headless=headless, tied=headless, buffers=not headless, d_head=3
    )
    expected = write_hf(tmp_path / "m", recipe)
    result = export(open_checkpoint(tmp_path / "m"))
    found = initializers(result.path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name
    assert len(result.shared) == shards
    assert result.graph_bytes < 100_000
    assert set(read_onnx(result.path).data_files) == set(result.shared)


def test_sharded_runs(tmp_path: Path) -> None:
    write_hf(tmp_path / "m", Recipe(shards=3, finite=True))
    one = random_hf(tmp_path / "one")
    for directory in (tmp_path / "m", one):
        there = open_checkpoint(directory)
        assert np.isfinite(Session(export(there).path)(tokens_of(there, 1, 5))["logits"]).all()


def test_hooked_weights_are_read_as_stored(tiny: Checkpoint, tmp_path: Path) -> None:
    """Not a byte is copied or turned round: initializers are the file's tensors, by name."""
    there = open_checkpoint(write_as(tiny, tmp_path / "tl", "hooked"))
    stored, found = read_all(tmp_path / "tl"), initializers(export(there).path)
    assert found.keys() == stored.keys()
    assert all(found[n].tobytes() == stored[n].tobytes() for n in stored)


@pytest.mark.parametrize("layout", ["hf", "hooked", "bridge"])
@pytest.mark.parametrize("mode", ["external", "inline"])
def test_written_weights_are_in_out_and_tied_ones_written_once(
    tiny: Checkpoint, tmp_path: Path, layout: str, mode: placing.Mode
) -> None:
    there = tiny
    if layout != "hf":
        there = open_checkpoint(write_as(tiny, tmp_path / "tl", layout))  # type: ignore[arg-type]
    result = export(there, tmp_path / "out", weights=mode)
    found = initializers(result.path)
    assert sum(array.shape == (61, 32) for array in found.values()) == 1
    head = "transformer.wte.weight" if layout == "hf" else "embed.weight"
    np.testing.assert_array_equal(found[head], tiny.tensor("embed.W_E"))
    query = {n: a for n, a in found.items() if n.endswith(("q_proj.weight", "attn.q.weight"))}
    expected = read_all(tiny.directory)["transformer.h.1.attn.attention.q_proj.weight"]
    np.testing.assert_array_equal(list(query.values())[1], expected.T)


def test_external_weights_are_aligned_for_mapping(tmp_path: Path) -> None:
    there = open_checkpoint(
        random_hf(tmp_path / "m", vocab_size=30_001, hidden_size=20, num_heads=4, tied=False)
    )
    located = placing.place_weights(there, "external", "model.onnx_data")
    ends = 0
    for place in located.places.values():
        assert place.offset >= ends
        assert place.offset % (4096 if place.nbytes >= 2**20 else 64) == 0
        ends = place.offset + place.nbytes
    result = export(there, tmp_path / "out", weights="external")
    assert (tmp_path / "out" / "model.onnx_data").stat().st_size == ends
    assert np.isfinite(Session(result.path)(tokens_of(there, 1, 3))["logits"]).all()


def test_external_weights_are_streamed(tiny: Checkpoint, tmp_path: Path) -> None:
    """At no time does more than one tensor of the checkpoint live."""
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    class Watched(Checkpoint):
        def tensor(self, key: str, dtype: str | None = None) -> np.ndarray:
            nonlocal most
            array = super().tensor(key, dtype)
            alive.append(weakref.ref(array))
            most = max(most, sum(ref() is not None for ref in alive))
            return array

    watched = Watched(**{f: getattr(tiny, f) for f in tiny.__dataclass_fields__})
    export(watched, tmp_path / "out", weights="external")
    assert len(alive) == len(tiny.stored)
    assert most <= 2  # the next is read while the last is let go


def test_inline_beyond_two_gigabytes_is_refused(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "INLINE_LIMIT", 10_000)
    with pytest.raises(UsageError, match="2 GB"):
        export(tiny, weights="inline")
    assert not (tiny.directory / "model.onnx").exists()


def test_a_large_model_is_refused_inline_before_a_weight_is_read(tiny: Checkpoint) -> None:
    large = replace(tiny, config=replace(tiny.config, d_vocab=2**25))
    with pytest.raises(UsageError, match="2 GB"):
        placing.place_weights(large, "inline", "")


def test_a_pickle_cannot_be_shared(tiny: Checkpoint, tmp_path: Path) -> None:
    state = {n: torch.from_numpy(t.copy()) for n, t in read_all(tiny.directory).items()}
    directory = tmp_path / "pickle"
    directory.mkdir()
    torch.save(state, directory / "pytorch_model.bin")
    shutil.copy(tiny.directory / "config.json", directory)
    there = open_checkpoint(directory, allow_pickle=True)
    assert not placing.shareable(there)
    with pytest.raises(UsageError, match="pickle"):
        export(there)
    tokens = tokens_of(tiny, 1, 9)
    mine = Session(export(there, weights="external").path)(tokens)["logits"]
    np.testing.assert_array_equal(mine, Session(export(tiny).path)(tokens)["logits"])


def test_sharing_needs_the_weights_beside_the_graph(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not beside"):
        export(tiny, tmp_path / "elsewhere")
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copy(tiny.directory / "model.safetensors", copied)
    tokens = tokens_of(tiny, 1, 9)
    assert "logits" in Session(export(tiny, copied).path)(tokens)


def test_linked_weights_are_not_shared(tiny: Checkpoint, tmp_path: Path) -> None:
    """As in the hub's cache: onnxruntime would refuse the graph."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in tiny.directory.iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(UsageError, match="link"):
        export(open_checkpoint(linked))


@pytest.mark.parametrize("mode", ["shared", "external"])
def test_nothing_is_overwritten(tiny: Checkpoint, mode: placing.Mode) -> None:
    name = "model.onnx" if mode == "shared" else "model.onnx_data"
    (tiny.directory / name).write_text("mine")
    with pytest.raises(OutputExists):
        export(tiny, weights=mode)
    assert (tiny.directory / name).read_text() == "mine"


def test_a_failure_leaves_nothing(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: placing.GraphWeights, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(placing.GraphWeights, "write", fail)
    before = set(tiny.directory.iterdir())
    with pytest.raises((OSError, NeoconvertError)):
        export(tiny, weights="external")
    assert set(tiny.directory.iterdir()) == before


def test_a_graph_may_be_written_under_another_name_and_renamed(tiny: Checkpoint) -> None:
    result = export(tiny, file_name=".model.onnx.partial")
    final = tiny.directory / "model.onnx"
    os.replace(result.path, final)
    assert "logits" in Session(final)(tokens_of(tiny, 1, 3))


def test_the_same_checkpoint_gives_the_same_graph(tiny: Checkpoint) -> None:
    first, second = (export(tiny, file_name=f"{n}.onnx").path.read_bytes() for n in "ab")
    assert first == second


def test_optimums_names_and_axes(tiny: Checkpoint) -> None:
    graph = Session(export(tiny).path)
    cache = ["batch_size", 4, "past_sequence_length", 8]
    assert graph.inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "past_sequence_length + sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    } | {f"past_key_values.{i}.{w}": cache for i in range(4) for w in ("key", "value")}
    shapes = graph.outputs
    assert shapes["logits"] == ["batch_size", "sequence_length", 61]
    assert shapes["present.3.value"] == [
        "batch_size", 4, "past_sequence_length + sequence_length", 8,
    ]  # fmt: skip
    plain = Session(export(tiny, with_past=False, file_name="plain.onnx").path)
    assert list(plain.inputs) == ["input_ids", "attention_mask", "position_ids"]
    assert list(plain.outputs) == ["logits"]


def test_only_standard_operators(tiny: Checkpoint) -> None:
    model = onnx.load(str(export(tiny, hooks=["*"]).path), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert json.loads((tiny.directory / "config.json").read_text())["model_type"] == "gpt_neo"
