"""A program becomes an ONNX file, and a file a program."""

from graphcomp.onnx.export import Exports, Stored, export_onnx
from graphcomp.onnx.interface import input_names
from graphcomp.onnx.origins import MODULE_PROP, NODE_PROP, PASS_PROP
from graphcomp.onnx.quantization import quantize_onnx
from graphcomp.onnx.reading import read_onnx
from graphcomp.onnx.selection import SELECT
from graphcomp.onnx.sizes import Dynamic

__all__ = [
    "Dynamic",
    "Exports",
    "MODULE_PROP",
    "NODE_PROP",
    "PASS_PROP",
    "SELECT",
    "Stored",
    "export_onnx",
    "input_names",
    "quantize_onnx",
    "read_onnx",
]
