"""ONNX: graphs built from a checkpoint's config and headers, and a wary reader of ONNX files."""

from converter.onnx.export import ExportResult, export
from converter.onnx.hooks import hook_names
from converter.onnx.reading import OnnxFile, read_onnx
from converter.onnx.session import Session, past_of

__all__ = [
    "ExportResult",
    "OnnxFile",
    "Session",
    "export",
    "hook_names",
    "past_of",
    "read_onnx",
]
