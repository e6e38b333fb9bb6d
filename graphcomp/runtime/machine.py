"""What this machine is: the record that goes with every number, and the target that `auto` means."""

import functools
import importlib.metadata
import os
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import psutil
import torch

from graphcomp import records
from graphcomp.runtime.providers import installed_runtimes

Isa = Literal["avx512", "avx2", "other x86", "arm64-neon", "other"]
# The floors that pyproject.toml asks for, as (major, minor).
MINIMUM = {
    "torch": (2, 9),
    "torchvision": (0, 24),
    "numpy": (1, 26),
    "onnx": (1, 18),
    "onnxscript": (0, 5),
    "onnx-ir": (0, 1),
    "onnx-graphsurgeon": (0, 5),
    "safetensors": (0, 5),
}


def environment() -> records.Environment:
    """The machine and the versions that numbers are recorded with."""
    versions = {name: version for name in ("graphcomp", *MINIMUM) if (version := version_of(name))}
    versions |= installed_runtimes()
    if (openvino := version_of("openvino")) is not None:
        versions["openvino"] = openvino
    if torch.cuda.is_available():
        versions |= {"gpu": torch.cuda.get_device_name(0), "cuda (torch)": str(torch.version.cuda)}
    return records.Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=cpu_model(),
        isa=instruction_set(),
        cores=cores(),
        versions=versions,
    )


def auto_target(*, eight_bits: bool = False) -> str:
    """The target that `auto` means here: the CPU, by the width of its vectors; of `eight_bits` by VNNI.

    Without AVX-512 the runtime's kernels are assumed to work in blocks of 8, which is what cpu-avx2 stands
    for.
    """
    if eight_bits:
        return "cpu-avx2-int8" if adds_in_int16() else "cpu-vnni-int8"
    return "cpu-avx512" if instruction_set() == "avx512" else "cpu-avx2"


def version_of(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory() -> int:
    """Bytes of this machine."""
    return int(psutil.virtual_memory().total)


def cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def instruction_set() -> Isa:
    """The widest vectors that the processor has."""
    return _classify(platform.machine(), _cpu_flags())


def adds_in_int16() -> bool:
    """Whether the runtime's 8 bit kernels add pairs of products in int16, which saturates: on x86 without
    VNNI.

    Where the flags are not known, as on anything but Linux, VNNI is not counted on.
    """
    return _saturates(instruction_set(), _cpu_flags())


def _saturates(isa: Isa, flags: Collection[str]) -> bool:
    return isa in ("avx512", "avx2", "other x86") and not {"avx512_vnni", "avx_vnni"} & set(flags)


def _classify(machine: str, flags: Collection[str]) -> Isa:
    if machine.lower() in ("arm64", "aarch64"):
        return "arm64-neon"
    if machine.lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return "other"
    if "avx512f" in flags:
        return "avx512"
    return "avx2" if "avx2" in flags else "other x86"


def _cpu_flags() -> frozenset[str]:
    """Flags as Linux names them; elsewhere torch is asked, which tells only the two that matter."""
    if flags := _cpuinfo().get("flags"):
        return frozenset(flags.split())
    capability = torch.backends.cpu.get_cpu_capability()
    return frozenset({"AVX512": ("avx512f", "avx2"), "AVX2": ("avx2",)}.get(capability, ()))


def cpu_model() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
