"""What really works on this machine.

`diagnose` is what `graphcomp doctor` prints.
Providers are not asked whether they exist (the runtime's answer to that says nothing) but made to run a
model, through the same function that opens sessions for timing.
"""

import os
import time
from dataclasses import dataclass

import psutil
import torch
from packaging.version import InvalidVersion, Version
from rich.table import Table
from rich.text import Text

from graphcomp.errors import BenchError
from graphcomp.runtime.machine import MINIMUM, Isa, cores, cpu_model, instruction_set, version_of
from graphcomp.runtime.providers import ADVICE, PROVIDERS, Provider, installed_runtimes
from graphcomp.runtime.session import probe

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


def diagnose() -> list[Finding]:
    """Look at versions, instruction set, runtime, every provider, the GPU and the load; takes about a
    second."""
    return [
        *(_package(name, floor) for name, floor in MINIMUM.items()),
        _runtime(installed_runtimes()),
        _instruction_set(instruction_set()),
        *(_provider(name) for name in PROVIDERS),
        _gpu(),
        _threads(),
        _load(_contention()),
    ]


def render(findings: list[Finding]) -> Table:
    """The findings as a table, one a row."""
    table = Table(title="graphcomp doctor")
    for name in ("", "what", "found", "what to do"):
        table.add_column(name)
    for item in findings:
        mark = Text("ok", "green") if item.ok else Text("no", "red")
        table.add_row(mark, *(Text(cell) for cell in (item.name, item.detail, item.advice)))
    return table


def _package(name: str, floor: tuple[int, int]) -> Finding:
    found, wanted = version_of(name), ".".join(map(str, floor))
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
    return Finding("instruction set", known, f"{isa} ({cpu_model()})", advice)


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
