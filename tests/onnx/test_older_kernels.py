"""8 bits on the kernels of an x86 without VNNI, wherever CPUID can be made to say so."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphcomp.errors import ExportError
from graphcomp.onnx import quantize_onnx
from tests.onnx.test_quantization import exported, split_of
from tests.onnx.test_quantization_truth import signs

ROOT = Path(__file__).parents[2]
CPUINFO = Path("/proc/cpuinfo")
FAULTS = CPUINFO.exists() and "cpuid_fault" in CPUINFO.read_text().split()


def report(folder: Path) -> dict[str, int]:
    """Steps of the worst layer by grid; of plain 8 bits written by hand, since those are refused."""
    path = exported(folder, signs())
    found = {}
    for grid in ("pairs", "reduced"):
        made = quantize_onnx(path, folder / "out.onnx", split_of(64), grid=grid, faster_only=False)
        found[grid] = max(layer.steps or 0 for layer in made.layers)
    try:
        quantize_onnx(path, folder / "out.onnx", split_of(64), grid="plain", faster_only=False)
    except ExportError as error:
        found["plain"] = int(str(error).partition(" steps of its output")[0].split()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not FAULTS or not shutil.which("cc"), reason="CPUID cannot be answered for, or no cc")
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_pairs_are_right_where_plain_weights_saturate(tmp_path: Path, level: str) -> None:
    told = [sys.executable, str(ROOT / "benchmarks/as_cpu.py"), level, "-m", __name__, str(tmp_path)]
    done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plain"] > 20 and found["pairs"] <= 1 and found["reduced"] <= 1


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]))))
