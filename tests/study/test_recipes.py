"""The experiments of the sources: as many cells as their tables have, and each runs in a quick size."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphcomp.recipes
from graphcomp.base import write_record
from graphcomp.compiler import load_source, results
from graphcomp.measure.cost import layer_rows
from graphcomp.passes import CC, PASSES, Finetune
from graphcomp.records import Export
from graphcomp.study import grid, page, run
from graphcomp.study.axes import Progression
from graphcomp.study.grid import expand, load_study, reading_of
from graphcomp.study.page import write_results
from graphcomp.study.run import finished, prepare, run_study

FOLDER = Path(graphcomp.recipes.__file__).parent
DOCS = Path(__file__).parents[2] / "docs/sources.md"
EXPORT = Export(path="model.onnx", bytes=1, opset=18, nodes=1, parity={}, cleanup=[])
OUT = Path("out")

CELLS = {
    "pfa-simple-cnn-training": 2 * 10,
    "pfa-full-networks": 4,
    "pfa-figure1": 2 * 9 * 2 * 10,
    "pfa-figure1-random": 2 * 9 * 2 * 2,  # of the 300 draws two, here
    **{f"pfa-table{n}": 9 for n in (1, 2, 3, 4)},
    "pfa-table5-6": 8 * 3,
    "pfa-table7-8": 8 * 3,
    "pfa-figure4": 6 * 4,
    "cc-resnet56": 66,
    "dct-resnet50-figure2": 23 * 2,
    "dct-mobilenet-v2-figure2": 14 * 2,
    "dct-resnet50-table1": 2 * 5 * 2,
    "dct-resnet50-table2": 6,
    "apoz-resnet110": 3,
    "apoz-preact-resnet164": 3,
    "apoz-pose-resnet50": 3,
    "play-and-prune-vgg16": 3,
    "play-and-prune-batches": 2,
}
SAID = {
    "pfa-simple-cnn-training": 0, "pfa-full-networks": 4, "pfa-figure1": 0, "pfa-figure1-random": 0,
    **{f"pfa-table{n}": 9 for n in (1, 2, 3, 4)}, "pfa-table5-6": 24, "pfa-table7-8": 24, "pfa-figure4": 6,
    "cc-resnet56": 23, "dct-resnet50-figure2": 6, "dct-mobilenet-v2-figure2": 5, "dct-resnet50-table1": 20,
    "dct-resnet50-table2": 6, "apoz-resnet110": 1, "apoz-preact-resnet164": 1, "apoz-pose-resnet50": 2,
    "play-and-prune-vgg16": 2, "play-and-prune-batches": 2,
}  # fmt: skip
"""How many cells the source has numbers for."""
COLUMNS = {
    "pfa-figure1": {"mean", "std", "best", "params_left"},
    "cc-resnet56": {"class_variance", "hardest_class", "mislabel[plane]", "accuracy[truck]"},
    "dct-resnet50-table2": {"params_order", "params_state", "top5", "top5_before"},
    "pfa-table5-6": {"top5_before", "top5_change"},
    "pfa-table7-8": {"top5_before", "top5_change"},
    "apoz-resnet110": {"top1[motion-blur 0.2]", "top1_before[occlusion 0.2]", "top1[brightness 0.5]"},
    "apoz-pose-resnet50": {"mae", "mae_before", "mae_change", "mae[brightness 0.5]"},
    "play-and-prune-batches": {"speedup_batch1", "speedup_batch2_low"},
}
"""What the source's own columns are called here."""
DRAWN = ("pfa-figure1", "cc-resnet56")


def test_every_recipe_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == CELLS.keys() == SAID.keys()


@pytest.mark.parametrize("name", CELLS)
def test_the_document_has_its_command(name: str) -> None:
    assert f"recipes/{name}.yaml" in DOCS.read_text()
    head = re.match(r"(?:#.*\n)+", (FOLDER / f"{name}.yaml").read_text())
    assert head is not None and f"#   graphcomp study recipes/{name}.yaml " in head[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_as_many_cells_as_the_source_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In full size, where nothing is loaded that need not be; the source's numbers find their cells."""
    monkeypatch.setattr(grid, "_samples", lambda job: {})
    study = load_study(FOLDER / f"{name}.yaml")
    if name == "pfa-figure1-random":
        for table in study.grid:
            assert isinstance(table["draw"], Progression) and table["draw"].to == 300
            table["draw"] = [1, 2]
    cells = expand(study, PASSES)
    assert len(cells) == CELLS[name]
    assert len(reading_of(study, cells).expected) == SAID[name]


@pytest.mark.parametrize("name", [name for name in CELLS if re.match("pfa-(table|figure)", name)])
def test_counts_need_no_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths follow from the method alone: `--set training=[]` leaves nothing behind it."""
    monkeypatch.setattr(grid, "_samples", lambda job: {})
    cells = expand(load_study(FOLDER / f"{name}.yaml", quick=True, settings={"training": []}), PASSES)
    assert not any(isinstance(pass_, Finetune) for cell in cells for pass_ in cell.job.passes)


def test_every_rate_of_the_sweep_can_be_met() -> None:
    """By what compressible layers may give up: the authors' own ceiling ends below the study's last rate."""
    study = load_study(FOLDER / "cc-resnet56.yaml", data="random")
    (last,) = expand(study, PASSES, only={"rate": {"0.95"}, "recovery": {"raw"}})
    (pass_,) = last.job.passes
    assert isinstance(pass_, CC)
    rows = layer_rows(load_source("models:resnet56").program)
    inside = sum(row.macs for row in rows if row.name not in ("conv1", "linear"))
    reached = pass_.ceiling * inside / sum(row.macs for row in rows)
    assert pass_.rate <= reached < 0.96 and 0.95 * reached / pass_.ceiling < 0.95


@pytest.fixture
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    rng = np.random.RandomState(0)
    images, angles = (rng.randint(0, 256, (64, 32, 32, 3), np.uint8), rng.randn(64, 3).astype(np.float32))
    np.savez("pose.npz", x_train=images, y_train=angles, x_test=images[:24], y_test=angles[:24])
    yield


@pytest.mark.slow
@pytest.mark.usefixtures("_in_a_folder_of_its_own")
@pytest.mark.parametrize("name", CELLS)
def test_quick(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, resumes, and leaves what the whole study leaves.

    Files are exported where they are timed, cells have no pages of their own, and few studies have plots:
    what takes long is the same for all.
    """
    text = FOLDER / f"{name}.yaml"
    study = load_study(text, quick=True)
    if study.recipe.get("bench", False) is False:
        monkeypatch.setattr(results, "_export", lambda *_: EXPORT)
    monkeypatch.setattr(
        results, "write_report", lambda report, place: write_record(place / "report.json", report)
    )
    if name not in DRAWN:
        monkeypatch.setattr(page, "draw", lambda *_: ([], None))
    cells = expand(study, PASSES)
    prepare(OUT, text.read_text(), resume=False)
    outcome = run_study(cells, OUT)
    assert outcome.failures == {}
    reading = reading_of(study, cells, whole=False)
    write_results(cells, outcome, OUT, reading)
    with (OUT / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == [cell.name for cell in cells]
    assert all(row["status"] == "done" for row in rows)
    wanted = {*study.axes, "params", "macs", *COLUMNS.get(name, ())}
    assert wanted <= rows[0].keys()
    assert study.axes == load_study(text).axes  # the same columns as in full size
    html = (OUT / "study.html").read_text()
    assert ("Beside the source" in html) == bool(reading.expected) and "</html>" in html
    assert ("<svg" in html) == (name in DRAWN)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(run, "build", again)
    prepare(OUT, text.read_text(), resume=True)
    assert run_study(cells, OUT).results == outcome.results == finished(cells, OUT)
