"""ONNX: the graph, what it points at, and what it asks for when it runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from tests.hostile import sound
from tests.hostile.damage import NO_FILE, NONSENSE, Bytes, cut, flipped, replace, rewrite
from tests.hostile.trial import Input

Spoil = Callable[[onnx.ModelProto], object]
VERIFY = ["verify", sound.HF, "src/model.onnx", "--effort", "quick", "--check", "function"]
INSPECT = ["inspect", "src/model.onnx"]
REFUSED = frozenset({3})
ANY = frozenset({0, 1, 3})


@functools.cache
def _master() -> bytes:
    return (sound.graph() / "model.onnx").read_bytes()


def spoiled(spoil: Spoil) -> Bytes:
    def change(data: bytes) -> bytes:
        model = onnx.load_model_from_string(data)
        spoil(model)
        return bytes(model.SerializeToString())

    return change


def data_entry(key: str, value: str) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == key).value = value

    return spoil


def proto(**fields: Any) -> Spoil:
    return lambda model: model.graph.initializer.append(TensorProto(name="more", **fields))


def _ints(name: str, *values: int) -> onnx.NodeProto:
    value = helper.make_tensor("v", TensorProto.INT64, [len(values)], values)
    return helper.make_node("Constant", [], [name], value=value)


def _scalar(name: str, value: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value_int=value)


def asking(*nodes: onnx.NodeProto) -> Spoil:
    """Nodes before all others, whose value `big` is an output."""

    def spoil(model: onnx.ModelProto) -> None:
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        model.graph.output.append(onnx.ValueInfoProto(name="big"))

    return spoil


def _chain(op: str, count: int, **options: Any) -> list[onnx.NodeProto]:
    """A value joined to itself again and again."""
    nodes, name = [], "input_ids"
    for step in range(count):
        nodes.append(helper.make_node(op, [name, name], [f"step{step}"], **options))
        name = f"step{step}"
    return [*nodes, helper.make_node("Identity", [name], ["big"])]


def _loop(steps: int, *, growing: bool) -> list[onnx.NodeProto]:
    value = helper.make_tensor_value_info
    body = [helper.make_node("Identity", ["on"], ["still"])]
    if growing:
        body.append(helper.make_node("Concat", ["x", "x"], ["more"], axis=1))
    else:
        body.append(helper.make_node("Add", ["x", "x"], ["more"]))
    graph = helper.make_graph(
        body, "body",
        [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("x", TensorProto.INT64, None)],
        [value("still", TensorProto.BOOL, []), value("more", TensorProto.INT64, None)],
    )  # fmt: skip
    return [
        _scalar("steps", steps),
        helper.make_node("Loop", ["steps", "", "input_ids"], ["big"], body=graph),
    ]


def _recursive(model: onnx.ModelProto) -> None:
    call = helper.make_node("F", ["x"], ["y"], domain="mine")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    model.functions.append(helper.make_function("mine", "F", ["x"], ["y"], [call], opsets))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    asking(helper.make_node("F", ["input_ids"], ["big"], domain="mine"))(model)


def _doubling_functions(model: onnx.ModelProto) -> None:
    """Each calls the one below twice: 2**30 nodes when they are put in place."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    for level in range(30):
        inner = {"op_type": "Neg"} if level == 0 else {"op_type": f"F{level - 1}", "domain": "mine"}
        first = helper.make_node(inputs=["x"], outputs=["m"], **inner)
        second = helper.make_node(inputs=["m"], outputs=["y"], **inner)
        function = helper.make_function("mine", f"F{level}", ["x"], ["y"], [first, second], opsets)
        model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    asking(helper.make_node("F29", ["input_ids"], ["big"], domain="mine"))(model)


def _nested(depth: int) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["y0"])], "g", [], [onnx.ValueInfoProto(name="y0")])  # fmt: skip
        for level in range(1, depth):
            node = helper.make_node("If", ["yes"], [f"y{level}"], then_branch=graph, else_branch=graph)  # fmt: skip
            graph = helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name=f"y{level}")])
        model.graph.node.append(
            helper.make_node("If", ["yes"], ["z"], then_branch=graph, else_branch=graph)
        )

    return spoil


def _outputs(count: int) -> Spoil:
    return lambda m: m.graph.output.extend(onnx.ValueInfoProto(name="logits") for _ in range(count))


def _nodes(count: int) -> Spoil:
    """All of one name."""
    return lambda model: model.graph.node.extend(
        helper.make_node("Identity", ["input_ids"], [f"n{i}"], name="n") for i in range(count)
    )


def _meta(key: str, value: str) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        for entry in list(model.metadata_props):
            if entry.key == key:
                model.metadata_props.remove(entry)
        model.metadata_props.add(key=key, value=value)

    return spoil


def _past(change: Callable[[onnx.ValueInfoProto], object]) -> Spoil:
    def spoil(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            if value.name.startswith("past"):
                change(value)

    return spoil


def _heads(count: int) -> Spoil:
    def change(value: onnx.ValueInfoProto) -> None:
        value.type.tensor_type.shape.dim[1].dim_value = count

    return _past(change)


REFERENCES = [
    *(("location", at) for at in ("../model.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b", "no such", "model.onnx", "./model.onnx_data", "config.json")),
    *(("offset", at) for at in ("-1", "1e3", "99999999999", "9" * 40, "0x10", " 1", "1.5", "\u0661")),
    *(("length", at) for at in ("-4", "4", "0", "", "9" * 18)),
]  # fmt: skip
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
BROKEN: dict[str, Spoil] = {
    **{f"data at {key} {value!r:.20}": data_entry(key, value) for key, value in REFERENCES},
    "data of 2**62": proto(data_type=FLOAT, dims=[2**62], raw_data=b"abcd"),
    "data whose size overflows": proto(data_type=FLOAT, dims=[2**32, 2**32], raw_data=b""),
    "data of a negative size": proto(data_type=FLOAT, dims=[-4], raw_data=b""),
    "data of no dtype": proto(data_type=0, dims=[1], raw_data=b"abcd"),
    "data of a dtype unknown": proto(data_type=99, dims=[1], raw_data=b"abcd"),
    "text as raw data": proto(data_type=TensorProto.STRING, dims=[1], raw_data=b"12345678"),
    "lists too short": proto(data_type=FLOAT, dims=[4], float_data=[1.0]),
    "a hundred dimensions": proto(data_type=FLOAT, dims=[1] * 100, raw_data=b"abcd"),
    "an operator of a library": lambda m: setattr(m.graph.node[0], "domain", "my.ops"),
    "an input of no language model": lambda m: setattr(m.graph.input[0], "name", "pixels"),
    "no logits": lambda m: setattr(m.graph.output[0], "name", "hidden"),
    "no opset": lambda m: m.ClearField("opset_import"),
    "a function that calls itself": _recursive,
    "functions that double 30 times": _doubling_functions,
    "no nodes": lambda m: m.graph.ClearField("node"),
    "graphs 25 deep": lambda m: _deep_once(m, 25),
    "config that is no JSON": _meta("neoconvert.config", "{"),
    "config of lists in lists": _meta("neoconvert.config", "[" * 10**6),
    "config of another kind": _meta("neoconvert.config", '{"n_layers": "x"}'),
    "provenance that is no JSON": _meta("neoconvert.provenance", "\x1b[2J"),
}  # fmt: skip
UNFIT: dict[str, Spoil] = {
    "an operator unknown": lambda m: setattr(m.graph.node[0], "op_type", "Run"),
    "a future opset": lambda m: setattr(m.opset_import[0], "version", 9999),
    "graphs 12 deep, each twice": _nested(12),
    "a circle": lambda m: m.graph.node[0].input.append(m.graph.node[-1].output[0]),
    "an output of nothing": lambda m: m.graph.output.append(onnx.ValueInfoProto(name="none")),
    "a cache of heads by name": _past(lambda v: setattr(v.type.tensor_type.shape.dim[1], "dim_param", "h")),
    "a cache of no shape": _past(lambda v: v.type.tensor_type.ClearField("shape")),
    "a cache of text": _past(lambda v: setattr(v.type.tensor_type, "elem_type", TensorProto.STRING)),
}  # fmt: skip
"""What only onnxruntime refuses."""
ASKS: dict[str, Spoil] = {
    "a constant of 4 GB": asking(_ints("s", 2**15, 2**15), helper.make_node("ConstantOfShape", ["s"], ["big"])),
    "a constant of 4 TB": asking(_ints("s", 2**20, 2**20), helper.make_node("ConstantOfShape", ["s"], ["big"])),
    "an expansion to 12 GB": asking(_ints("s", 2**28, 1, 1), helper.make_node("Expand", ["input_ids", "s"], ["big"])),
    "1.6 GB of tiles": asking(_ints("s", 2**12, 2**12), helper.make_node("Tile", ["input_ids", "s"], ["big"])),
    "terabytes of tiles": asking(_ints("s", 2**20, 2**20), helper.make_node("Tile", ["input_ids", "s"], ["big"])),
    "2**31 numbers": asking(_scalar("a", 0), _scalar("b", 2**31), _scalar("c", 1), helper.make_node("Range", ["a", "b", "c"], ["big"])),
    "16 GB of padding": asking(_ints("p", 0, 0, 2**30, 1), helper.make_node("Pad", ["input_ids", "p"], ["big"])),
    "a matrix of a million": asking(_scalar("d", 10**6), _ints("v", 0, 1), _ints("w", 999, 1, 1, 1), helper.make_node("OneHot", ["input_ids", "d", "v"], ["one"]), helper.make_node("Expand", ["one", "w"], ["big"])),
    "an outer product of 2**36": asking(_ints("s", 2**18, 1), _ints("t", 1, 2**18), helper.make_node("ConstantOfShape", ["s"], ["x"]), helper.make_node("ConstantOfShape", ["t"], ["y"]), helper.make_node("MatMul", ["x", "y"], ["big"])),
    "doubled 40 times": asking(*_chain("Concat", 40, axis=1)),
    "a loop of 2**62": asking(*_loop(2**62, growing=False)),
    "a loop that doubles": asking(*_loop(2**62, growing=True)),
    "random numbers": asking(helper.make_node("RandomNormal", [], ["big"], shape=[2**16, 2**15])),
}  # fmt: skip
MAY_BE: dict[str, Spoil] = {
    "2,000 outputs of one name": _outputs(2000),
    "20,000 nodes of one name": _nodes(20_000),
    "a long comment": lambda m: setattr(m, "doc_string", "x" * 10**7),
    "escape sequences": lambda m: setattr(m, "producer_name", "\x1b]0;x\x07\u202e"),
    "a node called by escape sequences": lambda m: setattr(m.graph.node[3], "name", "\x1b[2J\n   do: rm"),
    "a billion heads": _heads(10**9),
    "no heads": _heads(0),
    "another layout": _meta("neoconvert.layout", "\x1b"),
    "a config twice": lambda m: m.metadata_props.add(key="neoconvert.config", value="{}"),
}  # fmt: skip


def _deep_once(model: onnx.ModelProto, depth: int) -> None:
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["y0"])], "g", [], [])
    for level in range(1, depth):
        node = helper.make_node("If", ["yes"], [f"y{level}"], then_branch=graph)
        graph = helper.make_graph([node], "g", [], [])
    model.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=graph))


def inputs() -> Iterator[Input]:
    for name, spoil in BROKEN.items():
        yield _input(name, spoiled(spoil), VERIFY)
    for turn, (name, spoil) in enumerate(BROKEN.items()):
        if turn % 2:
            yield _input(name, spoiled(spoil), INSPECT, frozenset({0, 3}))
    for name, spoil in UNFIT.items():
        yield _input(name, spoiled(spoil), VERIFY)
        yield _input(name, spoiled(spoil), INSPECT, frozenset({0, 3}))
    for name, spoil in ASKS.items():
        yield _input(name, spoiled(spoil), VERIFY)
        yield _input(name, spoiled(spoil), INSPECT, frozenset({0, 3}))
    for name, spoil in MAY_BE.items():
        yield _input(name, spoiled(spoil), VERIFY, ANY)
        yield _input(name, spoiled(spoil), INSPECT, frozenset({0, 3}))
    for name, damage in NONSENSE.items():
        yield _input(name, damage, VERIFY)
        yield _input(name, damage, INSPECT)
    for step in range(1, 20):
        yield _input(f"cut at {step / 20:.0%}", cut(step / 20), VERIFY)
    for seed in range(80):
        yield _input(f"seed {seed}", flipped(seed), VERIFY, ANY)
    for name, other in NO_FILE.items():
        yield _replaced("model.onnx", name, other)
        yield _replaced("model.onnx_data", name, other)
    for name, damage in {"cut": cut(0.9), "empty": cut(0), "one byte short": lambda d: d[:-1]}.items():  # fmt: skip
        yield _input(name, damage, VERIFY, file="model.onnx_data")
    yield Input("external data", "a link out of the directory", _linked, REFUSED)


def _input(
    name: str,
    damage: Bytes,
    command: list[str],
    codes: frozenset[int] = REFUSED,
    file: str = "model.onnx",
) -> Input:
    def make(place: Path) -> list[str]:
        rewrite(sound.copied(sound.graph, place / "src") / file, damage)
        return sound.filled(command)

    kind = "external data" if name.startswith("data at") or file != "model.onnx" else ".onnx"
    return Input(kind, f"{name} ({command[0]})", make, codes)


def _replaced(file: str, name: str, other: Callable[[Path], object]) -> Input:
    def make(place: Path) -> list[str]:
        replace(sound.copied(sound.graph, place / "src") / file, other)
        return sound.filled(VERIFY)

    codes = ANY if "holes" in name else REFUSED  # which are zeros, as good as any weights
    return Input(".onnx" if file == "model.onnx" else "external data", name, make, codes)


def _linked(place: Path) -> list[str]:
    data = sound.copied(sound.graph, place / "src") / "model.onnx_data"
    os.rename(data, place / "elsewhere")
    data.symlink_to("../elsewhere")
    return sound.filled(VERIFY)
