"""Functions of a file, counted in place of their calls, and what onnxruntime would make of them."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from converter.checkpoint import Checkpoint
from converter.errors import CorruptFile
from converter.onnx import export, read_onnx
from converter.onnx.functions import Call, expanded
from tests.hostile.graphs import BROKEN, spoiled


def calls(*names: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node(name, [], [], domain="mine" if name.isupper() else "") for name in names
    ]


def test_counted() -> None:
    functions: dict[Call, list[onnx.NodeProto]] = {
        ("mine", "A"): calls("Add", "Mul"),
        ("mine", "B"): calls("A", "A", "Neg"),
        ("mine", "C"): [],
    }
    assert expanded(calls("Add"), functions) == 1
    assert expanded(calls("B", "A", "C", "Add"), functions) == 5 + 2 + 0 + 1


@pytest.mark.parametrize("inner", [["A"], ["B"], ["Add", "C"]])
def test_circles(inner: list[str]) -> None:
    functions: dict[Call, list[onnx.NodeProto]] = {
        ("mine", "A"): calls(*inner),
        ("mine", "B"): calls("A"),
        ("mine", "C"): calls("B"),
    }
    assert expanded(calls("Add"), functions) is None


def test_long_chains() -> None:
    """Without recursion, and in linear time for one that is written in order."""
    names = [f"F{i}".replace("0", "O") for i in range(500)]
    functions: dict[Call, list[onnx.NodeProto]] = {
        ("mine", name): calls(*([names[i - 1]] if i else ["Add"])) for i, name in enumerate(names)
    }
    assert expanded(calls(names[-1]), functions) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [("a function that calls itself", "calls itself"), ("functions that double 30 times", "nodes")],
)
def test_functions_that_call_one_another(name: str, says: str, tiny: Checkpoint) -> None:
    path = export(tiny).path
    path.write_bytes(spoiled(BROKEN[name])(path.read_bytes()))
    with pytest.raises(CorruptFile, match=says):
        read_onnx(path)
