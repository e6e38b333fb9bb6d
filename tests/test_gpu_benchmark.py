"""The benchmark that waits for a GPU: what of it works without one."""

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks/gpu"


def module(name: str) -> ModuleType:
    spec = spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look themselves up there
    spec.loader.exec_module(found)
    return found


measure, render = module("measure"), module("render")


def test_the_shares_are_the_whole_and_every_part_is_there() -> None:
    assert measure.PARTS.keys() == measure.RUN.keys() and sum(measure.PARTS.values()) == pytest.approx(1)


def test_one_command_with_less_than_eight_minutes() -> None:
    script = GPU / "run.sh"
    assert os.access(script, os.X_OK) and "pip install" not in script.read_text()
    assert "default=460.0" in (GPU / "measure.py").read_text()


@pytest.mark.slow
def test_a_part_fails_alone(tmp_path: Path) -> None:
    """By an exit code, by taking too long; what it had written by then is kept."""
    file = tmp_path / "part.json"
    rows = {"rows": [{"a": 1}], "error": None}
    says = f"import json, pathlib; pathlib.Path({str(file)!r}).write_text(json.dumps({rows!r}))"
    for ending, error in (
        ("raise SystemExit(3)", "its process ended with exit code 3"),
        ("import time; time.sleep(60)", "it took more than 3 s"),
        ("", None),
    ):
        found = measure.run_apart([sys.executable, "-c", f"{says}\n{ending}"], file, 3.0)
        assert (found["rows"], found["error"]) == ([{"a": 1}], error)
    found = measure.run_apart([sys.executable, "-c", "raise SystemExit(1)"], file, 3.0)
    assert found["rows"] == [] and found["error"] == "its process ended with exit code 1"


def test_the_tests_are_those_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that have some; an earlier report is none of this run's."""
    found = {path.name for path in measure.gpu_tests()}
    assert {"test_session.py", "test_bench.py"} <= found and "test_gpu_benchmark.py" not in found
    (tmp_path / "gpu-tests.xml").write_text("<testsuites/>")
    ended = subprocess.CompletedProcess([], 1, "", "No module named pytest")
    monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: ended)
    found = measure.run_part("tests", measure.Asked(tmp_path, 1.0))
    assert found["rows"] == [] and "pytest ended with 1: No module named pytest" in found["error"]


def test_the_ends_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of batches, where all are quick; else what takes least."""
    monkeypatch.setattr("graphcomp.measure.macs", lambda cost: cost)
    asked, programs = measure.Asked(tmp_path, 1.0), {"large": (100, 50), "small": (3, 2)}
    jobs = measure.jobs(asked, programs)
    assert jobs[:4] == [("small", 1), ("large", 1), ("small", 512), ("large", 512)]
    assert len(jobs) == len(set(jobs)) == 2 * 5
    cheap = measure.jobs(asked, programs, cheap=True)
    assert set(cheap) == set(jobs) and cheap[:4] == [("small", n) for n in (1, 8)] + [
        ("small", 32),
        ("large", 1),
    ]


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the machine too, and the other parts are asked all the same."""
    monkeypatch.setitem(sys.modules, "graphcomp.runtime.machine", None)
    found = measure.machine()
    assert "use run.sh" in found["error"] and found["commit"]
    said = render.section({"machine": found, "dry": False, "seconds": 1.0})
    assert "- machine: " in said and "use run.sh" in said


def test_an_error_in_a_part_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(asked: Any, tell: Any) -> None:
        tell({"row": 1})
        raise ValueError("no such thing")

    monkeypatch.setitem(measure.RUN, "torch", part)
    found = measure.run_part("torch", measure.Asked(tmp_path, 1.0))
    assert found == {"rows": [{"row": 1}], "error": "ValueError: no such thing"}
    assert json.loads((tmp_path / "torch.json").read_text()) == found


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every part on the CPU, in this process; then the section that is made of it."""
    asked = measure.Asked(tmp_path, 60.0, dry=True)
    results: dict[str, Any] = {n: measure.run_part(n, asked) for n in ("torch", "cuda", "cpu", "finetune")}
    assert {name: part["error"] for name, part in results.items()} == dict.fromkeys(results)
    by_torch = results["torch"]["rows"]
    assert len(by_torch) == 1 * 3 * 2 * 2
    assert all(("CUDA graphs: found no GPU" in row.get("error", "")) == row["graphs"] for row in by_torch)
    assert [r["error"] for p in ("cuda", "cpu") for r in results[p]["rows"] if "error" in r] == []
    assert len(results["cuda"]["rows"]) == 1 * 3 * 2 * 2 and len(results["cpu"]["rows"]) == 2
    (row,) = results["finetune"]["rows"]
    assert row["epochs"] == 1 and 0 <= row["after"] <= 1 and row["left"] == pytest.approx(0.5, abs=0.1)
    document = tmp_path / "results.md"
    document.write_text("# Results\n\n## Other\n\nkept\n")
    whole = {**results, "machine": measure.machine(), "dry": True, "seconds": 12.0}
    for _ in range(2):  # written anew, not again
        render.replace_section(document, render.BEGIN, render.END, render.section(whole))
    text = document.read_text()
    assert text.count(render.BEGIN) == 1 and "kept" in text and "**A dry run on the CPU" in text
    assert "| quick | " in text and "GPU, ONNX Runtime, CUDA graphs" in text
    assert "- torch, 6 of 12 rows: RuntimeError: CUDA graphs: found no GPU, expected one" in text


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """From another folder; one part that there is no GPU for."""
    command = [
        "bash",
        str(GPU / "run.sh"),
        "--out",
        str(tmp_path / "o"),
        "--parts",
        "finetune",
        "--seconds",
        "60",
    ]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert ran.returncode == 1, ran.stderr  # not every part had something to say
    found = json.loads((tmp_path / "o/results.json").read_text())
    assert "found no --data or --weights" in found["finetune"]["error"] and not found["complete"]
    assert found["machine"]["python"] and found["machine"]["commit"]
    ran = subprocess.run(
        [sys.executable, GPU / "render.py", tmp_path / "o/results.json", "--document", tmp_path / "r.md"]
    )
    assert (
        ran.returncode == 0 and "finetune: RuntimeError: found no --data" in (tmp_path / "r.md").read_text()
    )
