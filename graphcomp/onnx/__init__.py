"""A program becomes an ONNX file, and a file a program."""

from graphcomp.onnx.agreement import disagreement, tolerance_for
from graphcomp.onnx.export import Exports, Stored, export_onnx
from graphcomp.onnx.interface import HISTORY_PROP, input_names, read_history
from graphcomp.onnx.origins import MODULE_PROP, NODE_PROP, PASS_PROP
from graphcomp.onnx.reading import read_onnx
from graphcomp.onnx.selection import SELECT
from graphcomp.onnx.sizes import DYNAMIC, Dynamic

__all__ = [
    "DYNAMIC",
    "Dynamic",
    "Exports",
    "HISTORY_PROP",
    "MODULE_PROP",
    "NODE_PROP",
    "PASS_PROP",
    "SELECT",
    "Stored",
    "disagreement",
    "export_onnx",
    "input_names",
    "read_history",
    "read_onnx",
    "tolerance_for",
]
