"""Several runtimes in one run: timed side by side, each against itself, and never one by the other."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from graphcomp.compiler import Job, build, compiler, make_passes, results
from graphcomp.compiler.recipe import BenchOptions, Recipe
from graphcomp.compiler.results import runtimes
from graphcomp.errors import BenchError
from graphcomp.onnx.quantization import quantize as quantizing
from graphcomp.passes import PASSES
from graphcomp.records import Bench, Interval, Report
from graphcomp.report import read_report, summary_table
from graphcomp.report.quantized import describe_quantized, runtime_rows
from graphcomp.runtime import TARGETS, Target, benchmark
from tests.runtime.test_openvino import StandIn
from tests.tiny import SHAPE, SPEC, images_in

BENCH = {"runs": 6, "seconds": 0.1, "batches": [1, 2]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return images_in(tmp_path_factory.mktemp("data"), 120)


def job(data: str, provider: Any, passes: str = "l1{ratio=0.5, multiple=1}, quantize") -> Job:
    bench = {**BENCH, "provider": provider}
    recipe = Recipe.model_validate({"passes": [passes], "data": data, "target": "cpu-avx2", "bench": bench})
    return Job(SPEC, recipe, make_passes(recipe, PASSES), None, SHAPE)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """In the place of OpenVINO; no layer is tried in float, which takes time."""
    made = StandIn()
    monkeypatch.setattr(quantizing, "give_back", lambda work, found, race: found)
    monkeypatch.setitem(sys.modules, "openvino", made)
    return made


def test_one_runtime_or_several() -> None:
    assert BenchOptions(provider="cpu, openvino").provider == ("cpu", "openvino")  # type: ignore[arg-type]
    assert BenchOptions(provider=["openvino"]).provider == ("openvino",)  # type: ignore[arg-type]
    for bad in ("cpu,cpu", "cpu,tpu", "", []):
        with pytest.raises(ValidationError):
            BenchOptions(provider=bad)  # type: ignore[arg-type]


def test_precision_is_the_targets_unless_it_is_asked_for() -> None:
    """Of GPUs: beside one a processor stays in float32, alone it is refused before any work."""
    half, exact = TARGETS["cuda-fp16"], TARGETS["tensorrt-int8"]

    def kinds(target: Target, **options: Any) -> dict[str, str]:
        return {one.provider: one.precision for one in runtimes(BenchOptions(**options), target)}

    assert kinds(half) == {"cuda": "fp16"} and kinds(exact) == {"tensorrt": "fp32"}
    assert kinds(half, precision="fp32") == {"cuda": "fp32"}
    assert kinds(half, provider="cpu,tensorrt") == {"cpu": "fp32", "tensorrt": "fp32"}
    assert kinds(exact, provider="cpu,tensorrt", precision="bf16") == {"cpu": "fp32", "tensorrt": "bf16"}
    assert kinds(exact, provider="cpu", precision="fp16") == {"cpu": "fp16"}


@pytest.mark.parametrize("provider", ["cpu", "cpu,openvino"])
def test_precision_without_a_gpu_is_refused_before_any_work(
    stand_in: StandIn, provider: str, data: str, tmp_path: Path
) -> None:
    asked = job(data, provider, "l1{ratio=0.5}")
    bench = BenchOptions(**BENCH, provider=provider, precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(BenchError, match="precision: found 'fp16' with provider 'cpu', expected fp32, or"):
        build(replace(asked, recipe=asked.recipe.model_copy(update={"bench": bench})), tmp_path / "out")
    assert not (tmp_path / "out" / "state.json").exists()


@pytest.mark.slow
def test_16_bits_are_told_everywhere(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: what is told is seen, and what is said of it."""
    told: list[str] = []

    def timed(*files: Path, provider: Any, precision: str, **options: Any) -> Bench:
        told.append(precision)
        found = benchmark(*files, provider="cpu", **options)
        return found.model_copy(update={"provider": provider, "precision": precision})

    monkeypatch.setattr(compiler, "probe", lambda provider, **options: told.append(options["precision"]))
    monkeypatch.setattr(results, "benchmark", timed)
    asked = job(data, "cuda", "l1{ratio=0.5}")
    bench = asked.recipe.bench.model_copy(update={"precision": "fp16"})  # type: ignore[union-attr]
    recipe = asked.recipe.model_copy(update={"bench": bench})
    report = build(replace(asked, recipe=recipe), out := tmp_path / "out")
    assert told == ["fp16", "fp16"] and [b.runtime for b in report.benches] == ["cuda in fp16"]
    assert "cuda in fp16, 1 thread" in (out / "report.html").read_text()


@pytest.mark.slow
def test_both_files_are_timed_in_every_runtime(stand_in: StandIn, data: str, tmp_path: Path) -> None:
    report = build(job(data, "cpu,openvino"), out := tmp_path / "out")
    made = report.quantized
    assert made is not None and not made.not_timed
    for benches, names in ((report.benches, ("baseline.onnx", "model.onnx")), (made.benches, None)):
        assert [b.provider for b in benches] == ["cpu", "openvino"]
        for bench in benches:
            assert [t.batch for t in bench.batches] == [1, 2]
            assert (bench.base.path, bench.new.path) == (names or ("model.onnx", "model-int8.onnx"))
            used = {"cpu": "CPUExecutionProvider", "openvino": "OpenVINO"}[bench.provider]
            assert set(bench.base.nodes_per_provider) == set(bench.new.nodes_per_provider) == {used}
    assert report.explanation is not None and report.explanation.provider == "cpu"
    assert read_report(out / "report.json") == report
    labels = [row.label for row in runtime_rows(report)]
    assert labels == [
        "batch 1",
        "batch 1, 8 bits against model.onnx",
        "batch 2",
        "batch 2, 8 bits against model.onnx",
    ]
    assert all(
        len(row.speeds) == 2 and "x [" in speed for row in runtime_rows(report) for speed in row.speeds
    )
    page = (out / "report.html").read_text()
    assert "Speedup by runtime" in page and "Milliseconds for a whole batch, openvino" in page
    shown = [str(cell).strip() for cell in summary_table(report).columns[0]._cells]
    assert any(cell.endswith("batch 2, openvino") for cell in shown)
    assert Recipe.model_validate(report.recipe).bench.provider == ("cpu", "openvino")  # type: ignore[union-attr]


@pytest.mark.slow
def test_8_bits_race_float32_where_the_result_runs(stand_in: StandIn, data: str, tmp_path: Path) -> None:
    report = build(job(data, "openvino", "quantize"), tmp_path / "out")
    made = report.quantized
    assert made is not None and [b.provider for b in made.benches] == ["openvino"]
    assert made.bench is not None and set(made.bench.base.nodes_per_provider) == {"OpenVINO"}
    assert made.why.startswith("in openvino at batch 1 8 bit is ") and report.explanation is None
    assert not runtime_rows(report) and "batch 1, openvino" in describe_quantized(report)[0]


@pytest.mark.slow
def test_a_file_that_a_runtime_computes_otherwise_is_not_shipped(
    stand_in: StandIn, data: str, tmp_path: Path
) -> None:
    stand_in.wrong_of_bytes = 9.0
    report = build(job(data, ["cpu", "openvino"], "quantize"), out := tmp_path / "out")
    made = report.quantized
    assert made is not None and made.shipped == "float32" and not (out / "model-int8.onnx").exists()
    assert [b.provider for b in made.benches] == ["cpu"] and len(report.benches) == 2
    assert "found output 0 of OpenVINO" in made.not_timed["openvino"]
    assert "openvino: not timed, " in describe_quantized(report)[0]
    assert runtime_rows(report)[1].speeds[1] == "not timed"


def faster(bench: Bench, provider: str, *speeds: float) -> Bench:
    """As if it had been measured there."""
    rows = [
        t.model_copy(update={"speedup": Interval(value=v, low=v, high=v), "busy": False, "verdict": "faster"})
        for t, v in zip(bench.batches, speeds, strict=True)
    ]
    return bench.model_copy(update={"provider": provider, "batches": rows})


@pytest.mark.slow
def test_speeds_of_two_runtimes_are_not_multiplied(stand_in: StandIn, data: str, tmp_path: Path) -> None:
    report = build(job(data, "cpu", "quantize"), tmp_path / "out")
    made, bench = report.quantized, report.bench
    assert made is not None and bench is not None and made.bench is not None

    def said(there: list[Bench], here: list[Bench], **changes: Any) -> list[str]:
        eight = {"bench": here[0], "other_benches": here[1:], "path": "model-int8.onnx", **changes}
        whole = {"bench": there[0], "other_benches": there[1:], "quantized": made.model_copy(update=eight)}
        lines = describe_quantized(Report.model_copy(report, update=whole))
        return [line for line in lines if "the product of two" in line]

    cpu, other = faster(bench, "cpu", 2.0, 3.0), faster(bench, "openvino", 5.0, 5.0)
    eight, there = faster(made.bench, "cpu", 1.5, 1.5), faster(made.bench, "openvino", 1.1, 1.2)
    assert said([other], [eight]) == [] and len(said([cpu], [eight])) == 1
    assert "about 3.00x" in said([cpu], [eight])[0]
    both = said([cpu, other], [eight, there])
    assert ["about 3.00x" in both[0], "about 5.50x" in both[1]] == [True, True]
    assert "batch 1, cpu" in both[0] and "batch 1, openvino" in both[1]
    second = eight.model_copy(update={"batches": eight.batches[1:]})
    assert "about 4.50x" in said([cpu], [second])[0] and "batch 2" in said([cpu], [second])[0]
    assert said([cpu], [eight.model_copy(update={"threads": 2})]) == []
    assert said([cpu], [eight], source="model-dense.onnx") == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "cpu-avx2"])
def test_what_does_not_pay_is_timed_where_the_result_runs(
    target: str, stand_in: StandIn, data: str, tmp_path: Path
) -> None:
    """Without a benchmark nothing else is timed."""
    passes = ["l1{ratio=0.5, revert=always}"]
    chosen = {"passes": passes, "data": data, "target": target, "bench": False}
    recipe = Recipe.model_validate(chosen)
    report = build(Job(SPEC, recipe, make_passes(recipe, PASSES), None, SHAPE), tmp_path / "out")
    compiled = [one for one in stand_in.asked if isinstance(one, tuple)]
    assert report.benches == [] and bool(compiled) == (target == "openvino")
