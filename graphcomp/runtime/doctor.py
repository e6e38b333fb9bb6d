"""What this machine is, and what really works on it.

`environment` is the record that goes with every number; `diagnose` is what `graphcomp doctor` prints.
Providers are not asked whether they exist (the runtime's answer to that says nothing) but made to run a
model, through the same function that opens sessions for timing.
"""

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.version import InvalidVersion, Version
from rich.table import Table
from rich.text import Text

from graphcomp import records
from graphcomp.errors import BenchError
from graphcomp.runtime.session import ADVICE, PROVIDERS, Provider, installed_runtimes, probe

__all__ = ["Finding", "auto_target", "diagnose", "environment", "render"]

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
RUNTIME_MINIMUM = (1, 24)
CROWDED = 1.1


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        ok: whether it is as it should be.
        detail: what was found.
        advice: what to do; empty if there is nothing to do.
        essential: whether graphcomp does not work without it. Accelerators, and a machine that has nothing
            else to do, are worth a word, not a failure.
    """

    name: str
    ok: bool
    detail: str
    advice: str = ""
    essential: bool = True


def environment() -> records.Environment:
    """The machine and the versions that numbers are recorded with."""
    versions = {name: version for name in ("graphcomp", *MINIMUM) if (version := _version(name))}
    versions |= installed_runtimes()
    if torch.cuda.is_available():
        versions |= {"gpu": torch.cuda.get_device_name(0), "cuda (torch)": str(torch.version.cuda)}
    return records.Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu_model(),
        isa=_isa(),
        cores=cores(),
        versions=versions,
    )


def diagnose() -> list[Finding]:
    """Look at versions, instruction set, runtime, every provider, the GPU and the load; takes about a
    second."""
    return [
        *(_package(name, floor) for name, floor in MINIMUM.items()),
        _runtime(installed_runtimes()),
        _instruction_set(_isa()),
        *(_provider(name) for name in PROVIDERS),
        _gpu(),
        _threads(),
        _load(_contention()),
    ]


def auto_target() -> str:
    """The target that `auto` means here: the CPU, by the width of its vectors.

    Without AVX-512 the runtime's kernels are assumed to work in blocks of 8, which is what cpu-avx2 stands
    for.
    """
    return "cpu-avx512" if _isa() == "avx512" else "cpu-avx2"


def render(findings: list[Finding]) -> Table:
    """The findings as a table, one a row."""
    table = Table(title="graphcomp doctor")
    for name in ("", "what", "found", "what to do"):
        table.add_column(name)
    for item in findings:
        mark = Text("ok", "green") if item.ok else Text("no", "red")
        table.add_row(mark, *(Text(cell) for cell in (item.name, item.detail, item.advice)))
    return table


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, floor: tuple[int, int]) -> Finding:
    found, wanted = _version(name), ".".join(map(str, floor))
    if found is None:
        return Finding(name, False, "not installed", f"pip install '{name}>={wanted}'")
    ok = _at_least(found, floor)
    return Finding(name, ok, found, "" if ok else f"pip install --upgrade '{name}>={wanted}'")


def _at_least(version: str, floor: tuple[int, int]) -> bool:
    """Whether it is a release of the floor or later, or was built on the way to one."""
    try:
        return Version(version).release >= floor
    except InvalidVersion:
        return False


def _runtime(found: dict[str, str]) -> Finding:
    listed = ", ".join(f"{name} {version}" for name, version in found.items()) or "not installed"
    if not found:
        return Finding(
            "onnxruntime", False, listed, "pip install onnxruntime-gpu, or onnxruntime without a GPU"
        )
    if len(found) > 1:
        advice = f"they overwrite each other: pip uninstall {' '.join(found)}, then install only one"
        return Finding("onnxruntime", False, listed, advice)
    (name, version), wanted = *found.items(), ".".join(map(str, RUNTIME_MINIMUM))
    ok = _at_least(version, RUNTIME_MINIMUM)
    return Finding("onnxruntime", ok, listed, "" if ok else f"pip install --upgrade '{name}>={wanted}'")


def _instruction_set(isa: Isa) -> Finding:
    known = isa in ("avx512", "avx2", "arm64-neon")
    advice = (
        "" if known else "timings here say little about other machines: use one with AVX2, AVX-512 or NEON"
    )
    return Finding("instruction set", known, f"{isa} ({_cpu_model()})", advice)


def _provider(name: Provider) -> Finding:
    try:
        opened = probe(name)
    except BenchError as error:
        advice = ADVICE[name] if name == "cpu" else f"only needed to time on {name}: {ADVICE[name]}"
        return Finding(f"provider {name}", False, str(error).partition("; ")[0], advice, name == "cpu")
    said = f"ran a convolution, loaded in {opened.load_seconds * 1e3:.0f} ms"
    return Finding(f"provider {name}", True, said, essential=name == "cpu")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        advice = (
            "only needed for training and timing on a GPU: check `nvidia-smi` and the CUDA build of torch"
        )
        return Finding("GPU (torch)", False, "torch sees no CUDA device", advice, essential=False)
    said = f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    return Finding("GPU (torch)", True, said, essential=False)


def _threads() -> Finding:
    limit = os.environ.get("OMP_NUM_THREADS", "not set")
    said = f"{cores()} cores, torch uses {torch.get_num_threads()}, OMP_NUM_THREADS {limit}"
    return Finding("threads", True, said, essential=False)


def _load(contention: float) -> Finding:
    average = psutil.getloadavg()[0]
    ok = contention <= CROWDED
    detail = f"wall/CPU of one thread {contention:.2f}, load average {average:.1f} on {cores()} cores"
    advice = "" if ok else "something else has the cores: stop it, or quote CPU time instead of wall time"
    return Finding("load", ok, detail, advice, essential=False)


def _contention(seconds: float = 0.2) -> float:
    """Wall time over CPU time of a loop that never waits: 1 on an idle machine."""
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall < seconds:
        pass
    # A coarse CPU clock may not have moved at all on a machine that starved the loop.
    return (time.perf_counter() - wall) / max(time.thread_time() - cpu, 1e-3)


def cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _isa() -> Isa:
    return _classify(platform.machine(), _cpu_flags())


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


def _cpu_model() -> str:
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
