"""Cells that run, fail, stop and go on. Models are not exported here: see `test_compiler`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphcomp import compiler, gradients, study_run
from graphcomp.compiler import build
from graphcomp.errors import LoadError, OutputError, RecipeError
from graphcomp.passes import PASSES
from graphcomp.records import Export
from graphcomp.study import Cell, Study, expand
from graphcomp.study_report import write_results
from graphcomp.study_run import CellResult, Outcome, finished, in_order, prepare, run_study, workers_for
from tests.learnable import arrays
from tests.tiny import SPEC, seeded

__all__ = ["seeded"]
EXPORT = Export(path="model.onnx", bytes=1, opset=18, nodes=1, parity={}, cleanup=[])
OUT = Path("out")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiler, "_export", lambda *_: EXPORT)
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

    monkeypatch.setattr(study_run, "build", counting)
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
        matrix, accuracy = np.array(result.confusion), result.final.accuracy
        assert matrix.sum(1).tolist() == [10] * 4 and accuracy is not None
        assert matrix.trace() / matrix.sum() == accuracy.top1
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
    assert raw.confusion is None and raw.final.accuracy is None
    assert raw.final.error is not None and tuned.final.error is not None
    assert tuned.final.error.mae < raw.final.error.mae
    write_results(found, outcome, OUT, None)
    with (OUT / "results.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [float(row["mae"]) for row in rows] == [r.final.error.mae for r in (raw, tuned) if r.final.error]
    assert "top1" not in rows[0] and rows[0]["mae_before"] == rows[1]["mae_before"]
    page = (OUT / "study.html").read_text()
    assert "Mean absolute error against recovery" in page and "top-1" not in page
    assert f"{raw.final.error.mae:.4g} [" in page


def test_one_analysis_for_all_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cc's gradients are measured once; a region's layers are as in the whole network's run (T1.14)."""
    measured: list[int] = []
    measure = gradients._measure

    def counting(*args: Any) -> Any:
        measured.append(1)
        return measure(*args)

    monkeypatch.setattr(gradients, "_measure", counting)
    cc = {"rate": 0.5, "only": "$where", "multiple": 1, "allow_nothing": True}
    found = cells([{"cc": cc}], {"where": {"strides": [1], "blocks": ["inner", "outer"]}})
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

    monkeypatch.setattr(study_run, "run_cell", mended)
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
        patch.setattr(compiler, "_export", stop)
        run_study([cell], OUT)
    assert finished([cell], OUT) == {}
    checkpoint = place / "checkpoints" / "01-l1.json"
    before = checkpoint.stat().st_mtime_ns
    assert list(run_study([cell], OUT).results) == [cell.name]
    assert runs == [(cell.name, False), (cell.name, True)]
    assert checkpoint.stat().st_mtime_ns == before


def test_another_recipe_is_another_cell() -> None:
    first, second = removals(0.5), cells([{"l1": {"ratio": "$ratio", "join": "pad"}}], {"ratio": [0.5]})
    run_study(first, OUT)
    assert finished(second, OUT) == {} and list(finished(first, OUT)) == [first[0].name]


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
    monkeypatch.setattr(study_run, "cores", lambda: 8)
    found = removals(0.1, 0.2, 0.3, 0.4, 0.5)
    assert [workers_for(found, n) for n in (None, 2, 99)] == [4, 2, 5]
    timed = cells(["l1{ratio=$ratio}"], {"ratio": [0.5, 0.6]}, bench={"runs": 5})
    assert [workers_for(timed, n) for n in (None, 1)] == [1, 1]
    with pytest.raises(RecipeError, match="workers: found 2 with `bench` in the recipe, expected 1"):
        workers_for(timed, 2)


def test_threads_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of the cores; what runs alone has all of them."""
    seen: list[tuple[int, int]] = []

    def run_tasks(tasks: Any, engine: str, workers: int, threads: int, told: Any) -> Iterator[Any]:
        seen.append((len(tasks), threads))
        yield from ()

    monkeypatch.setattr(study_run, "cores", lambda: 8)
    monkeypatch.setattr(study_run, "run_tasks", run_tasks)
    assert run_study(removals(0.1, 0.2, 0.3, 0.4, 0.5), OUT, workers=3) == Outcome()
    assert seen == [(1, 8), (4, 2)]
