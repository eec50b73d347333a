"""Weights as operands: one initializer each, widened where needed, multiplied as stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from converter.layout import EMBEDDING, HEAD
from converter.onnx.builder import Builder
from converter.onnx.weights import Form, GraphWeights


class Initializers:
    """The weights of a graph under construction, by `hooked` name.

    The graph computes in float32. Weights of other dtypes pass through Cast, which onnxruntime
    does once, when it loads the model: it has no bfloat16 arithmetic on CPU, and would compute
    in float16 by casting to float32 and back around every single node.
    """

    def __init__(self, net: Builder, weights: GraphWeights, directory: Path) -> None:
        self.net, self.weights, self._directory = net, weights, directory
        self._stored: dict[str, ir.Value] = {}
        self._wide: dict[str, ir.Value] = {}

    @property
    def hooked(self) -> bool:
        """Whether weights have an axis for the heads."""
        return self.weights.form == "heads"

    def rows(self, key: str, indices: ir.Value) -> ir.Value:
        """Rows of an embedding [v, d]: only these are widened."""
        return self._widen(key, self.net.op("Gather", self._value(key), indices, axis=0))

    def linear(self, x: ir.Value, weight: str, bias: str | None = None) -> ir.Value:
        """x [rows, in] W + b -> [rows, out]."""
        places = self.weights.places
        if weight == HEAD and HEAD not in places:
            weight = EMBEDDING  # [v, d] in every layout
            form: Form = "out_in"
        else:
            form = self.weights.form
        shape = places[weight].shape
        if self.hooked and len(shape) == 3:  # W_O [n, h, d]: the same bytes are [(n h), d]
            shape = (shape[0] * shape[1], shape[2])
        matrix, shift = self._float(weight, shape), None
        if bias is not None and bias in places:
            shift = self._float(bias, places[bias].shape)
        if form == "in_out":
            y = self.net.op("MatMul", x, matrix)
            return y if shift is None else self.net.op("Add", y, shift)
        inputs = [x, matrix] if shift is None else [x, matrix, shift]
        return self.net.op("Gemm", *inputs, transB=int(form == "out_in"))

    def per_head(self, x: ir.Value, weight: str, bias: str) -> ir.Value:
        """x [rows, d] by W [n, d, h], plus b [n, h] -> [n, rows, h]."""
        net, places = self.net, self.weights.places
        batched = net.op("Unsqueeze", x, net.ints(0))
        y = net.op("MatMul", batched, self._float(weight, places[weight].shape))
        if bias not in places:
            return y
        n, h = places[bias].shape
        return net.op("Add", y, self._float(bias, (n, 1, h)))

    def layer_norm(
        self, x: ir.Value, gain: str, shift: str, eps: float, width: int, *, apart: bool
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """LN(x) [rows, d], x normalised but before gain and shift, and 1/scale [rows, 1].

        `apart`: the second and third are wanted. Otherwise one node does it all, and they are
        not to be used. Folded (neither gain nor shift is stored): LN(x) is the normalised x.
        """
        net, places = self.net, self.weights.places
        stored = [key for key in (gain, shift) if key in places]
        if not apart:
            scale = self._float(gain, (width,)) if gain in places else net.floats(np.ones(width))
            bias = [self._float(shift, (width,))] if shift in places else []
            y = net.op("LayerNormalization", x, scale, *bias, axis=-1, epsilon=eps)
            return y, y, y
        normalised, _, inverse = net.ops(
            "LayerNormalization", 3, x, net.floats(np.ones(width)), axis=-1, epsilon=eps
        )
        y = normalised
        for key in stored:
            y = net.op("Mul" if key == gain else "Add", y, self._float(key, (width,)))
        return y, normalised, inverse

    def _float(self, key: str, shape: tuple[int, ...]) -> ir.Value:
        if key not in self._wide:
            self._wide[key] = self._widen(key, self._value(key, shape))
        return self._wide[key]

    def _widen(self, key: str, value: ir.Value) -> ir.Value:
        if self.weights.places[key].code == "F32":
            return value
        return self.net.op("Cast", value, to=ir.DataType.FLOAT)

    def _value(self, key: str, shape: tuple[int, ...] | None = None) -> ir.Value:
        if key not in self._stored:
            shape = shape or self.weights.places[key].shape
            tensor = self.weights.tensor(key, shape, self._directory)
            self._stored[key] = self.net.initializer(tensor)
        return self._stored[key]
