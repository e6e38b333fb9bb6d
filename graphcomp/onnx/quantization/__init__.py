"""A float file becomes an 8 bit file with our ranges and scales and a check of every layer."""

from graphcomp.onnx.quantization.grids import Grid
from graphcomp.onnx.quantization.quantize import (
    SAMPLES,
    Timing,
    quantize_file,
    quantize_onnx,
    requantize,
)
from graphcomp.onnx.quantization.samples import LEAST

__all__ = ["Grid", "LEAST", "SAMPLES", "Timing", "quantize_file", "quantize_onnx", "requantize"]
