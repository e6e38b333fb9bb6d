"""Targets: what a removal is for, and the multiple that its kernels round channel counts up to anyway."""

from dataclasses import dataclass

from graphcomp.errors import RecipeError
from graphcomp.runtime.machine import auto_target
from graphcomp.runtime.providers import Provider


@dataclass(frozen=True)
class Target:
    """Where the compiled network will run.

    Attributes:
        name: as in recipes and on the command line.
        provider: ONNX Runtime execution provider that benchmarks use.
        multiple: channel counts are rounded up to it, since the kernels compute that many anyway.
        note: where the multiple comes from.
    """

    name: str
    provider: Provider
    multiple: int
    note: str


TARGETS = {
    t.name: t
    for t in (
        Target("cpu-avx512", "cpu", 16, "MLAS blocks of 16 channels with AVX-512 (measured)"),
        Target("cpu-avx2", "cpu", 8, "MLAS blocks of 8 channels on other x86 (measured)"),
        Target("cuda-fp16", "cuda", 8, "tensor cores at FP16 (NVIDIA's guide; not yet run on a GPU)"),
        Target("cuda-tf32", "cuda", 4, "tensor cores at TF32 (NVIDIA's guide; not yet run on a GPU)"),
        Target(
            "tensorrt-int8", "tensorrt", 16, "tensor cores at INT8 (NVIDIA's guide; not yet run on a GPU)"
        ),
    )
}


def find_target(name: str) -> Target:
    """The target called `name`; `auto` is this machine's CPU. RecipeError if there is none."""
    if name == "auto":
        name = auto_target()
    if name not in TARGETS:
        raise RecipeError(f"target: found {name!r}, expected one of auto, {', '.join(TARGETS)}")
    return TARGETS[name]
