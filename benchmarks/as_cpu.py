"""Run a Python program as on a processor with less: the kernels that runtimes have for x86 without VNNI.

    python benchmarks/as_cpu.py avx2 benchmarks/int8.py …       # without AVX-512 and VNNI
    python benchmarks/as_cpu.py avx512 benchmarks/int8.py …     # with AVX-512, without VNNI

ONNX Runtime, OpenVINO and torch choose kernels by CPUID, and ONNX Runtime has no switch for it. On Linux,
where the processor can have CPUID fault (most of Intel's since 2012, AMD's since Zen 3), it answers without
those instructions. The kernels are the older processor's, clock rates and caches are this one's. What
/proc/cpuinfo says stays as it is, so graphcomp does not know: give `--grid` or `--target`.
"""

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
LEVELS = ("avx2", "avx512")


def environment(level: str) -> dict[str, str]:
    """What a process needs to run as that processor; its library is built under `out/`.

    SystemExit without a C compiler.
    """
    library = SOURCE.parent.parent / "out" / "as_cpu.so"
    library.parent.mkdir(exist_ok=True)
    fresh = library.with_suffix(f".{os.getpid()}.so")
    told = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", str(fresh), str(SOURCE)]
    try:
        subprocess.run(told, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{SOURCE.name}: not built ({error}); install a C compiler, or set CC") from None
    fresh.replace(library)
    return dict(os.environ) | {"LD_PRELOAD": str(library), "AS_CPU": level}


def main() -> None:
    """Become the program."""
    if len(sys.argv) < 3 or sys.argv[1] not in LEVELS:
        raise SystemExit(f"expected {' or '.join(LEVELS)}, then a Python program and its arguments")
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment(sys.argv[1]))


if __name__ == "__main__":
    main()
