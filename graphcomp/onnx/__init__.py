"""A program becomes an ONNX file, and a file a program."""

from graphcomp.onnx.export import Exports, Stored, Weights, export_onnx
from graphcomp.onnx.interface import input_names
from graphcomp.onnx.origins import MODULE_PROP, NODE_PROP, PASS_PROP, Origin
from graphcomp.onnx.quantization import (
    LEAST,
    SAMPLES,
    Grid,
    Timing,
    quantize_file,
    quantize_onnx,
    requantize,
)
from graphcomp.onnx.reading import origins_in, read_onnx
from graphcomp.onnx.selection import SELECT
from graphcomp.onnx.sizes import Dynamic
from graphcomp.onnx.storage import data_names

__all__ = [
    "Dynamic",
    "Exports",
    "Grid",
    "LEAST",
    "MODULE_PROP",
    "NODE_PROP",
    "Origin",
    "PASS_PROP",
    "SAMPLES",
    "SELECT",
    "Stored",
    "Timing",
    "Weights",
    "data_names",
    "export_onnx",
    "input_names",
    "origins_in",
    "quantize_file",
    "quantize_onnx",
    "read_onnx",
    "requantize",
]
