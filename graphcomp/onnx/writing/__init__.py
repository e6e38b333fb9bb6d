"""A program becomes an ONNX model, operator by operator."""

from graphcomp.onnx.writing.settings import OpenAxes
from graphcomp.onnx.writing.write import OPSET, Written, write

__all__ = ["OPSET", "OpenAxes", "Written", "write"]
