"""A program becomes an ONNX model, operator by operator."""

from graphcomp.onnx.writing.write import OPSET, Written, write

__all__ = ["OPSET", "Written", "write"]
