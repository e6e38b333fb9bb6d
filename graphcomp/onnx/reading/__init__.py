"""An ONNX file becomes a program."""

from graphcomp.onnx.reading.reader import read_onnx

__all__ = ["read_onnx"]
