"""A hostile, broken or foreign ONNX file is refused before a runtime opens it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from converter.checkpoint import Checkpoint
from converter.errors import BadInput, CorruptFile, MissingShard, TensorMismatch, UnsafeReference
from converter.onnx import export, read_onnx
from converter.onnx.reading import ForeignGraph

Spoil = Callable[[onnx.ModelProto], None]


def spoiled(path: Path, spoil: Spoil) -> Path:
    model = onnx.load(str(path), load_external_data=False)
    spoil(model)
    path.write_bytes(model.SerializeToString())
    return path


def entry(model: onnx.ModelProto, key: str) -> onnx.StringStringEntryProto:
    """An entry of the external data of the first weight."""
    tensor = next(t for t in model.graph.initializer if t.external_data)
    found: onnx.StringStringEntryProto = next(e for e in tensor.external_data if e.key == key)
    return found


def setting(key: str, value: str) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        entry(model, key).value = value

    return spoil


def test_what_is_read(tiny: Checkpoint) -> None:
    result = export(tiny, hooks=["*.hook_resid_post"])
    found = read_onnx(result.path)
    assert found.producer.startswith("neoconvert ")
    assert found.opset == 20
    assert found.with_past
    assert found.hooks == result.hooks
    assert found.data_files == result.shared
    assert found.layout == "hf"
    assert found.nodes == result.nodes
    assert not read_onnx(export(tiny, with_past=False, file_name="b.onnx").path).with_past


@pytest.mark.parametrize(
    "location",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\\b", "C:x",
     "a\0b", "./model.safetensors"],
)  # fmt: skip
def test_references_out_of_the_directory(tiny: Checkpoint, location: str) -> None:
    (tiny.directory.parent / "model.safetensors").write_bytes(
        (tiny.directory / "model.safetensors").read_bytes()
    )
    path = spoiled(export(tiny).path, setting("location", location))
    with pytest.raises(UnsafeReference) as caught:
        read_onnx(path)
    assert caught.value.exit_code == 3


def test_references_in_nodes_and_subgraphs(tiny: Checkpoint) -> None:
    def hostile() -> TensorProto:
        tensor = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")
        return tensor

    def in_constant(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Constant", [], ["c"], value=hostile()))

    def in_subgraph(model: onnx.ModelProto) -> None:
        inner = helper.make_graph([], "inner", [], [], [hostile()])
        model.graph.node.append(
            helper.make_node("If", ["b"], ["c"], then_branch=inner, else_branch=inner)
        )

    def in_function(model: onnx.ModelProto) -> None:
        node = helper.make_node("Constant", [], ["c"], value=hostile())
        opset = [helper.make_opsetid("", 20)]
        model.functions.append(helper.make_function("", "F", [], ["c"], [node], opset))

    def in_sparse(model: onnx.ModelProto) -> None:
        model.graph.sparse_initializer.add(values=hostile())

    for number, spoil in enumerate((in_constant, in_subgraph, in_function, in_sparse)):
        path = export(tiny, file_name=f"{number}.onnx").path
        with pytest.raises(UnsafeReference):
            read_onnx(spoiled(path, spoil))


def test_links_out_of_the_directory(tiny: Checkpoint, tmp_path: Path) -> None:
    path, weights = export(tiny).path, tiny.directory / "model.safetensors"
    os.rename(weights, tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UnsafeReference, match="link"):
        read_onnx(path)


def test_a_device_is_no_file(tiny: Checkpoint) -> None:
    path = export(tiny, weights="external").path
    data = tiny.directory / "model.onnx_data"
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(UnsafeReference):
        read_onnx(path)


def test_missing_data(tiny: Checkpoint) -> None:
    path = export(tiny, weights="external").path
    (tiny.directory / "model.onnx_data").unlink()
    with pytest.raises(MissingShard, match="not there"):
        read_onnx(path)


@pytest.mark.parametrize("mode", ["shared", "external"])
def test_truncated_data(tiny: Checkpoint, mode: str) -> None:
    path = export(tiny, weights=mode).path  # type: ignore[arg-type]
    data = tiny.directory / ("model.safetensors" if mode == "shared" else "model.onnx_data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        read_onnx(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-1"), ("offset", "99999999999"), ("offset", "1e3"), ("offset", "9" * 40),
     ("length", "4"), ("length", "-4"), ("length", "")],
)  # fmt: skip
def test_bounds(tiny: Checkpoint, key: str, value: str) -> None:
    with pytest.raises(CorruptFile):
        read_onnx(spoiled(export(tiny).path, setting(key, value)))


def test_dimensions_and_dtype(tiny: Checkpoint) -> None:
    def negative(model: onnx.ModelProto) -> None:
        next(t for t in model.graph.initializer if t.external_data).dims[0] = -1

    def huge(model: onnx.ModelProto) -> None:
        next(t for t in model.graph.initializer if t.external_data).dims[0] = 2**62

    def unknown(model: onnx.ModelProto) -> None:
        next(t for t in model.graph.initializer if t.external_data).data_type = 999

    def twice(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        tensor.external_data.add(key="location", value="../secret")

    for number, spoil in enumerate((negative, huge, unknown, twice)):
        path = export(tiny, file_name=f"{number}.onnx").path
        with pytest.raises(CorruptFile):
            read_onnx(spoiled(path, spoil))


def test_weights_that_changed_since(tiny: Checkpoint) -> None:
    """Same file name, other header: every offset would be off, in silence."""
    path, weights = export(tiny).path, tiny.directory / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"more": np.zeros(9, np.float32)}, weights)
    with pytest.raises(TensorMismatch, match="where the graph expects"):
        read_onnx(path)


@pytest.mark.parametrize("content", [b"", b"not onnx at all", b"\x08\x09", b"\xff" * 100])
def test_files_that_are_no_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CorruptFile):
        read_onnx(path)
    with pytest.raises(CorruptFile):
        read_onnx(tmp_path / "absent.onnx")


def test_every_truncation_is_refused(tiny: Checkpoint) -> None:
    path = export(tiny).path
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput):
            read_onnx(path)


def test_graphs_that_are_not_language_models(tiny: Checkpoint) -> None:
    def renamed(model: onnx.ModelProto) -> None:
        model.graph.input[0].name = "pixel_values"

    def without_logits(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = "last_hidden_state"

    def more(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("labels", TensorProto.INT64, [1]))

    def library(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "my.custom.ops"

    for number, spoil in enumerate((renamed, without_logits, more, library)):
        path = export(tiny, file_name=f"{number}.onnx").path
        with pytest.raises(ForeignGraph) as caught:
            read_onnx(spoiled(path, spoil))
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "proto",
    [
        TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[2**62], raw_data=b"abcd"),
        TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[2**32, 2**32], raw_data=b""),
        TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[0], raw_data=b"abcd"),
        TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[1] * 65, raw_data=b"abcd"),
        TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[4], float_data=[1.0]),
        TensorProto(name="x", data_type=TensorProto.STRING, dims=[1], raw_data=b"12345678"),
        TensorProto(name="x", data_type=TensorProto.COMPLEX128, dims=[1], raw_data=b"abcd"),
        TensorProto(name="x", data_type=TensorProto.INT4, dims=[4], raw_data=b"abcd"),
    ],
)
def test_inline_data_that_does_not_fit(tiny: Checkpoint, proto: TensorProto) -> None:
    path = export(tiny).path
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.append(proto)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptFile, match="dimensions"):
        read_onnx(path)


def test_inline_data_that_fits(tiny: Checkpoint) -> None:
    path = export(tiny).path
    model = onnx.load(path, load_external_data=False)
    packed = TensorProto(name="x", data_type=TensorProto.INT4, dims=[3], raw_data=b"ab")
    listed = helper.make_tensor("y", TensorProto.FLOAT16, [3], [1.0, 2.0, 3.0])
    pairs = TensorProto(
        name="z", data_type=TensorProto.COMPLEX64, dims=[2], float_data=[0, 1, 2, 0]
    )
    model.graph.initializer.extend([packed, listed, pairs])
    path.write_bytes(model.SerializeToString())
    assert read_onnx(path).n_weights == len(model.graph.initializer)
