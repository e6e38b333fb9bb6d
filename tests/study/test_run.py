"""Cells that run, fail, stop and go on. Models are not exported here: see `test_compiler`."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from graphcomp.base.stopping import KEY
from graphcomp.compiler import results
from graphcomp.compiler.compiler import build
from graphcomp.errors import LoadError, OutputError, RecipeError
from graphcomp.ir import load
from graphcomp.measure import gradients
from graphcomp.passes import PASSES
from graphcomp.records import Export
from graphcomp.report import read_report
from graphcomp.study import run
from graphcomp.study.check import check_cells
from graphcomp.study.grid import Cell, Study, expand
from graphcomp.study.page import write_results
from graphcomp.study.reading import Reading
from graphcomp.study.run import CellResult, Outcome, finished, in_order, prepare, run_study, workers_for
from graphcomp.study.table import table
from tests.learnable import arrays
from tests.tiny import SPEC

pytestmark = pytest.mark.slow
EXPORT = Export(path="model.onnx", bytes=1, opset=18, nodes=1, parity={}, cleanup=[])
OUT = Path("out")
WRITES = results._export


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "_export", lambda *_: EXPORT)
    (x, y), (u, v) = arrays(96, 0), arrays(40, 1)
    np.savez("d.npz", x_train=x, y_train=y, x_test=u, y_test=v)
    yield


def cells(passes: Any, grid: dict[str, Any], **fields: Any) -> list[Cell]:
    recipe = {"model": SPEC, "data": "npz:d.npz", "target": "cpu-avx2", "passes": passes, **fields}
    return expand(Study(recipe=recipe, grid=[grid], input_shape=(1, 3, 8, 8)), PASSES)


def removals(*ratios: float) -> list[Cell]:
    return cells([{"l1": {"ratio": "$ratio", "multiple": 1}}], {"ratio": list(ratios)})


def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The runs that are made, and whether they go on with one that was there."""
    runs: list[tuple[str, bool]] = []

    def counting(job: Any, out: Path, **options: Any) -> Any:
        runs.append((out.name, options["resume"]))
        return build(job, out, **options)

    monkeypatch.setattr(run, "build", counting)
    return runs


# ---------------------------------------------------------------------- what comes out


def test_results() -> None:
    """Each cell is a run of its own, with its confusion matrix; in the order of the grid."""
    found = removals(0.25, 0.5)
    ended: list[Any] = []
    outcome = run_study(found, OUT, ended=lambda *args: ended.append(args))
    results = in_order(found, outcome.results)
    assert ended == [(found[1].name, None), (found[0].name, None)]  # the largest first
    assert [r.labels for r in results] == [{"ratio": "0.25"}, {"ratio": "0.5"}]
    assert results[0].baseline.macs > results[0].final.macs > results[1].final.macs
    for result in results:
        matrix, accuracy = np.array(result.confusion), result.final.score
        assert matrix.sum(1).tolist() == [10] * 4 and accuracy is not None
        assert matrix.trace() / matrix.sum() == accuracy.value
        written = (OUT / "cells" / f"{result.name}.json").read_text()
        assert CellResult.model_validate_json(written) == result
        assert json.loads((OUT / "cells" / result.name / "report.json").read_text())["seed"] == 0


def test_classes_and_labels() -> None:
    """Of the recipe's classes only; none at all without labels."""
    grid = {"ratio": [0.5]}
    (some,) = cells([{"l1": {"ratio": "$ratio"}}], grid, classes=[0, 2])
    (none,) = cells([{"l1": {"ratio": "$ratio"}}], grid, data="random?limit=8")
    outcome = run_study([some, none], OUT)
    assert np.array(outcome.results[some.name].confusion).sum(1).tolist() == [10, 10]
    assert outcome.results[none.name].confusion is None


def test_values() -> None:
    """Labels that are values: from the file to the table and the page, errors in place of accuracies."""
    file = dict(np.load("d.npz"))
    file |= {name: file[f"x_{name[2:]}"].mean((2, 3)) @ np.ones((3, 4)) for name in ("y_train", "y_test")}
    np.savez("values.npz", **file)
    training = {"finetune": {"epochs": 2, "batch": 24, "lr": 0.01, "precision": "float32"}}
    grid = {"recovery": {"raw": [], "tuned": [training]}}
    passes = [{"l1": {"ratio": 0.5, "multiple": 1}}, "$recovery"]
    found = cells(passes, grid, data="npz:values.npz")
    outcome = run_study(found, OUT)
    raw, tuned = in_order(found, outcome.results)
    assert raw.confusion is None
    assert raw.final.score is not None and tuned.final.score is not None
    assert raw.final.score.measure == tuned.final.score.measure == "error"
    assert tuned.final.score.value < raw.final.score.value
    write_results(found, outcome, OUT, Reading())
    with (OUT / "results.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [float(row["mae"]) for row in rows] == [r.final.score.value for r in (raw, tuned) if r.final.score]
    assert "top1" not in rows[0] and rows[0]["mae_before"] == rows[1]["mae_before"]
    page = (OUT / "study.html").read_text()
    assert "Mean absolute error against recovery" in page and "top-1" not in page
    assert f"{raw.final.score.value:.4g} [" in page


def test_one_analysis_for_all_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cc's gradients are measured once; a region's layers are as in the whole network's run (T1.14)."""
    measured: list[int] = []
    measure = gradients._measure

    def counting(*args: Any) -> Any:
        measured.append(1)
        return measure(*args)

    monkeypatch.setattr(gradients, "_measure", counting)
    cc = {"rate": 0.5, "only": "$where", "multiple": 1}
    found = cells(
        [{"cc": {**cc, "allow_nothing": True}}], {"where": {"strides": [1], "blocks": ["inner", "outer"]}}
    )
    none, inner, outer, both = in_order(found, run_study(found, OUT).results)
    assert len(measured) == 1
    assert none.final.layers == none.baseline.layers
    rates = [layer.macs for layer in both.final.layers if layer.name.startswith("outer")]
    assert [layer.macs for layer in outer.final.layers if layer.name.startswith("outer")] == rates
    assert inner.final.macs < inner.baseline.macs


# ---------------------------------------------------------------------- what can go wrong


def test_a_failure_is_one_cells_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, its traceback kept; later it runs again, and the others do not."""
    found = cells(
        [{"l1": {"ratio": "$ratio", "include": "$where"}}], {"ratio": [0.5], "where": ["inner", "absent"]}
    )
    outcome = run_study(found, OUT)
    assert list(outcome.results) == [found[0].name]
    (name,) = outcome.failures
    assert name == found[1].name and "'absent'" in outcome.failures[name].message
    error = OUT / "cells" / f"{name}.error.txt"
    assert "Traceback" in error.read_text()

    def mended(cell: Cell, out: Path, tell: Any) -> CellResult:
        assert cell is found[1]
        error.unlink()
        return outcome.results[found[0].name]

    monkeypatch.setattr(run, "run_cell", mended)
    again = run_study(found, OUT)
    assert set(again.results) == {cell.name for cell in found} and not again.failures


def test_interrupted_between_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    found, runs = removals(0.25, 0.5), built(monkeypatch)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(found, OUT, ended=stop)
    outcome = run_study(found, OUT)
    assert runs == [(found[1].name, False), (found[0].name, False)]
    assert len(outcome.results) == 2


def test_interrupted_in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finished passes are kept. One that was killed before it could say anything begins anew."""
    (cell,), runs = removals(0.5), built(monkeypatch)
    place = OUT / "cells" / cell.name
    (place / "checkpoints").mkdir(parents=True)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(results, "_export", stop)
        run_study([cell], OUT)
    assert finished([cell], OUT) == {}
    checkpoint = place / "checkpoints" / "01-l1.json"
    before = checkpoint.stat().st_mtime_ns
    assert list(run_study([cell], OUT).results) == [cell.name]
    assert runs == [(cell.name, False), (cell.name, True)]
    assert checkpoint.stat().st_mtime_ns == before


def test_stopped_in_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pool: the cell's process saves its state, and not one step of it is taken again."""
    exact = {"precision": "float32", "layout": "contiguous"}
    training = {"epochs": 30, "batch": "$batch", "lr": 0.01, **exact}
    (cell,) = found = cells([{"finetune": training}], {"batch": [4]})
    monkeypatch.setattr(run, "cores", lambda: 1)

    def stop(name: str, message: str, fraction: float) -> None:
        if re.search(r"epoch \[[1-9]\d*/30]", message):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(found, OUT, workers=2, told=stop)
    assert finished(found, OUT) == {}
    (file,) = (OUT / "cells" / cell.name / "checkpoints" / "running").rglob("*.safetensors")
    with safe_open(file, framework="pt") as state:
        facts = json.loads(state.metadata()[KEY])["facts"]
    told: list[int] = []

    def listen(name: str, message: str, fraction: float) -> None:
        told.extend(int(n) for n in re.findall(r"epoch \[(\d+)/", message))

    again = run_study(found, OUT, told=listen)
    whole = run_study(found, Path("whole"))
    (a,), (b,) = again.results.values(), whole.results.values()
    assert a.model_dump(exclude={"seconds"}) == b.model_dump(exclude={"seconds"})
    programs = [load(out / "cells" / cell.name / "program") for out in (OUT, Path("whole"))]
    assert programs[0].fingerprint() == programs[1].fingerprint()
    record, other = (
        json.loads((out / "cells" / cell.name / "report.json").read_text())["steps"][0]["training"]
        for out in (OUT, Path("whole"))
    )
    steps = other["epochs"][-1]["steps"]
    assert 0 < facts["at"] < steps
    # Epochs carry the time that they took: those before the stop are the same ones, and no others.
    assert record["epochs"][: len(facts["rows"])] == facts["rows"]
    assert (record["resumed"], record["epochs"][-1]["steps"]) == (1, steps)
    assert told and min(told) >= len(facts["rows"])


def test_another_recipe_is_another_cell() -> None:
    first, second = removals(0.5), cells([{"l1": {"ratio": "$ratio", "join": "pad"}}], {"ratio": [0.5]})
    run_study(first, OUT)
    assert finished(second, OUT) == {} and list(finished(first, OUT)) == [first[0].name]


def test_other_samples_are_another_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their content, of those that the cell sees: a finished cell knows nothing of other ones."""

    def asked() -> list[Cell]:
        return [*removals(0.5), *cells([{"l1": {"ratio": "$ratio"}}], {"ratio": [0.5]}, classes=[0, 2])]

    first, file = asked(), dict(np.load("d.npz"))
    before = run_study(first, OUT).results
    runs = built(monkeypatch)
    np.savez("d.npz", **file)  # written anew, and the same
    assert asked() == first and run_study(asked(), OUT).results == before and not runs
    left = np.setdiff1d(np.arange(40), np.flatnonzero(file["y_test"] == 1)[:5])  # five of class 1 go
    np.savez("d.npz", **{**file, "x_test": file["x_test"][left], "y_test": file["y_test"][left]})
    changed, same = asked()
    assert changed.name != first[0].name and same == first[1]
    after = run_study([changed, same], OUT).results
    assert runs == [(changed.name, False)]
    assert np.array(after[changed.name].confusion).sum(1).tolist() == [10, 5, 10, 10]


def test_samples_that_cannot_be_read_are_the_cells_own_failure() -> None:
    (good,), (bad,) = removals(0.5), cells([{"l1": {"ratio": "$ratio"}}], {"ratio": [0.5]}, data="npz:e.npz")
    outcome = run_study([good, bad], OUT)
    assert list(outcome.results) == [good.name] and "e.npz" in outcome.failures[bad.name].message


def test_a_damaged_result() -> None:
    (cell,) = removals(0.5)
    (OUT / "cells").mkdir(parents=True)
    (OUT / "cells" / f"{cell.name}.json").write_text('{"name": 1}')
    with pytest.raises(LoadError, match=r"(?s)json: .*; expected a cell's result; delete the file"):
        run_study([cell], OUT)


# ---------------------------------------------------------------------- before it starts


def test_prepare() -> None:
    prepare(OUT, "a: 1", resume=False)
    assert (OUT / "study.yaml").read_text() == "a: 1"
    prepare(OUT, "a: 2", resume=True)
    assert (OUT / "study.yaml").read_text() == "a: 2"
    with pytest.raises(OutputError, match=r"out: found files, .*; use --resume"):
        prepare(OUT, "a: 3", resume=False)
    with pytest.raises(OutputError, match=r"found files, .*; choose another -o"):
        prepare(Path(), "a: 3", resume=True)
    with pytest.raises(OutputError, match="found a file, expected a directory"):
        prepare(Path("d.npz"), "a: 3", resume=True)


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the cores, never more than cells; where time is measured, one."""
    monkeypatch.setattr(run, "cores", lambda: 8)
    found = removals(0.1, 0.2, 0.3, 0.4, 0.5)
    assert [workers_for(found, n) for n in (None, 2, 99)] == [4, 2, 5]
    timed = cells(["l1{ratio=$ratio}"], {"ratio": [0.5, 0.6]}, bench={"runs": 5})
    assert [workers_for(timed, n) for n in (None, 1)] == [1, 1]
    with pytest.raises(RecipeError, match="workers: found 2 with `bench` in the recipe, expected 1"):
        workers_for(timed, 2)


def test_timed_files_are_named_from_the_study_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is moved; a run's own from its directory on."""
    monkeypatch.setattr(results, "_export", WRITES)
    options = {"runs": 2, "seconds": 0.01, "batches": [1]}
    (cell,) = cells(["l1{ratio=$ratio}"], {"ratio": [0.5]}, bench=options)
    made = run_study([cell], OUT).results[cell.name].bench
    assert made is not None
    assert [f.path for f in (made.base, made.new)] == [
        f"cells/{cell.name}/{file}" for file in ("baseline.onnx", "model.onnx")
    ]
    assert all((OUT / f.path).exists() for f in (made.base, made.new))
    alone = read_report(OUT / "cells" / cell.name / "report.json").bench
    assert alone is not None and (alone.base.path, alone.new.path) == ("baseline.onnx", "model.onnx")


def test_threads_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of the cores; what runs alone has all of them."""
    seen: list[tuple[int, int]] = []

    def run_tasks(tasks: Any, engine: str, workers: int, threads: int, told: Any) -> Iterator[Any]:
        seen.append((len(tasks), threads))
        yield from ()

    monkeypatch.setattr(run, "cores", lambda: 8)
    monkeypatch.setattr(run, "run_tasks", run_tasks)
    assert run_study(removals(0.1, 0.2, 0.3, 0.4, 0.5), OUT, workers=3) == Outcome()
    assert seen == [(1, 8), (4, 2)]


# ---------------------------------------------------------------------- saved programs, in other processes


def test_saved_programs_are_what_the_table_says() -> None:
    """Also of some classes by name; a table that says something else is found."""
    found = removals(0.25, 0.5)
    run_study(found, OUT)
    assert check_cells(found, OUT) == {cell.name: None for cell in found}
    record = OUT / "cells" / f"{found[0].name}.json"
    wrong = CellResult.model_validate_json(record.read_text())
    assert wrong.confusion is not None
    wrong.confusion[0].reverse()
    record.write_text(wrong.model_dump_json())
    (OUT / "cells" / found[1].name / "program" / "program.json").write_text("{}")
    said = check_cells(found, OUT)
    assert "another confusion matrix" in str(said[found[0].name])
    assert "program.json" in str(said[found[1].name])


def test_only_finished_cells_are_checked() -> None:
    found = removals(0.25, 0.5)
    assert check_cells(found, OUT) == {}


def test_classes_by_name() -> None:
    """As the data call them: so do results and the table, and the check finds them again."""
    x, y = arrays(64, 0)
    pixels = np.clip(127 + 60 * x, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for i, (image, label) in enumerate(zip(pixels, y, strict=True)):
        folder = Path("animals") / ("ant", "bee", "cat", "dog")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    passes = [{"l1": {"ratio": "$ratio", "multiple": 1}}]
    found = cells(passes, {"ratio": [0.5]}, data="imagefolder:animals", classes=["dog", "bee"])
    outcome = run_study(found, OUT)
    (made,) = outcome.results.values()
    assert made.class_names == ["bee", "dog"] and np.shape(made.confusion) == (2, 2)
    assert made.data.endswith("classes bee (1), dog (3) only")
    assert check_cells(found, OUT) == {found[0].name: None}
    (row,) = table(found, outcome, Reading())
    assert {"accuracy[bee]", "mislabel[dog]"} <= row.keys() and row["hardest_class"] in ("bee", "dog")
    wrong = cells(passes, {"ratio": [0.5]}, data="imagefolder:animals", classes=["dog", "bea"])
    (failure,) = run_study(wrong, Path("other")).failures.values()
    assert "found the name 'bea', expected one of the 4 names" in failure.message
