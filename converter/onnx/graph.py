"""GPT-Neo as an ONNX graph, from the config and the weights' headers: nothing is traced.

The residual stream is [batch · pos, d] throughout: that is what Gemm takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from converter import __version__
from converter.checkpoint import NeoConfig
from converter.errors import NotRepresentable
from converter.layout import EMBEDDING, HEAD
from converter.onnx.attention import Geometry, attend, geometry
from converter.onnx.builder import Builder
from converter.onnx.dialect import (
    BATCH,
    DIALECT,
    LOGITS,
    MASK,
    PAST,
    POSITIONS,
    SEQUENCE,
    TOKENS,
    TOTAL,
    past_name,
)
from converter.onnx.operands import Initializers
from converter.onnx.weights import GraphWeights

PRODUCER = "neoconvert"
_GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}
_ACTIVATIONS = (*_GELU, "relu", "silu")


def build(
    weights: GraphWeights,
    directory: Path,
    *,
    with_past: bool,
    hooks: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> ir.Model:
    """The whole model.

    Args:
        directory: where the graph and the files that `weights` names will lie.
        with_past: whether cached keys and values come in and go out.
        hooks: names of the hook points that become outputs too, in this order.
        metadata: what else the file says of itself.

    Raises:
        NotRepresentable: the activation is one that the graph cannot express.
    """
    config = weights.checkpoint.config
    net = Builder(hooks)
    operands = Initializers(net, weights, directory)
    tokens = net.input(TOKENS, ir.DataType.INT64, (BATCH, SEQUENCE))
    total = TOTAL if with_past else SEQUENCE
    mask = net.input(MASK, ir.DataType.INT64, (BATCH, total))
    positions = net.input(POSITIONS, ir.DataType.INT64, (BATCH, SEQUENCE))
    past = [_past(net, config, layer) if with_past else [] for layer in range(config.n_layers)]
    cached = past[0][0] if with_past else None
    shared = geometry(net, config, tokens, mask, cached, heads_first=operands.hooked)

    residual = _embed(net, operands, config, tokens, positions)
    logits_shape = (BATCH, SEQUENCE, config.d_vocab)
    for layer in range(config.n_layers):
        residual = _block(net, operands, config, shared, layer, residual, past[layer])
    final = _norm(net, operands, config, shared, "ln_final", residual)
    with net.scope("unembed"):
        flat = operands.linear(final, HEAD, "unembed.b_U")
        logits = net.op("Reshape", flat, shared.residual)
    net.output(LOGITS, logits, logits_shape, ir.DataType.FLOAT)
    # Logits first, for clients that go by position; then the cache; hook points as ordered.
    rank = {name: i for i, name in enumerate(hooks, start=1)}
    net.outputs.sort(key=lambda v: -1 if v.name == LOGITS else rank.get(str(v.name), 0))
    return net.model(
        producer_name=PRODUCER,
        producer_version=__version__,
        metadata_props={
            "neoconvert.dialect": DIALECT,
            "neoconvert.layout": weights.checkpoint.layout,
            "neoconvert.weights": weights.mode,
            **(metadata or {}),
        },
    )


def _past(net: Builder, config: NeoConfig, layer: int) -> list[ir.Value]:
    shape = (BATCH, config.n_heads, PAST, config.d_head)
    return [net.input(past_name(layer, w), ir.DataType.FLOAT, shape) for w in ("key", "value")]


def _embed(
    net: Builder,
    operands: Initializers,
    config: NeoConfig,
    tokens: ir.Value,
    positions: ir.Value,
) -> ir.Value:
    """W_E[token] + W_pos[position], flattened to [rows, d]."""
    shape = (BATCH, SEQUENCE, config.d_model)
    with net.scope("embed"):
        embedded = operands.rows(EMBEDDING, tokens)
        net.hook("hook_embed", shape, lambda: embedded)
        placed = operands.rows("pos_embed.W_pos", positions)
        net.hook("hook_pos_embed", shape, lambda: placed)
        total = net.op("Add", embedded, placed)
        return net.op("Reshape", total, net.ints(-1, config.d_model))


def _block(
    net: Builder,
    operands: Initializers,
    config: NeoConfig,
    shared: Geometry,
    layer: int,
    residual: ir.Value,
    past: list[ir.Value],
) -> ir.Value:
    block = f"blocks.{layer}"

    def hook(name: str, value: ir.Value, width: int = config.d_model) -> None:
        _hook_rows(net, shared, f"{block}.{name}", value, width)

    hook("hook_resid_pre", residual)
    x = _norm(net, operands, config, shared, f"{block}.ln1", residual)
    attended = attend(net, operands, config, shared, layer, x, past)
    hook("hook_attn_out", attended)
    with net.scope(block):
        residual = net.op("Add", residual, attended)
    hook("hook_resid_mid", residual)
    x = _norm(net, operands, config, shared, f"{block}.ln2", residual)
    with net.scope(f"{block}.mlp"):
        before = operands.linear(x, f"{block}.mlp.W_in", f"{block}.mlp.b_in")
        after = _activate(net, config.act_fn, before)
        out = operands.linear(after, f"{block}.mlp.W_out", f"{block}.mlp.b_out")
    hook("mlp.hook_pre", before, config.d_mlp)
    hook("mlp.hook_post", after, config.d_mlp)
    hook("hook_mlp_out", out)
    with net.scope(block):
        residual = net.op("Add", residual, out)
    hook("hook_resid_post", residual)
    return residual


def _norm(
    net: Builder,
    operands: Initializers,
    config: NeoConfig,
    shared: Geometry,
    name: str,
    x: ir.Value,
) -> ir.Value:
    """LayerNorm of x [rows, d], and its hook points."""
    scale, normalised = f"{name}.hook_scale", f"{name}.hook_normalized"
    apart = bool(net.hooks & {scale, normalised})
    with net.scope(name):
        y, before, inverse = operands.layer_norm(
            x, f"{name}.w", f"{name}.b", config.eps, config.d_model, apart=apart
        )
        if scale in net.hooks:
            _hook_rows(net, shared, scale, net.op("Reciprocal", inverse), 1)
        _hook_rows(net, shared, normalised, before, config.d_model)
    return y


def _hook_rows(net: Builder, shared: Geometry, name: str, value: ir.Value, width: int) -> None:
    """A hook point on [rows, width], as [batch, pos, width]."""
    shape = (BATCH, SEQUENCE, width)
    net.hook(name, shape, lambda: net.op("Reshape", value, shared.residual))


def require_activation(name: str) -> None:
    """
    Raises:
        NotRepresentable: the graph cannot express it.
    """
    if name not in _ACTIVATIONS:
        raise NotRepresentable(
            f"The activation {name!r} is not one that the ONNX export knows.",
            where="config.json: activation_function",
            do=f"Convert it without a graph; a graph can have {', '.join(_ACTIVATIONS)}.",
        )


def _activate(net: Builder, name: str, x: ir.Value) -> ir.Value:
    require_activation(name)
    if name == "relu":
        return net.op("Relu", x)
    if name == "silu":
        return net.op("Mul", x, net.op("Sigmoid", x))
    return net.op("Gelu", x, approximate=_GELU[name])
