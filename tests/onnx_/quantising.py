"""What onnxruntime's own tools make of a graph, beside it."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx


def int8(path: Path, name: str = "model_quantized.onnx") -> Path:
    """transformers.js's dtype q8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)
    quantize_dynamic(str(path), str(path.with_name(name)), weight_type=QuantType.QInt8)
    logging.disable(logging.NOTSET)
    return path.with_name(name)


def q4(path: Path, name: str = "model_q4.onnx", block_size: int = 32) -> Path:
    """transformers.js's dtype q4."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(onnx.load_model(str(path)), block_size=block_size)
    quantiser.process()
    quantiser.model.save_model_to_file(str(path.with_name(name)), False)
    return path.with_name(name)
