"""Targets: what a removal is for, and the multiple that its kernels round channel counts up to anyway."""

from dataclasses import dataclass

from graphcomp.errors import RecipeError
from graphcomp.runtime.machine import auto_target
from graphcomp.runtime.precision import Precision
from graphcomp.runtime.providers import HOST, Provider


@dataclass(frozen=True)
class Target:
    """Where the compiled network will run.

    Attributes:
        name: as in recipes and on the command line.
        provider: ONNX Runtime execution provider, or other runtime, that benchmarks and choices by time use.
        multiple: channel counts are rounded up to it, since the kernels compute that many anyway.
        note: where the multiple comes from.
        saturates: of targets for 8 bit files: whether its kernels add pairs of products in int16.
        precision: that its benchmarks compute in, if not told otherwise.
    """

    name: str
    provider: Provider
    multiple: int
    note: str
    saturates: bool | None = None
    precision: Precision = "fp32"


TARGETS = {
    t.name: t
    for t in (
        Target("cpu-avx512", "cpu", 16, "MLAS blocks of 16 channels with AVX-512 (measured)"),
        Target("cpu-avx2", "cpu", 8, "MLAS blocks of 8 channels on other x86 (measured)"),
        Target(
            "cpu-avx2-int8",
            "cpu",
            16,
            "steps of 16 channels in 8 bits, pairs added in int16: x86 without VNNI (measured)",
            saturates=True,
        ),
        Target(
            "cpu-vnni-int8",
            "cpu",
            8,
            "steps of 8 channels in 8 bits, added in int32: x86 with VNNI (measured), and ARM",
            saturates=False,
        ),
        Target("openvino", "openvino", 8, "OpenVINO: steps of 8 and 16 channels with AVX-512 (measured)"),
        Target(
            "openvino-avx2-int8",
            "openvino",
            16,
            "OpenVINO in 8 bits, pairs added in int16: x86 without VNNI (taken from VNNI, not yet measured)",
            saturates=True,
        ),
        Target(
            "openvino-vnni-int8",
            "openvino",
            16,
            "OpenVINO in 8 bits, added in int32: steps of 16 channels with VNNI (measured)",
            saturates=False,
        ),
        Target(
            "cuda-fp16",
            "cuda",
            8,
            "tensor cores at FP16 (NVIDIA's guide; not yet run on a GPU)",
            precision="fp16",
        ),
        Target("cuda-tf32", "cuda", 4, "tensor cores at TF32 (NVIDIA's guide; not yet run on a GPU)"),
        Target(
            "tensorrt-int8",
            "tensorrt",
            16,
            "tensor cores at INT8 (NVIDIA's guide; not yet run on a GPU)",
            saturates=False,
        ),
    )
}


def find_target(name: str, *, eight_bits: bool = False) -> Target:
    """The target called `name`; `auto` is this machine's CPU.

    Args:
        name: see above.
        eight_bits: what is made is an 8 bit file. The name of a runtime on CPUs for float files then
            stands for the target that is safe on every x86, since it does not say whether there is VNNI.

    Raises RecipeError if there is none, or none for 8 bit files.
    """
    if name == "auto":
        name = auto_target(eight_bits=eight_bits)
    if name not in TARGETS:
        raise RecipeError(f"target: found {name!r}, expected one of auto, {', '.join(TARGETS)}")
    target = TARGETS[name]
    if not eight_bits or target.saturates is not None:
        return target
    if target.provider not in HOST:
        known = ", ".join(t.name for t in TARGETS.values() if t.saturates is not None)
        raise RecipeError(
            f"target: found {name!r} with quantize, which has no 8 bits for it, expected auto, {known}; "
            "choose one of these, or leave quantize out"
        )
    return TARGETS[f"{target.provider}-avx2-int8"]
