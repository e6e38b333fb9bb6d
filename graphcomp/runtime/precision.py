"""In what arithmetic a GPU computes a float32 file: as it is, or in 16 bits.

TensorRT is told and decides layer by layer; CUDA computes in the types of the file, whose float32 numbers
become float16 on the way, inputs and outputs staying what they are. What comes out is compared with float32
on the CPU before any time is quoted, as closely as the type allows. **Not yet run on a GPU.**
"""

from pathlib import Path
from typing import Literal

import onnx

from graphcomp.base import muted
from graphcomp.errors import BenchError
from graphcomp.runtime.providers import Provider, import_runtime

Precision = Literal["fp32", "fp16", "bf16"]
OPTIONS: dict[tuple[Provider, Precision], dict[str, str]] = {
    ("cuda", "fp16"): {},
    ("tensorrt", "fp16"): {"trt_fp16_enable": "1"},
    ("tensorrt", "bf16"): {"trt_bf16_enable": "1"},
}
"""What switches it on."""
MOST_APART: dict[Precision, float] = {"fp16": 2e-2, "bf16": 1e-1}
"""Of an output's norm: of 11 and of 8 bits, which a network's layers add up."""


def precision_options(provider: Provider, precision: Precision) -> dict[str, str]:
    """What switches it on; nothing for fp32. BenchError where the provider does not have it."""
    if precision == "fp32":
        return {}
    if (provider, precision) not in OPTIONS:
        known = ", ".join(f"{p} in {kind}" for p, kind in OPTIONS)
        raise BenchError(
            f"precision: found {precision!r} with provider {provider!r}, expected fp32, or {known}; leave it "
            "out"
        )
    return OPTIONS[provider, precision]


def in_precision(model: Path | bytes, provider: Provider, precision: Precision) -> Path | bytes:
    """What a session is opened with: of CUDA in fp16 the model in float16, else the model itself."""
    if (provider, precision) != ("cuda", "fp16"):
        return model
    import_runtime()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    loaded = onnx.load(model) if isinstance(model, Path) else onnx.load_model_from_string(model)
    with muted():
        made: onnx.ModelProto = convert_float_to_float16(loaded, keep_io_types=True)
    content: bytes = made.SerializeToString()
    return content
