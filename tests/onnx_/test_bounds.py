"""A graph that asks for more than its size accounts for is refused before it has it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from converter.checkpoint import Checkpoint
from converter.onnx import bounds, export
from converter.onnx.bounds import AsksTooMuch, bounded, to_run
from converter.onnx.reading import ForeignGraph
from converter.onnx.session import Session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory so")

TOKENS = np.arange(6).reshape(1, 6)


def constant(name: str, *values: int) -> onnx.NodeProto:
    value = helper.make_tensor("v", TensorProto.INT64, [len(values)], values)
    return helper.make_node("Constant", [], [name], value=value)


def refused() -> list[onnx.NodeProto]:
    """Beyond what the operator itself allows."""
    return [constant("s", 2**20, 2**20), helper.make_node("Tile", ["input_ids", "s"], ["big"])]


def filled() -> list[onnx.NodeProto]:
    return [constant("s", 2**15, 2**15), helper.make_node("ConstantOfShape", ["s"], ["big"])]


def expanded() -> list[onnx.NodeProto]:
    """By a number that only the input gives, so that nothing can be folded."""
    return [
        constant("s", 2**28, 1, 6),
        helper.make_node("Expand", ["input_ids", "s"], ["big"]),
    ]


def tiled() -> list[onnx.NodeProto]:
    return [constant("s", 2**12, 2**12), helper.make_node("Tile", ["input_ids", "s"], ["big"])]


def counted() -> list[onnx.NodeProto]:
    scalars = [
        helper.make_node("Constant", [], [name], value_int=value)
        for name, value in (("a", 0), ("b", 2**31), ("c", 1))
    ]
    return [*scalars, helper.make_node("Range", ["a", "b", "c"], ["big"])]


def doubled() -> list[onnx.NodeProto]:
    """In steps, none of them large beside the one before."""
    nodes, name = [], "input_ids"
    for step in range(40):
        nodes.append(helper.make_node("Concat", [name, name], [f"c{step}"], axis=1))
        name = f"c{step}"
    return [*nodes, helper.make_node("Identity", [name], ["big"])]


def for_ever() -> list[onnx.NodeProto]:
    """2^62 steps."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]),
         helper.make_node("Add", ["x", "x"], ["more"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("on", TensorProto.BOOL, []),
         helper.make_tensor_value_info("x", TensorProto.INT64, None)],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []),
         helper.make_tensor_value_info("more", TensorProto.INT64, None)],
    )  # fmt: skip
    return [
        helper.make_node("Constant", [], ["steps"], value_int=2**62),
        helper.make_node("Loop", ["steps", "", "input_ids"], ["big"], body=body),
    ]


def asking(path: Path, nodes: list[onnx.NodeProto]) -> Path:
    model = onnx.load_model(str(path), load_external_data=False)
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    model.graph.output.append(onnx.ValueInfoProto(name="big"))
    path.write_bytes(model.SerializeToString())
    return path


def resident() -> int:
    return bounds._kib(bounds._STATUS, "VmRSS")


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("nodes", [filled, expanded, tiled, counted, doubled, refused])
def test_memory(
    tiny: Checkpoint, nodes: Callable[[], list[onnx.NodeProto]], optimised: bool
) -> None:
    path = asking(export(tiny).path, nodes())
    before = resident()
    with pytest.raises(AsksTooMuch, match="MiB of memory") as caught:
        Session(path, optimised=optimised)(TOKENS)
    assert caught.value.exit_code == 3
    assert resident() - before < 300 * 2**20


def test_time(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_SECONDS", 0.5)
    session = Session(asking(export(tiny).path, for_ever()))
    start = time.monotonic()
    with pytest.raises(AsksTooMuch, match="processor time"):
        session(TOKENS)
    assert time.monotonic() - start < 20


def test_only_the_threads_own_time_counts() -> None:
    """A busy machine, and other threads, decide nothing."""
    ended, stopped = threading.Event(), []

    def busy() -> None:
        while not ended.is_set():
            np.ones(10**6).sum()

    other = threading.Thread(target=busy)
    other.start()
    begun = time.process_time()
    with bounded(bounds.Allowance(2**30, 0.3), lambda: stopped.append(1), "a"):
        while time.process_time() - begun < 0.6:
            time.sleep(0.05)
    ended.set()
    other.join()
    assert not stopped


def test_limits_end_with_the_run(tiny: Checkpoint) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    sound = Session(export(tiny).path)
    wanted = sound(TOKENS)["logits"]
    hostile = Session(asking(export(tiny, file_name="hostile.onnx").path, expanded()))
    with pytest.raises(AsksTooMuch):
        hostile(TOKENS)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    np.testing.assert_array_equal(sound(TOKENS)["logits"], wanted)


def test_blocks_beside_one_another() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    small = bounds.Allowance(2**20, 60)
    large = to_run(2048, 2048, elements=10**9, widest=50257, heads=20, outputs=1)
    with bounded(large, lambda: None, "a"), bounded(small, lambda: None, "b"):
        assert np.ones(2**24).sum() == 2**24  # 128 MiB
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_cache_of_no_known_shape(tiny: Checkpoint) -> None:
    def spoil(path: Path, change: Callable[[onnx.ValueInfoProto], None]) -> Path:
        model = onnx.load_model(str(path), load_external_data=False)
        for value in model.graph.input:
            if value.name.startswith("past"):
                change(value)
        path.write_bytes(model.SerializeToString())
        return path

    def nameless(value: onnx.ValueInfoProto) -> None:
        value.type.tensor_type.shape.dim[1].dim_param = "heads"

    path = spoil(export(tiny).path, nameless)
    with pytest.raises(ForeignGraph, match="heads"):
        Session(path)
