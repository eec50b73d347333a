"""Faults of structure: edits of an ONNX graph whose weights and config are the original's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from tests.verification.fault import Fault
from tests.verification.graph import Graph, make

_END = np.iinfo(np.int64).max
B = "blocks.1"


def _cache_late(graph: Graph) -> None:
    """Each position holds the keys of the one before."""
    keys = graph.detached(f"{B}.attn/Concat", "present.1.key")
    ints = [graph.constant(np.array([i])) for i in (0, 1, -1, 2)]
    zero, first, last, axis = ints
    graph.after(
        f"{B}.attn/Concat",
        make("Slice", [keys, zero, first, axis], "late/first"),
        make("Slice", [keys, zero, last, axis], "late/rest"),
        make("Concat", ["late/first", "late/rest"], "present.1.key", axis=2),
    )


def _cache_exchanged(graph: Graph) -> None:
    keys = graph.detached(f"{B}.attn/Concat", "present.1.key")
    values = graph.detached(f"{B}.attn/Concat_2", "present.1.value")
    graph.after(
        f"{B}.attn/Concat_2",
        make("Identity", [keys], "present.1.value"),
        make("Identity", [values], "present.1.key"),
    )


def _cache_position(graph: Graph) -> None:
    """With a cache, queries think they are one position further than they are."""
    one = graph.constant(np.array(1))
    graph.after(
        "mask/Add",
        make("Min", ["mask/Squeeze", one], "off"),
        make("Add", ["mask/Squeeze", "off"], "first"),
        make("Add", ["mask/Add", "off"], "end"),
    )
    graph.read("mask/Range_2", 0, "first")
    graph.read("mask/Range_2", 1, "end")


def _cache_forgotten(graph: Graph) -> None:
    node = graph.node(f"{B}.attn/Concat_2")
    zero = graph.constant(np.float32(0))
    graph.after(f"{B}.attn/Transpose_3", make("Mul", [node.input[0], zero], "forgotten"))
    node.input[0] = "forgotten"


def _batch_mixed(graph: Graph) -> None:
    """The rows of a batch come out in reverse."""
    inside = graph.detached("unembed/Reshape", "logits")
    places = [graph.constant(np.array([i])) for i in (-1, -_END, 0, -1)]
    graph.after("unembed/Reshape", make("Slice", [inside, *places], "logits"))


def _future(graph: Graph) -> None:
    graph.read("mask/GreaterOrEqual", 1, graph.constant(np.array(-1)))


def _own_hidden(graph: Graph) -> None:
    graph.read("mask/GreaterOrEqual", 1, graph.constant(np.array(1)))


def _half_arithmetic(graph: Graph) -> None:
    name = f"{B}.mlp/Gelu"
    graph.through(name, "Cast", to=onnx.TensorProto.FLOAT16)
    graph.through(f"{name}/Cast", "Cast", to=onnx.TensorProto.FLOAT)


def _scaled(graph: Graph) -> None:
    graph.through(f"{B}.attn/MatMul_4", "Div", graph.constant(np.float32(2)))


def _final_norm_skipped(graph: Graph) -> None:
    norm = graph.node("ln_final/LayerNormalization")
    head = next(n for n in graph.model.graph.node if norm.output[0] in n.input)  # tied: a Gemm
    head.input[0] = norm.input[0]


def _fault(name: str, unit: str | None, edit: Callable[[Graph], None], **more: Any) -> Fault:
    return Fault(f"graph: {name}", ("onnx",), unit, graph=edit, **more)


def _bias_lost(graph: Graph) -> None:
    graph.become(f"{B}.attn/Add_2", "Identity", f"{B}.attn/MatMul_6")


def _turned(graph: Graph) -> None:
    node = graph.node(f"{B}.attn/MatMul_6")
    graph.after(f"{B}.attn/Softmax", make("Transpose", [node.input[1]], "turned", perm=[1, 0]))
    node.input[1] = "turned"


_PROJECTION = "transformer.h.{}.attn.attention.{}_proj.weight"

GRAPH_FAULTS: tuple[Fault, ...] = (
    _fault("residual not added after attention", "block 1",
           lambda g: g.become(f"{B}/Add", "Identity", f"{B}.attn/Add_2")),
    _fault("residual not added after the MLP", "block 1",
           lambda g: g.become(f"{B}/Add_2", "Identity", f"{B}.mlp/Add_2")),
    _fault("attention skipped", "block 1",
           lambda g: g.become(f"{B}/Add", "Identity", "blocks.0/Add_2")),
    _fault("MLP skipped", "block 1",
           lambda g: g.become(f"{B}/Add_2", "Identity", f"{B}/Add")),
    _fault("MLP reads what attention reads", "block 1",
           lambda g: g.read(f"{B}.ln2/LayerNormalization", 0, "blocks.0/Add_2")),
    _fault("softmax over the queries", "block 1",
           lambda g: g.attribute(f"{B}.attn/Softmax", axis=-2)),
    # Of a residual stream as large as those of most models here, this moves less than the noise.
    _fault("epsilon 1e-6 in one LayerNorm", "block 1",
           lambda g: g.attribute(f"{B}.ln1/LayerNormalization", epsilon=1e-6), faint=True),
    _fault("epsilon 1e-6 in the last LayerNorm", "final",
           lambda g: g.attribute("ln_final/LayerNormalization", epsilon=1e-6), faint=True),
    _fault("gelu for gelu_new in one block", "block 1",
           lambda g: g.attribute(f"{B}.mlp/Gelu", approximate="none")),
    _fault("future token visible", "block 0", _future),
    _fault("own token hidden", "block 0", _own_hidden),
    _fault("one local layer global", "block 1",
           lambda g: g.read(f"{B}.attn/Add", 1, "mask/Where")),
    _fault("padding ignored", "block 0",
           lambda g: g.become("mask/And", "Identity", "mask/GreaterOrEqual")),
    _fault("position_ids ignored", "embed",
           lambda g: g.read("embed/Gather_2", 1, "mask/Range_2")),
    _fault("cached keys one step late", None, _cache_late),
    _fault("cached keys and values exchanged", None, _cache_exchanged),
    _fault("cache position off by one", None, _cache_position),
    _fault("cached values forgotten", None, _cache_forgotten),
    _fault("W_O turned round", "block 1", _turned),
    _fault("W_K read for W_Q", "block 1",
           lambda g: g.read(f"{B}.attn/MatMul", 1, _PROJECTION.format(1, "k"))),
    _fault("W_V of the block before", "block 1",
           lambda g: g.read(f"{B}.attn/MatMul_3", 1, _PROJECTION.format(0, "v"))),
    _fault("b_O not read", "block 1", _bias_lost),
    _fault("scores halved", "block 1", _scaled),
    _fault("last LayerNorm skipped", "final", _final_norm_skipped),
    _fault("float16 arithmetic in one MLP", "block 1", _half_arithmetic),
    _fault("rows of a batch exchanged", "final", _batch_mixed),
)  # fmt: skip
