"""What a source says of a study's cells, and repetitions of cells."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from graphcomp.errors import RecipeError
from graphcomp.passes import PASSES
from graphcomp.study.grid import Study, expand, load_study, reading_of
from graphcomp.study.page import render_html, write_results
from graphcomp.study.reading import Reading
from graphcomp.study.repeats import collapsed, with_spreads
from graphcomp.study.run import Outcome
from graphcomp.study.table import findings, table
from tests.studying import MATRIX, cells, result, with_error

STUDY = """
recipe: {model: "models:x", data: "any:$where", passes: [{l1: {ratio: $ratio}}], seed: $seed}
settings: {where: here}
grid: {ratio: [0.25, 0.50], seed: [0, 1]}
repeats: [seed]
paper:
  source: somebody's table
  rows:
    - {ratio: 0.5, top1_before: 0.9, top1_change: -0.1, params_left: 0.3}
    - {ratio: 0.25, seed: 1, "accuracy[cat]": 0.4}
quick:
  settings: {where: there}
  recipe: {model: "models:y"}
  grid: {ratio: [0.25], seed: [0]}
"""


def read(tmp_path: Path, text: str = STUDY, **options: Any) -> Study:
    (tmp_path / "s.yaml").write_text(text)
    return load_study(tmp_path / "s.yaml", **options)


def test_settings_are_values_of_all_cells(tmp_path: Path) -> None:
    assert [c.job.recipe.data for c in expand(read(tmp_path), PASSES)] == ["any:here"] * 4


def test_data_of_the_command_line_take_the_place_of_a_setting(tmp_path: Path) -> None:
    study = read(tmp_path, data="any:given")
    assert {c.job.recipe.data for c in expand(study, PASSES)} == {"any:given"}


def test_quick_replaces_settings_fields_and_grid(tmp_path: Path) -> None:
    (cell,) = expand(read(tmp_path, quick=True), PASSES)
    assert (cell.job.model, cell.job.recipe.data, cell.labels) == (
        "models:y",
        "any:there",
        {"ratio": "0.25", "seed": "0"},
    )
    with pytest.raises(RecipeError, match="found no `quick`, expected one for --quick"):
        read(tmp_path, STUDY.partition("quick:")[0], quick=True)
    with pytest.raises(RecipeError, match=r"quick.settings: found wher, expected one of those .*where"):
        read(tmp_path, STUDY.replace("settings: {where: there}", "settings: {wher: there}"), quick=True)


def test_settings_of_the_command_line_come_last(tmp_path: Path) -> None:
    """After those of the file and of `quick`; one of no effect, or of nothing, is an error."""
    for quick in (False, True):
        study = read(tmp_path, quick=quick, settings={"where": "mine"})
        assert {c.job.recipe.data for c in expand(study, PASSES)} == {"any:mine"}
    with pytest.raises(RecipeError, match=r"settings: found wher, expected one of those .*where"):
        read(tmp_path, settings={"wher": "mine"})
    with pytest.raises(RecipeError, match=r"settings: found where, whose placeholder is replaced .data."):
        read(tmp_path, settings={"where": "mine"}, data="any:given")


def test_settings_stand_in_the_values_of_axes(tmp_path: Path) -> None:
    """What differs from cell to cell may have a part that is the same; labels stay what they are."""
    text = STUDY.replace("any:$where", "$data").replace("grid: {", "grid: {data: {here: 'any:$where'}, ", 1)
    text = text.replace("  grid: {", "  grid: {data: ['any:x'], ")
    for settings, data in (({}, "any:here"), ({"where": "mine"}, "any:mine")):
        found = expand(read(tmp_path, text, settings=settings), PASSES)
        assert {(c.labels["data"], c.job.recipe.data) for c in found} == {("here", data)}
    with pytest.raises(RecipeError, match=r"settings: found where, whose placeholder is replaced .quick."):
        read(tmp_path, text, quick=True, settings={"where": "mine"})
    with pytest.raises(RecipeError, match=r"found \$there in the value of an axis"):
        expand(read(tmp_path, text.replace("{here: 'any:$where'}", "['$there', '$where']")), PASSES)


def test_only_some_cells(tmp_path: Path) -> None:
    """With one of the labels on every axis that is named; the source may speak of the others."""
    study = read(tmp_path)
    found = expand(study, PASSES, only={"ratio": {"0.5"}})
    assert [cell.labels for cell in found] == [{"ratio": "0.5", "seed": s} for s in "01"]
    assert {"params_left", "top1_before", "top1_change"} == set(
        reading_of(study, found, whole=False).expected[found[0].name]
    )
    some = expand(study, PASSES, only={"ratio": {"0.5", "0.25"}, "seed": {"1"}})
    assert [cell.name for cell in some] == [c.name for c in expand(study, PASSES) if c.labels["seed"] == "1"]


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ({"speed": {"1"}}, "found no axis speed, expected one of ratio, seed"),
        ({"ratio": {"0.5", "0.7"}}, "found no cell with ratio 0.7, expected one of 0.25, 0.5"),
    ],
)
def test_no_such_cells(tmp_path: Path, only: dict[str, set[str]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        expand(read(tmp_path), PASSES, only=only)


def test_labels_that_no_cell_has_together(tmp_path: Path) -> None:
    study = read(tmp_path, re.sub("grid: (.*)", r"grid: [{ratio: [0.75], seed: [7]}, \1]", STUDY, count=1))
    with pytest.raises(RecipeError, match="found no cell with all of these labels"):
        expand(study, PASSES, only={"ratio": {"0.75"}, "seed": {"0"}})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("settings: {where: here}", "settings: {where: here, other: 1}", "a setting other that no \\$other"),
        ("settings: {where: here}", "settings: {}", "found \\$where without an axis"),
        (
            "settings: {where: here}",
            "settings: {where: here, ratio: 1}",
            "found ratio as axis and as setting",
        ),
    ],
)
def test_bad_settings(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        expand(read(tmp_path, STUDY.replace(old, new, 1)), PASSES)


def test_what_the_source_says(tmp_path: Path) -> None:
    """A row is about all cells with its labels; numbers are compared as labels are written."""
    study = read(tmp_path)
    made = expand(study, PASSES)
    reading = reading_of(study, made)
    assert (reading.source, reading.repeats) == ("somebody's table", ("seed",))
    half = {"top1_before": 0.9, "top1_change": -0.1, "params_left": 0.3}
    assert [reading.expected.get(cell.name) for cell in made] == [None, {"accuracy[cat]": 0.4}, half, half]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{ratio: 0.75, top1: 0.5}", "paper.rows.2: found no cell with ratio 0.75, expected one"),
        ("{ratio: 0.5}", "found no number, expected one at least"),
        ("{ratio: 0.5, topp1: 0.5}", "found topp1, expected an axis .ratio, seed. or a column"),
        ("{ratio: 0.5, seed: 1, params_left: 0.5}", "found params_left of cell .* a second time"),
    ],
)
def test_bad_rows_of_the_source(tmp_path: Path, row: str, message: str) -> None:
    text = STUDY.replace("quick:", f"    - {row}\nquick:", 1)
    study = read(tmp_path, text)
    with pytest.raises(RecipeError, match=message):
        reading_of(study, expand(study, PASSES))


def test_a_quick_study_has_not_all_that_the_source_has(tmp_path: Path) -> None:
    study = read(tmp_path, quick=True)
    made = expand(study, PASSES)
    assert reading_of(study, made, whole=False).expected == {}
    with pytest.raises(RecipeError, match=r"found no cell with ratio 0.5"):
        reading_of(study, made)


def test_repeats_are_axes(tmp_path: Path) -> None:
    study = read(tmp_path, STUDY.replace("repeats: [seed]", "repeats: [speed]"))
    with pytest.raises(RecipeError, match=r"repeats: found speed, expected an axis .ratio, seed."):
        reading_of(study, expand(study, PASSES))


# ---------------------------------------------------------------------- repetitions


def seeds(*top1: float) -> tuple[Any, Outcome]:
    made = cells(rate=[0.5], seed=list(range(len(top1))))
    left = {"a": 300, "b": 400}
    return made, Outcome({c.name: result(c, left, t) for c, t in zip(made, top1, strict=True)})


def test_mean_deviation_and_best() -> None:
    """By hand: 0.5, 0.6 and 0.7 have mean 0.6 and, with n - 1, deviation 0.1."""
    made, outcome = seeds(0.5, 0.7, 0.6)
    reading = Reading(repeats=("seed",))
    ((one, spread),) = collapsed(list(findings(made, outcome, reading).values()), ("seed",))
    assert spread is not None and spread.cells == 3
    assert (spread.mean, spread.deviation, spread.best) == pytest.approx((0.6, 0.1, 0.7))
    assert one.title == "rate 0.5" and one.result.confusion == [[3 * n for n in row] for row in MATRIX]
    assert one.score is not None
    assert (one.score.value, one.score.low, one.score.high) == pytest.approx((0.6, 0.5, 0.7))
    rows = with_spreads(table(made, outcome, reading), [spread])
    assert all((row["repeats"], row["mean"]) == (3, pytest.approx(0.6)) for row in rows)
    assert all((row["std"], row["best"]) == (pytest.approx(0.1), 0.7) for row in rows)
    assert [row["top1"] for row in rows] == [0.5, 0.7, 0.6]


def test_one_cell_has_no_deviation_and_errors_are_best_when_small() -> None:
    made, outcome = seeds(0.5)
    ((one, spread),) = collapsed(list(findings(made, outcome, Reading()).values()), ("seed",))
    assert spread is not None and spread.deviation is None and spread.mean == 0.5
    assert one.score is not None and math.isnan(one.score.low) and math.isnan(one.score.high)
    (row,) = with_spreads(table(made, outcome, Reading()), [spread])
    assert (row["repeats"], row["mean"], row["std"]) == (1, 0.5, None)
    page = render_html(made, outcome, Reading(repeats=("seed",)))
    assert '<td data-label="Deviation" class="n"></td>' in page
    values = cells(rate=[0.5], seed=[0, 1])
    errors = Outcome({c.name: with_error(c, e) for c, e in zip(values, (0.3, 0.1), strict=True)})
    ((_, spread),) = collapsed(list(findings(values, errors, Reading()).values()), ("seed",))
    assert spread is not None and spread.best == 0.1


def test_without_repetitions_every_cell_is_on_its_own() -> None:
    made, outcome = seeds(0.5, 0.7)
    found = list(findings(made, outcome, Reading()).values())
    assert collapsed(found, ()) == [(cell, None) for cell in found]
    assert all("mean" not in row for row in with_spreads(table(made, outcome, Reading()), []))


def test_cells_that_are_missing_do_not_count() -> None:
    made, outcome = seeds(0.5, 0.7)
    del outcome.results[made[0].name]
    reading = Reading(repeats=("seed",))
    ((_, spread),) = collapsed(list(findings(made, outcome, reading).values()), ("seed",))
    rows = with_spreads(table(made, outcome, reading), [spread])
    assert [row["repeats"] for row in rows] == [None, 1]


@pytest.mark.slow
def test_the_page_has_both(tmp_path: Path) -> None:
    made, outcome = seeds(0.5, 0.7)
    said = {cell.name: {"top1": 0.65, "hardest_class": "cat", "params": 1234} for cell in made}
    reading = Reading(("cat", "dog", "owl"), ("seed",), "somebody's <table>", said)
    page = render_html(made, outcome, reading)
    assert "somebody&#39;s &lt;table&gt;" in page
    bare = re.sub(r"<(\w+)[^>]*>", r"<\1>", page)
    assert "<td>top1</td><td>0.6000</td><td>0.6500</td>" in bare
    assert "<td>hardest_class</td><td>owl</td><td>cat</td>" in bare
    assert "Repetitions" in page and "0.1414" in page
    write_results(made, outcome, tmp_path, reading)
    head = (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    assert {"paper[top1]", "paper[hardest_class]", "mean", "std", "best", "params_left"} <= set(head)
