"""A program becomes an ONNX file, and a file a program."""

from graphcomp.onnx.export import Exports, Stored, export_onnx
from graphcomp.onnx.origins import MODULE_PROP, NODE_PROP, PASS_PROP
from graphcomp.onnx.reading import read_onnx
from graphcomp.onnx.selection import SELECT

__all__ = ["Exports", "MODULE_PROP", "NODE_PROP", "PASS_PROP", "SELECT", "Stored", "export_onnx", "read_onnx"]
