"""A float file becomes an 8 bit file with our ranges and scales and a check of every layer."""

from graphcomp.onnx.quantization.grids import Grid
from graphcomp.onnx.quantization.quantize import quantize_onnx

__all__ = ["Grid", "quantize_onnx"]
