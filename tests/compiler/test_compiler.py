"""From a job to a directory: what is written, what survives an interruption, what is never overwritten."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import save_file

from graphcomp.base import files as graphcomp_files
from graphcomp.base.files import atomic_file
from graphcomp.compiler import compiler, folder, results
from graphcomp.compiler.compiler import build
from graphcomp.compiler.recipe import Recipe, load_recipe, make_passes
from graphcomp.compiler.source import Job, load_source
from graphcomp.errors import LoadError, OutputError, PassError, RecipeError, VerifyError
from graphcomp.ir import Interface, load, save, trace
from graphcomp.ir.program import Program
from graphcomp.onnx import export
from graphcomp.passes import L1, PASSES, FoldBN
from graphcomp.pipeline.verify import difference
from graphcomp.records import Export, Plan, Report, Step
from graphcomp.report.report import read_report
from graphcomp.runtime.targets import TARGETS
from tests.tiny import SHAPE, SPEC, images_in, tiny

ROOT = Path(__file__).parents[2]
PASSES_LINE = "fold-bn, l1{ratio=0.5}"
FILES = {
    "state.json",
    "report.json",
    "report.html",
    "model.onnx",
    "baseline.onnx",
    "plans/01-fold-bn.json",
    "plans/02-l1.json",
    "program/program.json",
    "program/weights.safetensors",
    *(
        f"checkpoints/{name}/{file}"
        for name in ("01-fold-bn", "02-l1")
        for file in ("program.json", "weights.safetensors")
    ),
    "checkpoints/01-fold-bn.json",
    "checkpoints/02-l1.json",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """120 labelled images of 8x8x3."""
    return images_in(tmp_path_factory.mktemp("data"), 120)


@pytest.fixture(scope="module")
def job(data: str) -> Job:
    bench = {"runs": 6, "seconds": 0.2}
    recipe = Recipe.model_validate(
        {"passes": [PASSES_LINE], "data": data, "target": "cpu-avx2", "bench": bench}
    )
    return Job(SPEC, recipe, make_passes(recipe, PASSES), None, SHAPE)


@pytest.fixture(scope="module")
def finished(
    job: Job, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report, list[tuple[str, float]]]:
    """A whole run, with real exports and a real benchmark: directory, report, progress."""
    out, told = tmp_path_factory.mktemp("run") / "out", []
    return out, build(job, out, progress=lambda m, f: told.append((m, f))), told


_EXPORTED: dict[str, tuple[bytes, Export]] = {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, job: Job) -> Job:
    """The job without a benchmark, its exports remembered: the same program gives the same file."""

    def remembering(program: Program, path: Path, **options: Any) -> Export:
        digest = hashlib.sha256(str(program).encode())
        for tensor in program.tensors.values():
            digest.update(tensor.detach().numpy().tobytes())
        key = digest.hexdigest() + options["dct"]
        if key not in _EXPORTED:
            record = export.export_onnx(program, path, **options)
            _EXPORTED[key] = path.read_bytes(), record
            path.unlink()
        with atomic_file(path) as temporary:
            temporary.write_bytes(_EXPORTED[key][0])
        return _EXPORTED[key][1].model_copy(update={"path": str(path)})

    monkeypatch.setattr(results, "export_onnx", remembering)
    return without_bench(job)


def without_bench(job: Job) -> Job:
    return replace(job, recipe=job.recipe.model_copy(update={"bench": False}))


def files(out: Path) -> set[str]:
    return {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}


def outputs(file: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, {"input": x})[0]
    return result


@pytest.mark.slow
def test_some_classes_only(quick: Job, tmp_path: Path) -> None:
    """Data and head follow; the baseline is the network with that head, not yet compressed (PFA, 4.3)."""
    recipe = quick.recipe.model_copy(update={"classes": (1, 3)})
    report = build(replace(quick, recipe=recipe), tmp_path / "out")
    assert report.data.endswith("classes 1, 3 only") and report.recipe["classes"] == [1, 3]
    assert report.baseline.layers[-1].out_channels == report.final.layers[-1].out_channels == 2
    assert report.baseline.score is not None and report.baseline.score.samples < 60
    x = torch.randn(2, *SHAPE[1:])
    expected = load_source(SPEC, None, SHAPE).program(x)[:, [1, 3]]
    assert np.allclose(outputs(tmp_path / "out" / "baseline.onnx", x.numpy()), expected.detach(), atol=1e-5)


def assert_same_result(out: Path, reference: Path) -> None:
    """Everything but times: programs, plans, ONNX files bit for bit, and the counters."""
    for name in sorted(FILES - {"state.json", "report.json", "report.html"}):
        if name.startswith("checkpoints/") and name.count("/") == 1:
            continue
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    ours, theirs = read_report(out / "report.json"), read_report(reference / "report.json")
    assert (ours.baseline, ours.final) == (theirs.baseline, theirs.final)
    timeless = {"seconds": 0.0}
    assert [s.model_copy(update=timeless) for s in ours.steps] == [
        s.model_copy(update=timeless) for s in theirs.steps
    ]
    assert ours.export.parity == theirs.export.parity


# ---------------------------------------------------------------------- a whole run


@pytest.mark.slow
def test_writes_these_files_and_no_others(finished: Any) -> None:
    assert files(finished[0]) == FILES


@pytest.mark.slow
def test_report(finished: Any, job: Job, data: str) -> None:
    out, report, _ = finished
    assert read_report(out / "report.json") == report
    assert report.model == SPEC and report.weights is None and report.target == "cpu-avx2"
    assert (report.baseline.macs, report.final.macs) == (
        SHAPE[2] ** 2 * (432 + 2304 * 2) + 64,
        64 * (216 + 576 * 2) + 32,
    )
    assert report.final == report.steps[-1].after
    assert report.baseline.score is not None and report.final.score is not None
    assert report.baseline.score == report.steps[0].after.score  # folding changes nothing
    assert (
        report.bench is not None and report.bench.provider == "cpu" and report.bench.batches[0].base.runs >= 1
    )
    assert report.bench.batches[0].theoretical == pytest.approx(report.baseline.macs / report.final.macs)
    assert (report.export.path, report.baseline_export.path) == ("model.onnx", "baseline.onnx")
    assert set(report.export.parity) == {"1", "2", "5"} and max(report.export.parity.values()) < 1e-4
    html = (out / "report.html").read_text()
    assert "fold-bn" in html and "</html>" in html


def test_plans_are_those_of_the_steps(finished: Any) -> None:
    out, report, _ = finished
    for step, entry in zip(report.steps, load(out / "program").history, strict=True):
        plan = Plan.model_validate_json((out / step.plan_file).read_text())
        assert plan.model_dump(mode="json", exclude={"bulk"}) == entry
        assert plan.model_copy(update={"decisions": {}, "bulk": {}}) == step.plan
        assert step.summary == plan.summary and plan.decisions
        record = out / "checkpoints" / f"{step.index + 1:02d}-{step.name}.json"
        assert Step.model_validate_json(record.read_text()) == step


def test_onnx_files_compute_what_the_programs_do(finished: Any) -> None:
    out, _, _ = finished
    x = np.random.default_rng(1).standard_normal((3, *SHAPE[1:]), dtype=np.float32)
    with torch.no_grad():
        small = load(out / "program")(torch.from_numpy(x)).numpy()
        base = tiny()(torch.from_numpy(x)).numpy()
    assert np.allclose(outputs(out / "model.onnx", x), small, atol=1e-5)
    assert np.allclose(outputs(out / "baseline.onnx", x), base, atol=1e-5)
    assert not np.allclose(small, base, atol=1e-2)
    last = load(out / "checkpoints/02-l1")
    assert difference(last, load(out / "program")) == 0


def test_the_recorded_recipe_is_a_recipe(finished: Any, job: Job, tmp_path: Path) -> None:
    _, report, _ = finished
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(report.recipe))
    recipe = load_recipe(path, PASSES)
    assert make_passes(recipe, PASSES) == job.passes == [FoldBN(), L1(ratio=0.5)]
    assert (recipe.model, recipe.data, recipe.target, recipe.seed) == (SPEC, job.recipe.data, "cpu-avx2", 0)
    assert recipe.bench == job.recipe.bench


def test_progress_rises_to_one(finished: Any) -> None:
    told = finished[2]
    fractions = [f for _, f in told]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0 and fractions[-1] == 1
    messages = [m for m, _ in told]
    assert "[1/2] fold-bn: plan" in messages and "[2/2] l1: verify" in messages
    for which in ("baseline", "result"):
        steps = [
            m.removeprefix(f"export the {which}: ") for m in messages if m.startswith(f"export the {which}: ")
        ]
        assert steps[:2] == ["run the network", "write it as ONNX"]
        assert steps[-1] == "compare with the network at batch 1, 2, 5"
    assert any(m.startswith("benchmark: ") for m in messages)
    assert "explain: profile" in messages


@pytest.mark.slow
def test_what_was_timed_is_explained(finished: Any, quick: Job, tmp_path: Path) -> None:
    out, report, _ = finished
    found, timing = report.explanation, report.bench.batches[0]
    assert (found.batch, found.theoretical, found.bench) == (timing.batch, timing.theoretical, None)
    assert sum(part.ms for part in found.parts) == pytest.approx(found.gap.value)
    assert {row.made_by for row in found.rows if row.new_macs} == {"l1"}
    assert 'id="explain"' in (out / "report.html").read_text()
    assert build(quick, tmp_path / "out").explanation is None
    asked, program = report.bench.model_copy(update={"provider": "cuda"}), load(out / "program")
    assert results._explain(quick.recipe, [asked], (out, out), lambda *_: None, 1.0, program) is None


@pytest.mark.parametrize(
    ("bench", "target", "timed"),
    [
        ({}, "cpu-avx2", True),
        ({"provider": "cpu"}, "cpu-avx2", True),
        ({"provider": "cpu"}, "cuda-fp16", False),
        (False, "cpu-avx2", False),
    ],
)
def test_passes_measure_only_where_the_result_is_timed(bench: Any, target: str, timed: bool) -> None:
    """A benchmark on the CPU says nothing of a GPU, and must not ask for one."""
    recipe = Recipe.model_validate({"passes": [PASSES_LINE], "bench": bench})
    assert compiler._is_timed_on(TARGETS[target], recipe) is timed


@pytest.mark.slow
def test_a_saved_program_is_compiled_further(finished: Any, quick: Job, tmp_path: Path) -> None:
    program = finished[0] / "program"
    further = replace(quick, model=str(program), passes=[L1(ratio=0.5, multiple=2)], input_shape=None)
    report = build(further, tmp_path / "out")
    assert report.baseline.macs == finished[1].final.macs > report.final.macs
    assert [h["name"] for h in load(tmp_path / "out/program").history] == ["fold-bn", "l1", "l1"]


# ---------------------------------------------------------------------- resuming


def interrupted(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def plan(*_: object) -> Plan:
        raise error

    monkeypatch.setattr(L1, "plan", plan)


AFTER_ONE = {
    "state.json",
    "plans/01-fold-bn.json",
    "checkpoints/01-fold-bn.json",
    "checkpoints/01-fold-bn/program.json",
    "checkpoints/01-fold-bn/weights.safetensors",
}


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), PassError("no")])
def test_resumes_after_the_last_finished_pass(
    error: BaseException, quick: Job, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted(patch, error)
        with pytest.raises(type(error)):
            build(quick, out)
    assert files(out) == AFTER_ONE
    started = json.loads((out / "state.json").read_text())["started"]
    planned: list[str] = []
    for kind in (FoldBN, L1):
        original: Callable[..., Plan] = kind.plan
        monkeypatch.setattr(kind, "plan", lambda *a, f=original: planned.append(a[0].name) or f(*a))
    report = build(quick, out, resume=True)
    assert planned == ["l1"]
    assert files(out) == FILES
    assert report.started == started
    assert_same_result(out, finished[0])


@pytest.mark.slow
def test_resuming_a_finished_run_plans_nothing(
    quick: Job, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    for kind in (FoldBN, L1):
        monkeypatch.setattr(kind, "plan", None)
    assert build(quick, out, resume=True).bench is None  # export and benchmark may differ from before
    assert_same_result(out, finished[0])


@pytest.mark.slow
def test_killed_between_passes(job: Job, finished: Any, data: str, tmp_path: Path) -> None:
    """kill -9 in the second pass of a real process; another process goes on."""
    out = tmp_path / "out"
    code = """
        import os, signal, sys
        from graphcomp.cli import main
        from graphcomp.passes import L1
        if "--resume" not in sys.argv:
            L1.plan = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        main.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "compile", SPEC, "--passes", PASSES_LINE]
    command += [
        "--data",
        data,
        "--target",
        "cpu-avx2",
        "--input-shape",
        "1,3,8,8",
        "--no-bench",
        "-o",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert files(out) == AFTER_ONE | {graphcomp_files.LOCK}
    went_on = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert went_on.returncode == 0, went_on.stderr
    assert "[2/2] l1: plan" in went_on.stderr and "fold-bn: plan" not in went_on.stderr
    assert files(out) == FILES
    assert_same_result(out, finished[0])


@pytest.mark.slow
def test_killed_while_writing(quick: Job, tmp_path: Path, finished: Any) -> None:
    """What was half-written lies under another name and does not count."""
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "checkpoints/01-fold-bn", out / "checkpoints/.0123abcd-01-fold-bn")
    shutil.copy(finished[0] / "state.json", out)
    (out / ".0123abcd-model.onnx").write_bytes(b"half")
    (out / ".4711abcd-report.json").write_bytes(b"half")
    (out / ".hidden").write_text("somebody's")
    report = build(quick, out, resume=True)
    assert len(report.steps) == 2
    assert files(out) == FILES | {".hidden"}
    (out / ".hidden").unlink()


@pytest.mark.slow
def test_a_checkpoint_without_its_record_does_not_count(quick: Job, tmp_path: Path, finished: Any) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "checkpoints/02-l1.json").unlink()
    (out / "checkpoints/02-l1/weights.safetensors").write_bytes(b"half")
    build(quick, out, resume=True)
    assert_same_result(out, finished[0])


CHANGES: dict[str, Callable[[Job], Job]] = {
    "passes": lambda job: replace(job, passes=[FoldBN(), L1(ratio=0.25)]),
    "seed": lambda job: replace(job, recipe=job.recipe.model_copy(update={"seed": 1})),
    "data": lambda job: replace(
        job, recipe=job.recipe.model_copy(update={"data": f"{job.recipe.data}?limit=50"})
    ),
    "target": lambda job: replace(job, recipe=job.recipe.model_copy(update={"target": "cpu-avx512"})),
    "input_shape": lambda job: replace(
        job, input_shape=(1, 3, 16, 16), recipe=job.recipe.model_copy(update={"data": "random"})
    ),
    "model": lambda job: replace(job, model=SPEC.replace("/tests/", "/tests/../tests/")),
}


@pytest.mark.parametrize("field", CHANGES)
def test_resuming_another_run_is_refused(field: str, quick: Job, finished: Any) -> None:
    before = files(finished[0])
    with pytest.raises(RecipeError, match=r"^--resume: ") as caught:
        build(CHANGES[field](quick), finished[0], resume=True)
    fields = (
        [field] if field != "input_shape" else ["input_shape", "weights"]
    )  # the printed program has shapes
    assert str(caught.value).startswith(tuple(f"--resume: {f}: found " for f in fields))
    assert "as in the interrupted run in" in str(caught.value)
    assert files(finished[0]) == before


def test_resuming_with_other_weights_is_refused(quick: Job, finished: Any, tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["fc.bias"][0] += 1
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(RecipeError, match="--resume: weights: found "):
        build(replace(quick, weights=tmp_path / "w.safetensors"), finished[0], resume=True)


def test_resuming_with_other_samples_is_refused(quick: Job, finished: Any, data: str) -> None:
    """One pixel in a file of the same name and size; the recipe is the same."""
    file = Path(data.removeprefix("npz:"))
    before, arrays = file.read_bytes(), dict(np.load(file))
    arrays["x"][7, 3, 3, 1] ^= 1
    try:
        np.savez(file, **arrays)
        with pytest.raises(RecipeError, match="--resume: samples: found "):
            build(quick, finished[0], resume=True)
    finally:
        file.write_bytes(before)


@pytest.mark.slow
def test_resume_without_a_run_starts_one(quick: Job, tmp_path: Path) -> None:
    assert len(build(quick, tmp_path / "new", resume=True).steps) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", "{}", "expected the state of a run; use --overwrite"),
        ("state.json", "not json", "expected the state of a run; use --overwrite"),
        ("checkpoints/01-fold-bn.json", "{", "expected a step's record; use --overwrite"),
        ("checkpoints/02-l1/program.json", "{", "program.json"),
        ("checkpoints/02-l1/weights.safetensors", "", "weights.safetensors"),
    ],
)
def test_damaged_checkpoints_are_named(
    name: str, content: str, message: str, quick: Job, finished: Any, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(LoadError) as caught:
        build(quick, tmp_path / "out", resume=True)
    assert message in str(caught.value) and Path(name).name in str(caught.value)


# ---------------------------------------------------------------------- the output directory


def test_does_not_write_over_results_unasked(quick: Job, finished: Any) -> None:
    before = {f: (finished[0] / f).read_bytes() for f in files(finished[0])}
    with pytest.raises(OutputError, match=r"expected an empty or new directory; use --resume .* --overwrite"):
        build(quick, finished[0])
    assert {f: (finished[0] / f).read_bytes() for f in files(finished[0])} == before


@pytest.mark.slow
def test_overwrites_results_if_asked(quick: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shorter = replace(quick, passes=[FoldBN()])
    build(quick, out)
    report = build(shorter, out, overwrite=True)
    assert [s.name for s in report.steps] == ["fold-bn"]
    assert files(out) == {f for f in FILES if "02-l1" not in f}


RESULTS = {f for f in FILES if not f.startswith(("state.json", "plans/", "checkpoints/"))}


@pytest.mark.slow
@pytest.mark.parametrize("at", ["plan", "export_onnx", "write_report"])
def test_older_results_stay_until_the_new_ones_are_there(
    at: str, quick: Job, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a run that replaces another one fails, all results are the old ones, and it can be resumed."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    other = replace(quick, passes=[FoldBN(), L1(ratio=0.25, multiple=2)])
    before = {f: (out / f).read_bytes() for f in RESULTS}
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            assert {f: (out / f).read_bytes() for f in RESULTS} == before
            raise KeyboardInterrupt

        patch.setattr(*((L1, at) if at == "plan" else (results, at)), fail)
        with pytest.raises(KeyboardInterrupt):
            build(other, out, overwrite=True)
    assert {f: (out / f).read_bytes() for f in RESULTS} == before
    report = build(other, out, resume=True)
    assert files(out) == FILES and read_report(out / "report.json") == report
    assert (out / "model.onnx").read_bytes() != before["model.onnx"]


@pytest.mark.slow
def test_stopped_while_results_are_replaced(
    quick: Job, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each result is the old or the new one, and whole; going on replaces the others too."""
    out, replacing, steps = tmp_path / "out", graphcomp_files._replace, itertools.count()
    build(replace(quick, passes=[FoldBN(), L1(ratio=0.25, multiple=2)]), out)
    stable = sorted(RESULTS - {"report.json", "report.html"})
    old, new = ({f: (place / f).read_bytes() for f in stable} for place in (out, finished[0]))

    def step_by_step(entry: Path, final: Path) -> None:
        if final.parent == out and next(steps) == 2:  # baseline.onnx and model.onnx are there
            raise KeyboardInterrupt
        replacing(entry, final)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(graphcomp_files, "_replace", step_by_step)
        build(quick, out, overwrite=True)
    found = {f: (out / f).read_bytes() for f in stable}
    assert all(found[f] in (old[f], new[f]) for f in stable)
    assert files(out) == FILES and read_report(out / "report.json").steps
    assert found not in (old, new)
    build(quick, out, resume=True)
    assert_same_result(out, finished[0])


@pytest.mark.slow
def test_two_runs_in_one_directory(
    quick: Job, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "out", L1.plan
    refused = []

    def meanwhile(*arguments: Any) -> Plan:
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(
                OutputError, match=rf"another run at work \(process {os.getpid()} on "
            ) as caught:
                build(quick, out, **how)
            refused.append(str(caught.value))
        return plan(*arguments)

    monkeypatch.setattr(L1, "plan", meanwhile)
    build(quick, out)
    assert len(refused) == 3 and files(out) == FILES
    assert_same_result(out, finished[0])


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_touches_foreign_files(overwrite: bool, quick: Job, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(OutputError, match=r"thesis\.tex|expected an empty or new directory"):
        build(quick, tmp_path, overwrite=overwrite)
    assert files(tmp_path) == {"thesis.tex", "model.onnx"}


def test_output_that_is_a_file(quick: Job, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="found a file, expected a directory; choose another"):
            build(quick, tmp_path / "out", overwrite=overwrite)
    with pytest.raises(OutputError, match="out/below: found 'Not a directory', expected a place to write to"):
        build(quick, tmp_path / "out/below")


STAGES = [
    "state.json",
    "plans/.*01-fold-bn.json",
    "checkpoints/.*01-fold-bn/weights.safetensors",
    "checkpoints/.*01-fold-bn.json",
    "checkpoints/.*02-l1/program.json",
    "checkpoints/.*02-l1.json",
    "program/program.json",
    "baseline.onnx",
    "model.onnx",
    "report.json",
    "report.html",
]


@pytest.mark.slow
def test_full_disk_at_every_stage(
    quick: Job, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at one stage after the other; each time the run goes on where it stood."""
    out, sync, full = tmp_path / "out", os.fsync, ""

    def fsync(descriptor: int) -> None:
        path = re.sub(r"\.[0-9a-f]{8}-", "", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        if re.search(f"/{full}$", path):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    complete: set[str] = set()
    for stage, following in itertools.zip_longest(STAGES, STAGES[1:]):
        full = stage
        with pytest.raises(OutputError, match="No space left on device"):
            build(quick, out, resume=True)
        left = files(out)
        assert not [f for f in left if re.search(r"(^|/)\.", f)], stage  # nothing half-written
        assert left <= FILES and complete <= left, stage
        assert not any(re.fullmatch(stage, f) for f in left), stage
        complete, full = left, following or ""
    full = "nothing"
    build(quick, out, resume=True)
    assert files(out) == FILES
    assert_same_result(out, finished[0])


def test_full_disk_keeps_an_older_result(
    quick: Job, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="program: found 'No space left on device'"):
        build(quick, out, resume=True)
    assert files(out) == FILES
    assert_same_result(out, finished[0])


# ---------------------------------------------------------------------- sources


def test_source_of_a_saved_program_takes_no_weights(finished: Any) -> None:
    program = str(finished[0] / "program")
    assert load_source(program).weights is None
    with pytest.raises(
        LoadError, match="found a saved program with --weights or --input-shape, expected neither"
    ):
        load_source(program, input_shape=SHAPE)
    with pytest.raises(LoadError, match="expected neither"):
        load_source(program, weights=Path("w.safetensors"))


def test_source_needs_an_input_shape() -> None:
    with pytest.raises(LoadError, match="found no input shape, expected one; give --input-shape"):
        load_source(SPEC)


@pytest.mark.parametrize(
    "shape", [(1, 3, 100_000, 100_000), (1, 3, 10**30), (1, 3, 10**400), (1,) * 9, (1, *[2**16] * 5)]
)
def test_inputs_that_no_memory_holds(shape: tuple[int, ...]) -> None:
    with pytest.raises(LoadError, match=r"^--input-shape: found .*, expected ") as caught:
        load_source(SPEC, input_shape=shape)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_source_loads_the_weights(tmp_path: Path) -> None:
    state = {k: v + 0.25 if v.is_floating_point() else v for k, v in tiny().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    source = load_source(SPEC, tmp_path / "w.safetensors", SHAPE)
    assert source.weights == tmp_path / "w.safetensors"
    assert all(torch.equal(source.program.tensors[k], v) for k, v in state.items())


def test_source_with_default_weights_and_data() -> None:
    source = load_source("models:resnet20-digits")
    assert source.weights is not None and source.weights.name == "resnet20_digits.safetensors"
    assert source.data == "digits"


def test_source_that_is_not_finite(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "import torch\ndef net():\n    m = torch.nn.Linear(3, 2)\n    m.bias.data[0] = torch.inf\n"
        "    return m\n"
    )
    with pytest.raises(VerifyError, match="bias: found 1 NaN or infinite values, expected finite weights"):
        load_source(f"{file}:net", input_shape=(1, 3))


@pytest.mark.slow
def test_weights_are_part_of_the_recorded_recipe(quick: Job, tmp_path: Path) -> None:
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    report = build(replace(quick, weights=tmp_path / "w.safetensors", passes=[FoldBN()]), tmp_path / "out")
    assert report.weights == report.recipe["weights"] == str(tmp_path / "w.safetensors")


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Whatever a test did, no temporary file may be left, not even one that it put there itself."""
    yield
    left = list(tmp_path.rglob(".*"))
    assert left == []


# ---------------------------------------------------------------------- layers of DCT coefficients


def dct_job(job: Job, **changes: Any) -> Job:
    """The job with a pass that makes DCT layers, and changed sections of its recipe."""
    passes = ["fold-bn, dct{rate=4, min_weights=64}"]
    recipe = Recipe.model_validate({**job.recipe.model_dump(), "passes": passes, **changes})
    return replace(job, recipe=recipe, passes=make_passes(recipe, PASSES))


@pytest.mark.slow
def test_dct_layers_are_exported_twice_and_timed_against_each_other(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = build(dct_job(job), out)
    assert report == read_report(out / "report.json")
    small, dense, bench = report.export, report.dense_export, report.dct_bench
    assert small.dct is not None and dense is not None and dense.dct is not None and bench is not None
    assert (small.path, small.dct.stored, small.dct.layers) == ("model.onnx", "coefficients", 3)
    assert (dense.path, dense.dct.stored, dense.dct.layers) == ("model-dense.onnx", "dense", 3)
    assert small.bytes < dense.bytes
    assert [bench.base.bytes, bench.new.bytes] == [dense.bytes, small.bytes]
    assert bench.base.macs == bench.new.macs == report.baseline.macs
    assert report.baseline_export.dct is None
    x = np.random.default_rng(1).standard_normal((3, 3, 8, 8), np.float32)
    results = [run_onnx(out / name, x) for name in ("model.onnx", "model-dense.onnx")]
    np.testing.assert_allclose(*results, rtol=0, atol=1e-6 * np.abs(results[0]).max())
    again = Recipe.model_validate(report.recipe)
    assert again.export.dct == "both"


def run_onnx(path: Path, x: Any) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"input": x}
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["coefficients", "dense"])
def test_dct_layers_are_exported_once_as_asked(stored: str, quick: Job, tmp_path: Path) -> None:
    report = build(dct_job(quick, export={"dct": stored}), tmp_path / "out")
    assert report.export.dct is not None and report.export.dct.stored == stored
    assert (report.dense_export, report.dct_bench) == (None, None)
    assert not (tmp_path / "out/model-dense.onnx").exists()


@pytest.mark.slow
def test_both_files_without_a_benchmark(quick: Job, tmp_path: Path) -> None:
    report = build(dct_job(quick), tmp_path / "out")
    assert report.dense_export is not None and report.dct_bench is None
    assert (tmp_path / "out/model-dense.onnx").stat().st_size == report.dense_export.bytes


MANY = {"l1": {"ratio": 0.5, "include": ["*"] * 99}}


@pytest.mark.parametrize(
    ("before", "now", "removed", "added"),
    [
        (
            [{"l1": {"ratio": 0.5}}],
            [{"l1": {"ratio": 0.25}}],
            ["passes.l1.ratio: 0.5"],
            ["passes.l1.ratio: 0.25"],
        ),
        ([{"fold-bn": {"exclude": []}}, MANY], [MANY], ["passes.fold-bn.exclude: []"], []),
        ([{"a": {"x": 1}}], [{"a": {"x": 1, "y": {"z": None}}}], [], ["passes.a.y.z: null"]),
        (3, None, ["passes: 3"], ["passes: null"]),
        ([1, 2], [1, 2], [], []),
    ],
)
def test_what_is_another_in_a_resumed_run(
    before: Any, now: Any, removed: list[str], added: list[str]
) -> None:
    """Whole, and nothing that is the same."""
    assert folder._differing("passes", before, now) == (removed, added)


def test_resume_shows_the_difference_and_not_what_is_before_it(quick: Job, finished: Any) -> None:
    job = replace(quick, passes=[quick.passes[0], L1(ratio=0.25, min_channels=3)])
    with pytest.raises(RecipeError) as caught:
        build(job, finished[0], resume=True)
    assert re.search(r"passes: found l1\.\w+: .*, expected l1\.\w+: .* as in the", str(caught.value))
    assert "\n  + passes.l1.ratio: 0.25" in str(caught.value) and "fold-bn" not in str(caught.value)
    assert "..." not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "expected"), [(None, []), (18, []), (13, ["opset 13 in the file, 18 in the result"])]
)
def test_another_operator_set_than_the_files_is_said(told: int | None, expected: list[str]) -> None:
    traced = trace(torch.nn.Linear(2, 2), torch.randn(1, 2))
    program = Program(traced.module, traced.example_inputs, interface=Interface(opset=told))
    made = Export(path="model.onnx", bytes=1, opset=18, nodes=1, parity={}, cleanup=[])
    assert results.opset_remarks(program, made) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x = x[:, :, : int(x.shape[2] * 0.5)]", r"specialised to inputs of 3x8x8 by Net:\d+"),
        ("assert isinstance(x, torch.Tensor)", "captured by torch.export, since torch.fx could not follow"),
    ],
)
def test_how_a_network_was_traced_is_said_wherever_results_are(tmp_path: Path, line: str, said: str) -> None:
    file, saved = tmp_path / "asks.py", tmp_path / "program"
    file.write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 4, 1)\n    def forward(self, x):\n        x = self.conv(x)\n"
        f"        {line}\n        return x.mean((2, 3))\n"
    )
    source = load_source(f"{file}:Net", None, (1, 3, 8, 8))
    save(source.program, saved)
    for found in (source, load_source(str(saved))):
        assert any(re.search(said, remark) for remark in found.remarks)
