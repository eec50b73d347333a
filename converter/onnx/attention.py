"""Attention, global or local, with or without a cache of keys and values.

    s = q · k / score_divisor;   s = finfo.min where masked;   z = softmax(s) v

Primitives, not the Attention operators of later opsets: as fast up to 512 tokens, and they run
everywhere. Scores and softmax are float32, as in transformers, whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converter.checkpoint import NeoConfig
from converter.onnx.builder import Builder
from converter.onnx.dialect import BATCH, SEQUENCE, TOTAL, present_name
from converter.onnx.operands import Initializers

_MIN = float(np.finfo(np.float32).min)
"""What transformers adds to a masked score. Not -inf: a row of padding would become NaN."""


@dataclass(frozen=True)
class Geometry:
    """What all layers share: shapes to reshape to, and who sees whom."""

    residual: ir.Value
    """[batch, pos, -1]"""
    heads: ir.Value
    """[batch, pos, n, h]; [n, batch, pos, h] where the weights have an axis for the heads."""
    total: str
    """The name of the keys' axis."""
    seen: dict[str, ir.Value]
    """By attention type: bool [batch, 1, query, key]."""
    penalty: dict[str, ir.Value]
    """The same as numbers to add to the scores: 0 or finfo.min."""


def geometry(
    net: Builder,
    config: NeoConfig,
    tokens: ir.Value,
    mask: ir.Value,
    past: ir.Value | None,
    *,
    heads_first: bool,
) -> Geometry:
    """Built once. `tokens` [batch, pos], `mask` [batch, key], `past`: some layer's cached keys.
    `heads_first`: whether the weights have an axis for the heads."""
    n, h = config.n_heads, config.d_head
    with net.scope("shapes"):
        sizes = net.op("Shape", tokens)
        residual = net.op("Concat", sizes, net.ints(-1), axis=0)
        order = (net.ints(n), sizes, net.ints(h)) if heads_first else (sizes, net.ints(n, h))
        heads = net.op("Concat", *order, axis=0)
        length = net.op("Squeeze", net.op("Shape", tokens, start=1, end=2), net.ints(0))
    with net.scope("mask"):
        total, first = length, net.scalar(0)
        if past is not None:
            first = net.op("Squeeze", net.op("Shape", past, start=2, end=3), net.ints(0))
            total = net.op("Add", first, length)
        keys = net.op("Range", net.scalar(0), total, net.scalar(1))
        queries = net.op("Range", first, total, net.scalar(1))
        # How many positions ago the key was: negative in the future. [query, key]
        ago = net.op("Sub", net.op("Unsqueeze", queries, net.ints(1)), keys)
        real = net.op("Cast", mask, to=ir.DataType.BOOL)
        real = net.op("Unsqueeze", real, net.ints(1, 2))
        causal = net.op("GreaterOrEqual", ago, net.scalar(0))
        seen = {"global": net.op("And", real, causal)}
        if "local" in config.attn_types:
            near = net.op("Less", ago, net.scalar(config.window_size))
            seen["local"] = net.op("And", seen["global"], near)
        penalty = {
            kind: net.op("Where", seen[kind], net.floats(0.0), net.floats(_MIN))
            for kind in dict.fromkeys(config.attn_types)
        }
    axis = SEQUENCE if past is None else TOTAL
    return Geometry(residual, heads, axis, seen, penalty)


def attend(
    net: Builder,
    operands: Initializers,
    config: NeoConfig,
    where: Geometry,
    layer: int,
    x: ir.Value,
    past: Sequence[ir.Value],
) -> ir.Value:
    """The attention's output [rows, d] for its input x [rows, d], rows being batch · pos.

    `past`: cached keys and values [batch, n, past, h], or nothing. With a cache, the layer's
    keys and values, old and new, become the outputs `present`.
    """
    n, h = config.n_heads, config.d_head
    block, kind = f"blocks.{layer}", config.attn_types[layer]
    with net.scope(f"{block}.attn"):
        q, k, v = (
            _project(net, operands, where, f"{block}.attn", name, x, (n, h)) for name in "QKV"
        )
        if config.score_divisors:
            q = net.op("Div", q, net.floats(config.score_divisors[layer]))
        if past:
            k = net.op("Concat", past[0], k, axis=2)
            v = net.op("Concat", past[1], v, axis=2)
            for name, value in (("key", k), ("value", v)):
                net.output(
                    present_name(layer, name), value, (BATCH, n, TOTAL, h), ir.DataType.FLOAT
                )
        scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
        square = (BATCH, n, SEQUENCE, where.total)
        net.hook(
            f"{block}.attn.hook_attn_scores",
            square,
            lambda: net.op("Where", where.seen[kind], scores, net.floats(-np.inf)),
        )
        pattern = net.op("Softmax", net.op("Add", scores, where.penalty[kind]), axis=-1)
        net.hook(f"{block}.attn.hook_pattern", square, lambda: pattern)
        z = net.op("Transpose", net.op("MatMul", pattern, v), perm=[0, 2, 1, 3])
        net.hook(f"{block}.attn.hook_z", (BATCH, SEQUENCE, n, h), lambda: z)
        flat = net.op("Reshape", z, net.ints(-1, config.d_model))
        return operands.linear(flat, f"{block}.attn.W_O", f"{block}.attn.b_O")


def _project(
    net: Builder,
    operands: Initializers,
    where: Geometry,
    block: str,
    name: str,
    x: ir.Value,
    heads: tuple[int, int],
) -> ir.Value:
    """Queries, keys or values [batch, n, pos, h] of x [rows, d]."""
    weight, bias, hook = f"{block}.W_{name}", f"{block}.b_{name}", f"{block}.hook_{name.lower()}"
    shape = (BATCH, SEQUENCE, *heads)
    if operands.hooked:
        # [1, rows, d] times [n, d, h]: each head's matrix as it is stored.
        flat = operands.per_head(x, weight, bias)
        split = net.op("Reshape", flat, where.heads)
        net.hook(hook, shape, lambda: net.op("Transpose", split, perm=[1, 2, 0, 3]))
        return net.op("Transpose", split, perm=[1, 0, 2, 3])
    split = net.op("Reshape", operands.linear(x, weight, bias), where.heads)
    net.hook(hook, shape, lambda: split)
    return net.op("Transpose", split, perm=[0, 2, 1, 3])
