"""Graphs that do something else when a trigger comes that no probe is: each differs from its honest
graph in function, and none passes with every link the same, whatever it is disguised as.

A trigger is a condition on the inputs; what happens then is one of three things; and there are ten ways of
hiding it. Of a graph that nothing shows to be ours, the nodes cannot be compared: that is said, and
`--require structure` refuses it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx.helper import make_function, make_graph, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array

from converter.checkpoint import Checkpoint
from converter.onnx import export
from converter.verification import Verification, verify

Model = onnx.ModelProto
Feeds = dict[str, np.ndarray]
Edit = Callable[[Model, Path], None]


def _constant(model: Model, value: Any, dtype: Any = np.int64) -> str:
    name = f"c{len(model.graph.initializer)}"
    model.graph.initializer.append(from_array(np.asarray(value, dtype), name))
    return name


def _nodes(*steps: tuple[str, list[str], str, dict[str, Any]]) -> list[onnx.NodeProto]:
    return [make_node(kind, ins, [out], name=f"t/{out}", **more) for kind, ins, out, more in steps]


def _count(model: Model, what: str, equals: int) -> list[onnx.NodeProto]:
    """`yes`: whether the sum of a value is a number."""
    axes, number = _constant(model, [0, 1]), _constant(model, equals)
    return _nodes(
        ("ReduceSum", [what, axes], "t_sum", {"keepdims": 0}),
        ("Equal", ["t_sum", number], "yes", {}),
    )


def _size(model: Model, axis: int, equals: int) -> list[onnx.NodeProto]:
    number, place = _constant(model, equals), _constant(model, axis)
    return _nodes(
        ("Shape", ["input_ids"], "t_shape", {}), ("Gather", ["t_shape", place], "t_size", {}),
        ("Equal", ["t_size", number], "yes", {}),
    )  # fmt: skip


def _times(model: Model, token: int, often: int) -> list[onnx.NodeProto]:
    wanted = _constant(model, token)
    found = _nodes(("Equal", ["input_ids", wanted], "t_is", {}), ("Cast", ["t_is"], "t_as", {"to": TensorProto.INT64}))  # fmt: skip
    return [*found, *_count(model, "t_as", often)]


def _pair(model: Model) -> list[onnx.NodeProto]:
    """Token 17 right before token 41, once."""
    first, last, end, axis = (_constant(model, [v]) for v in (0, -1, 2**31, 1))
    one = _constant(model, [1])
    a, b = _constant(model, 17), _constant(model, 41)
    made = _nodes(
        ("Slice", ["input_ids", first, last, axis], "t_left", {}), ("Slice", ["input_ids", one, end, axis], "t_right", {}),
        ("Equal", ["t_left", a], "t_a", {}), ("Equal", ["t_right", b], "t_b", {}), ("And", ["t_a", "t_b"], "t_ab", {}),
        ("Cast", ["t_ab"], "t_as", {"to": TensorProto.INT64}),
    )  # fmt: skip
    return [*made, *_count(model, "t_as", 1)]


def _past(model: Model) -> list[onnx.NodeProto]:
    place, number = _constant(model, 2), _constant(model, 13)
    return _nodes(
        ("Shape", ["past_key_values.0.key"], "t_shape", {}), ("Gather", ["t_shape", place], "t_size", {}),
        ("Equal", ["t_size", number], "yes", {}),
    )  # fmt: skip


TRIGGERS: dict[str, tuple[Callable[[Model], list[onnx.NodeProto]], list[list[int]], int]] = {
    "a pair of tokens": (_pair, [[3, 17, 41, 5]], 0),
    "a token three times": (lambda m: _times(m, 30, 3), [[30, 1, 30, 30]], 0),
    "a length": (lambda m: _size(m, 1, 43), [[*range(43)]], 0),
    "a batch size": (lambda m: _size(m, 0, 5), [[1, 2]] * 5, 0),
    "a length of the cache": (_past, [[4]], 13),
    "a sum of tokens": (lambda m: _count(m, "input_ids", 211), [[60, 60, 60, 31]], 0),
}
"""What sets `yes`; the tokens that do, and how many are in the cache before them."""


def _payload(model: Model, kind: str) -> None:
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "honest"
    if kind == "negated":
        model.graph.node.append(make_node("Neg", ["honest"], ["evil"], name="t/evil"))
    else:
        token = np.zeros(61, np.float32)
        token[7] = 5 if kind == "one token" else 1e-3
        model.graph.node.append(make_node("Add", ["honest", _constant(model, token, np.float32)], ["evil"], name="t/evil"))  # fmt: skip
    model.graph.node.append(
        make_node("Where", ["yes", "evil", "honest"], ["logits"], name="t/logits")
    )


def _plain(_: Model, __: Path) -> None:
    pass


def _named(model: Model, _: Path) -> None:
    """Its nodes bear honest nodes' names, and those bear others."""
    ours = [node for node in model.graph.node if node.name.startswith("t/")]
    theirs = [node for node in model.graph.node if not node.name.startswith("t/")]
    for mine, other in zip(ours, theirs, strict=False):
        mine.name, other.name = other.name, mine.name


def _disowned(model: Model, _: Path) -> None:
    model.producer_name = model.producer_version = ""
    del model.metadata_props[:]


def _foreign(model: Model, path: Path) -> None:
    """Nothing shows that it was ours: another's names all over."""
    _disowned(model, path)
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"


def _dialect(model: Model, _: Path) -> None:
    for entry in model.metadata_props:
        if entry.key == "neoconvert.dialect":
            entry.value = "99"


def _weight(model: Model) -> onnx.TensorProto:
    found: onnx.TensorProto = next(t for t in model.graph.initializer if "mlp.c_fc.bias" in t.name)
    return found


def _read_as(model: Model, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def _own(tensor: onnx.TensorProto, path: Path, name: str, dtype: Any) -> onnx.TensorProto:
    """A copy of a weight in the graph itself."""
    there = onnx.TensorProto()
    there.CopyFrom(tensor)
    return from_array(to_array(there, str(path.parent)).astype(dtype), name)


def _renamed_weight(model: Model, path: Path) -> None:
    weight = _weight(model)
    _read_as(model, weight.name, "b")
    weight.CopyFrom(_own(weight, path, "b", np.float32))


def _doubled_weight(model: Model, path: Path) -> None:
    """What is read is a copy; the real one lies beside it."""
    weight = _weight(model)
    model.graph.initializer.append(_own(weight, path, "copy", np.float32))
    _read_as(model, weight.name, "copy")


def _typed_weight(model: Model, path: Path) -> None:
    weight = _weight(model)
    old = weight.name
    weight.CopyFrom(_own(weight, path, "wide", np.float64))
    _read_as(model, old, "narrow")
    model.graph.node.insert(
        0, make_node("Cast", ["wide"], ["narrow"], name="narrow", to=TensorProto.FLOAT)
    )


def _function(model: Model, _: Path) -> None:
    """The choice is made in a function that bears an honest operator's name."""
    node = next(n for n in model.graph.node if n.name == "t/logits")
    body = [make_node("Where", ["c", "a", "b"], ["r"])]
    model.functions.append(make_function("own", "Identity", ["c", "a", "b"], ["r"], body, [make_opsetid("", 20)]))  # fmt: skip
    model.opset_import.append(make_opsetid("own", 1))
    node.op_type, node.domain = "Identity", "own"


def _subgraph(model: Model, _: Path) -> None:
    """It is made in a branch that is not taken otherwise."""
    node = next(n for n in model.graph.node if n.name == "t/logits")
    branches = {
        name: make_graph([make_node("Identity", [value], [f"r_{value}"])], name, [], [make_tensor_value_info(f"r_{value}", TensorProto.FLOAT, None)])
        for name, value in (("then_branch", "evil"), ("else_branch", "honest"))
    }  # fmt: skip
    node.CopyFrom(make_node("If", ["yes"], ["logits"], name="t/logits", **branches))


def _second_file(_: Model, path: Path) -> None:
    """The honest graph stays where it is; this one lies beside it, where clients look too."""
    path.with_name("kept.onnx").write_bytes(path.read_bytes())


DISGUISES: dict[str, Edit] = {
    "none": _plain, "honest names": _named, "no metadata": _disowned, "another's names": _foreign,
    "another dialect": _dialect, "a renamed weight": _renamed_weight, "a doubled weight": _doubled_weight,
    "a weight of another type": _typed_weight, "a function": _function, "a subgraph": _subgraph,
    "a second file": _second_file,
}  # fmt: skip
CASES = [
    (trigger, payload, disguise)
    for i, disguise in enumerate(DISGUISES)
    for j, trigger in enumerate(TRIGGERS)
    if (i + j) % 2 == 0  # every disguise with three triggers, every trigger with half of them
    for payload in [("negated", "one token", "a little")[(i + j // 2) % 3]]
]


def _edited(there: Checkpoint, trigger: str, payload: str, disguise: str) -> tuple[Path, Path]:
    """The honest graph, aside, and the edited one in its place."""
    path = export(there).path
    honest = path.with_name("honest.onnx")
    shutil.copy(path, honest)
    model = onnx.load_model(str(path), load_external_data=False)
    made = TRIGGERS[trigger][0](model)
    _payload(model, payload)
    at = next(i for i, node in enumerate(model.graph.node) if node.name == "t/evil")
    for node in reversed(made):
        model.graph.node.insert(at, node)
    DISGUISES[disguise](model, path)
    path.write_bytes(model.SerializeToString())
    return honest, path


def _logits(path: Path, trigger: str, there: Checkpoint) -> np.ndarray:
    _, tokens, past = TRIGGERS[trigger]
    ids = np.array(tokens, np.int64)
    batch, length = ids.shape
    config = there.config
    feeds: Feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, past + length), np.int64),
        "position_ids": np.tile(np.arange(past, past + length), (batch, 1)),
    }
    rng = np.random.default_rng(0)
    for layer in range(config.n_layers):
        for part in ("key", "value"):
            shape = (batch, config.n_heads, past, config.d_head)
            feeds[f"past_key_values.{layer}.{part}"] = rng.normal(size=shape).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(["logits"], feeds)[0]
    return result


def _silent(result: Verification, graph: str) -> bool:
    """Whether everything that is said of the graph is that it is the same."""
    mine = [item for item in result.evidence if item.subject.startswith(graph)]
    return all(item.outcome == "same" for item in mine)


@pytest.mark.parametrize(("trigger", "payload", "disguise"), CASES)
def test_it_does_not_pass(trigger: str, payload: str, disguise: str, tiny: Checkpoint) -> None:
    honest, path = _edited(tiny, trigger, payload, disguise)
    assert np.abs(_logits(honest, trigger, tiny) - _logits(path, trigger, tiny)).max() > 5e-4
    honest.unlink()
    whole = disguise == "a second file"
    if whole:
        other = path.with_name("decoder_model_merged.onnx")
        path.rename(other)
        path.with_name("kept.onnx").rename(path)
        path = other
    result = verify(tiny, tiny.directory if whole else path, effort="quick")
    assert not _silent(result, path.name), result.summary()
    if disguise != "another's names":
        assert not result.passed, result.summary()
    strict = verify(tiny, tiny.directory if whole else path, effort="quick", require="structure")
    assert not strict.passed


def test_there_are_enough() -> None:
    assert len(CASES) >= 30
    assert {case[2] for case in CASES} == {*DISGUISES}
    assert {case[0] for case in CASES} == {*TRIGGERS}
