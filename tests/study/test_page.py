"""The page and the files of a study."""

import csv
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from graphcomp.base.workers import Failure
from graphcomp.study.page import render_html, shade, write_results
from graphcomp.study.reading import Reading
from graphcomp.study.run import Outcome
from tests.report.test_report import bench, timing
from tests.studying import NAMES, cells, result, with_error


@pytest.fixture(scope="module")
def page() -> str:
    found = cells(rate=[0, 0.5], recovery={"raw": 0, "tuned": 1})
    macs = [{"a": 600, "b": 400}] * 2 + [{"a.0": 200, "a.1": 100, "b": 400}]
    results = [result(cell, after) for cell, after in zip(found, macs, strict=False)]
    results[2] = results[2].model_copy(
        update={"bench": bench(timing(1, 1.1, 1.5, 1.9)), "warnings": ["cache: it is <full>"]}
    )
    outcome = Outcome({r.name: r for r in results}, {found[3].name: Failure("l1: found <b>, expected b")})
    return render_html(found, outcome, Reading(NAMES))


@pytest.mark.slow
def test_one_file_without_scripts(page: str) -> None:
    assert "<script" not in page and not re.search(r'(src|href)="(?!#)', page)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert targets and set(targets) <= set(ids)


def test_what_it_says(page: str) -> None:
    """Counts, the table, layers, classes with their most common mistake, and matrices."""
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for said in (
        "3 of 4 cells, 1 failed",
        "1 cell failed.",
        "70 700 30.00 70.00 % [60.4, 78.1]",
        "1.50x [1.10, 1.90]",
        "rate 0.5, recovery raw 50.0 0.0",
        "rate 0, recovery raw 0.0467 owl cat 80.0 dog 90.0 cat 40.0 cat",
        "cat 8 2 0 dog 1 9 0 owl 3 3 4",
    ):
        assert said in text, said


@pytest.mark.slow
def test_errors_of_values() -> None:
    """In place of accuracy, or beside it where both were measured."""

    def shown(*cells_and_results: Any) -> str:
        results = {r.name: r for _, r in cells_and_results}
        page = render_html([cell for cell, _ in cells_and_results], Outcome(results), Reading())
        return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))

    first, second = cells(rate=[0.5, 1])
    values, classes = with_error(first, 0.25), result(second, {"a": 300, "b": 400})
    only = shown((first, values))
    assert "MACs gone, % Mean absolute error Against the original Seconds" in only
    assert "0.5 70 700 30.00 0.25 [0.24, 0.26] mean error 25.0 % larger 1.5" in only
    assert "Accuracy" not in only and "its labels are values" in only
    assert "Confusion" not in only
    both = shown((second, classes), (first, values))
    assert "MACs gone, % Accuracy (top-1) Mean absolute error Against the original" in both
    assert "70.00 % [60.4, 78.1] not measured 20.0 points less accurate 1.5" in both
    assert "not measured 0.25 [0.24, 0.26] mean error 25.0 % larger 1.5" in both
    assert "Confusion matrices" in both


def test_escaped(page: str) -> None:
    assert "found &lt;b&gt;, expected b" in page and "it is &lt;full&gt;" in page


def test_many_classes() -> None:
    """No tables of hundreds of columns: the largest mistakes, in words."""
    (cell,) = cells(rate=[0.5])
    matrix = [[10 * (i == j) + (i == 3) * (j == 7) * 6 for j in range(30)] for i in range(30)]
    page = render_html(
        [cell], Outcome({cell.name: result(cell, {"a": 1, "b": 1}, confusion=matrix)}), Reading()
    )
    assert "<li>3 taken for 7: 6</li>" in page and 'class="matrix"' not in page


def test_nothing_to_show() -> None:
    """Without accuracy, without layers that changed, without any result."""
    (cell,) = cells(rate=[0.5])
    page = render_html([cell], Outcome({cell.name: result(cell, {"a": 600, "b": 400}, None)}), Reading())
    for said in ("not measured", "There is nothing to draw", "No cell has changed", "no labelled evaluation"):
        assert said in page
    assert "0 of 1 cells, 1 not run" in render_html([cell], Outcome(), Reading())


def test_shade() -> None:
    """The share of the row, blue where it is right; text stays legible."""
    assert shade(3, [3, 1], True) == "background: rgba(0, 114, 178, 0.750); color: #fff"
    assert shade(1, [3, 1], False) == "background: rgba(213, 94, 0, 0.250); color: var(--ink)"
    assert "0.000" in shade(0, [0, 0], False)


@pytest.mark.slow
def test_files(tmp_path: Path) -> None:
    (cell,) = cells(rate=[0.5])
    write_results([cell], Outcome({cell.name: result(cell, {"a": 1, "b": 1})}), tmp_path, Reading(NAMES))
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["cell"] for row in csv.DictReader(file)] == [cell.name]
    assert (tmp_path / "study.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "results.parquet").exists() == (find_spec("pyarrow") is not None)


@pytest.mark.slow
def test_orders_have_a_column_where_there_are_some() -> None:
    (cell,) = cells(rate=[0.5])
    made = result(cell, {"a": 1, "b": 1})
    plain = render_html([cell], Outcome({cell.name: made}), Reading())
    ordered = made.model_copy(update={"final": made.final.model_copy(update={"params_order": 12_345})})
    page = render_html([cell], Outcome({cell.name: ordered}), Reading())
    assert "Length of orders" not in plain and "Length of orders" in page and "12,345" in page
