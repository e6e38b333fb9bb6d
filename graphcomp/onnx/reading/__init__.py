"""An ONNX file becomes a program."""

from graphcomp.onnx.reading.reader import origins_in, read_onnx

__all__ = ["origins_in", "read_onnx"]
