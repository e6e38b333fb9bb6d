"""The last pass of a recipe: refused in time, carried out on the file, recorded, replayed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import graphcomp
from graphcomp.base import read_record
from graphcomp.compiler import Job, build, make_passes
from graphcomp.compiler.recipe import Recipe
from graphcomp.errors import PassError, RecipeError
from graphcomp.ir import load
from graphcomp.onnx import requantize
from graphcomp.onnx.quantization import checks
from graphcomp.passes import PASSES, Quantize
from graphcomp.pipeline import Pipeline, check_order
from graphcomp.records import BatchTiming, Plan, QuantizedChoice, Report
from graphcomp.report import read_report, summary_table
from graphcomp.report.quantized import describe_quantized
from tests.tiny import SHAPE, SPEC, context, images_in, random_data, tiny_program


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """240 labelled images of 8x8x3."""
    return images_in(tmp_path_factory.mktemp("data"), 240)


def job(data: str | None, passes: str, **fields: Any) -> Job:
    recipe = Recipe.model_validate(
        {"passes": [passes], "data": data, "target": "cpu-avx2", "bench": False, **fields}
    )
    return Job(SPEC, recipe, make_passes(recipe, PASSES), None, SHAPE)


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A whole run without a race, so that its end is known."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, build(job(data, "l1{ratio=0.5, multiple=1}, quantize"), out)


@pytest.mark.slow
def test_both_files_and_the_float_program(finished: tuple[Path, Report], data: str) -> None:
    out, report = finished
    made = report.quantized
    assert made is not None and report == read_report(out / "report.json")
    assert (made.path, made.source, made.why) == ("model-int8.onnx", "model.onnx", "no race was run")
    assert (out / "model-int8.onnx").stat().st_size == made.int8_bytes
    assert made.operators["QLinearConv"] == 3 and not made.in_float and made.bench is None
    assert {layer.name for layer in made.layers} == {"stem", "inner", "outer", "fc"}
    assert report.steps[-1].name == "quantize" and not report.steps[-1].changed
    assert report.steps[-1].summary.startswith("4 of 4 layers in 8 bits, ")
    program, before = load(out / "program"), load(out / "checkpoints" / "01-l1")
    assert program.fingerprint() == before.fingerprint()
    assert report.final.score == report.steps[0].after.score


@pytest.mark.slow
def test_accuracy_is_that_of_the_files(finished: tuple[Path, Report], data: str) -> None:
    """By sessions of their own, on all evaluation samples."""
    out, report = finished
    samples = graphcomp.load_data(data, input_shape=SHAPE[1:], seed=0).eval
    feeds = [{"input": x.numpy()} for (x,), _ in samples.batches(16)]
    labels = samples.labels.numpy()
    right = [
        np.concatenate([y[0].argmax(1) for y in checks.run_all((out / name).read_bytes(), feeds)]) == labels
        for name in ("model.onnx", "model-int8.onnx")
    ]
    made = report.quantized
    assert made is not None and made.score is not None and made.accuracy is not None
    assert (made.score.value, made.score.samples) == (right[1].mean(), len(labels))
    assert made.accuracy.value == pytest.approx(right[1].mean() - right[0].mean())


@pytest.mark.slow
def test_the_plan_is_the_file(finished: tuple[Path, Report], tmp_path: Path) -> None:
    out, report = finished
    plan = read_record(out / "plans" / "02-quantize.json", Plan, "a plan")
    assert QuantizedChoice.model_validate(plan.decisions).grid == "pairs"  # of cpu-avx2, whatever runs here
    assert report.steps[-1].plan.decisions == {} and report.target == "cpu-avx2-int8"
    requantize(out / "model.onnx", tmp_path / "again.onnx", plan)
    assert (tmp_path / "again.onnx").read_bytes() == (out / "model-int8.onnx").read_bytes()


@pytest.mark.slow
def test_what_the_report_says(finished: tuple[Path, Report]) -> None:
    out, report = finished
    said = " ".join(describe_quantized(report))
    assert "no race was run" in said and "points from the float file on the same 120 samples" in said
    assert "4 of 4 convolutions and products are fused in 8 bits (grid pairs)" in said
    assert "on samples and on 0 and 255: at most " in said and "Nothing is left in float." in said
    page = (out / "report.html").read_text()
    assert 'href="#quantized"' in page and "What the runtime made of the file: " in page
    assert "in 8 bits" in str(summary_table(report).columns[0]._cells)


def raced(report: Report, verdict: str, path: str | None, **changes: Any) -> Report:
    """The report as if there had been a race."""
    made = report.quantized
    assert made is not None
    interval = {"value": 1.5, "low": 1.4, "high": 1.6}
    stats = dict.fromkeys(("first_ms", "median_ms", "p90_ms", "p99_ms", "cpu_median_ms"), 1.0) | {"runs": 6}
    timing = BatchTiming.model_validate(
        {"batch": 1, "base": stats, "new": stats, "speedup": interval, "cpu_speedup": interval}
        | {"theoretical": 1.0, "busy": False, "verdict": verdict}
    )
    file = {"path": "x", "sha256": "", "bytes": 1, "macs": 1, "load_seconds": 0, "nodes_per_provider": {}}
    bench = {"provider": "cpu", "provider_options": {}, "threads": 1, "base": file, "new": file}
    full = {**bench, "batches": [timing], "environment": report.environment}
    shipped = "int8" if path else "float32"
    update = {"bench": full, "path": path, "shipped": shipped, **changes}
    return Report.model_validate({**report.model_dump(), "quantized": {**made.model_dump(), **update}})


@pytest.mark.slow
def test_the_report_says_what_to_ship(finished: tuple[Path, Report]) -> None:
    _, report = finished
    won = describe_quantized(raced(report, "faster", "model-int8.onnx"))[0]
    assert won.startswith("Ship model-int8.onnx: ") and "batch 1: faster, 1.50x [1.40, 1.60]" in won
    lost = raced(report, "slower", None)
    assert describe_quantized(lost)[0].startswith("8 bits do not pay on this machine (batch 1: slower, ")
    assert "ship model.onnx; no 8 bit file was written" in describe_quantized(lost)[0]
    assert "in 8 bits" not in str(summary_table(lost).columns[0]._cells)
    floats = raced(report, "faster", "model-int8.onnx", in_float={"stem": "excluded", "fc": "excluded"})
    assert describe_quantized(floats)[-1].endswith("In float: stem (excluded), fc (excluded).")


@pytest.mark.slow
def test_an_8_bit_file_of_an_earlier_run_goes(data: str, tmp_path: Path) -> None:
    """Where the new one is not shipped, and where none is asked for."""
    out = tmp_path / "out"
    bench = {"runs": 6, "seconds": 0.1}
    build(job(data, "quantize"), out)
    assert (out / "model-int8.onnx").exists()
    build(job(data, "fold-bn"), out, overwrite=True)
    assert not (out / "model-int8.onnx").exists()
    build(job(data, "quantize"), out, overwrite=True)
    report = build(job(data, "quantize", bench=bench), out, overwrite=True)
    assert report.quantized is not None and report.quantized.bench is not None
    assert (out / "model-int8.onnx").exists() == (report.quantized.path is not None)
    assert (report.quantized.shipped == "int8") == (report.quantized.path is not None)


@pytest.mark.slow
def test_a_run_that_ended_while_quantising_goes_on(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    made = job(data, "l1{ratio=0.5}, quantize")
    with monkeypatch.context() as patch:
        patch.setattr(Quantize, "export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(made, out)
    assert not (out / "model.onnx").exists()
    build(made, out, resume=True)
    build(made, whole)
    for name in ("model.onnx", "model-int8.onnx", "plans/02-quantize.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_the_dense_form_of_dct_layers_is_quantised(data: str, tmp_path: Path) -> None:
    report = build(job(data, "fold-bn, dct{rate=4, min_weights=64}, quantize"), tmp_path / "out")
    assert report.quantized is not None and report.dense_export is not None
    assert report.quantized.source == "model-dense.onnx" and not report.quantized.in_float


@pytest.mark.slow
def test_data_without_labels_are_enough(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, image in enumerate(np.random.default_rng(0).integers(0, 256, (96, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:03d}.png")
    report = build(
        job(f"imagefolder:{tmp_path / 'images'}", "quantize{samples=64, exclude=fc}"), tmp_path / "out"
    )
    made = report.quantized
    assert made is not None and made.accuracy is None and made.score is None
    assert made.samples + made.held_out <= 64 and made.in_float == {"fc": "excluded"}
    assert [k.where for k in report.steps[-1].plan.kept] == ["fc"]
    assert "without labels that is all that is known" in " ".join(describe_quantized(report))


@pytest.mark.parametrize(
    ("passes", "spec", "message"),
    [
        (
            "quantize, l1{ratio=0.5}",
            None,
            "'quantize': found 'l1' behind it, expected nothing: .* put it last",
        ),
        ("quantize, quantize", None, "'quantize': found 'quantize' behind it"),
        ("quantize", "random", "found random samples, expected some .* give --data, without labels"),
        ("quantize", "random?limit=9", "found random samples"),
    ],
)
def test_refused_before_any_work(
    passes: str, spec: str | None, message: str, data: str, tmp_path: Path
) -> None:
    for given in [spec or data] if spec != "random" else [spec, None]:
        with pytest.raises(PassError, match=message):
            build(job(given, passes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_samples_are_refused() -> None:
    few = replace(random_data(3, 8, 8, samples=31), spec="npz:few.npz")
    with pytest.raises(
        PassError, match=r"found \d+ samples to calibrate on, expected at least 32; give more"
    ):
        check_order([Quantize()], tiny_program(), context(few))
    with pytest.raises(PassError, match="quantize: found no data"):
        check_order([Quantize()], tiny_program(), context(None))


def test_a_program_in_memory_has_no_file(data: str) -> None:
    with pytest.raises(
        RecipeError, match=r"passes: found quantize, .* give the exported file to quantize_onnx"
    ):
        graphcomp.compile(tiny_program(), "l1{ratio=0.5}, quantize", data=data)


def test_a_target_without_8_bits_for_cpus_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="target: found 'cuda-fp16' with quantize"):
        build(job(data, "quantize", target="cuda-fp16"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "kept"),
    [
        ("l1{ratio=0.4}", 16),  # 10 of 16, in steps of 8
        ("l1{ratio=0.4}, quantize", 16),
        ("l1{ratio=0.4, multiple=2}, quantize", 10),
    ],
)
def test_widths_are_those_of_8_bit_kernels(passes: str, kept: int, data: str, tmp_path: Path) -> None:
    report = build(job(data, passes, allow_nothing=True), tmp_path / "out")
    (width,) = {w["kept"] for w in report.steps[0].plan.evidence["groups"]}
    assert width == kept
    multiple = report.steps[0].plan.evidence["multiple"]
    assert multiple == (2 if "multiple" in passes else 16 if "quantize" in passes else 8)
    again = Recipe.model_validate(report.recipe)
    assert again.target == ("cpu-avx2-int8" if "quantize" in passes else "cpu-avx2")


def test_no_pass_changes_a_program_is_no_error(data: str) -> None:
    """What it changes is the file."""
    loaded = graphcomp.load_data(data, input_shape=SHAPE[1:], seed=0)
    before = tiny_program()
    after, (step,) = Pipeline([Quantize()]).run(before, context(loaded))
    assert not step.changed and after.fingerprint() == before.fingerprint()
