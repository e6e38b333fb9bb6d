"""What a study says about classes and layers, and its table."""

import csv
import io
from importlib.util import find_spec
from pathlib import Path

import pytest

from graphcomp.base.workers import Failure
from graphcomp.study.reading import Reading
from graphcomp.study.run import Outcome
from graphcomp.study.table import Findings, as_csv, layer_rates, table, write_parquet
from tests.report.test_report import bench, timing
from tests.studying import MATRIX, NAMES, cells, result, snapshot, with_error


def test_layer_rates() -> None:
    """Factors count for the layer that they were; one that is gone has lost everything."""
    before = snapshot({"stage.conv": 100, "stage.conv2": 50, "gone": 30, "same": 10})
    after = snapshot({"stage.conv.0": 20, "stage.conv.1": 5, "stage.conv2": 40, "same": 10, "new": 7})
    assert layer_rates(before, after) == pytest.approx(
        {"stage.conv": 0.75, "stage.conv2": 0.2, "gone": 1.0, "same": 0.0}
    )


def test_layer_rates_of_several_calls() -> None:
    """Rows of one name are one layer."""
    before = snapshot({"a": 100}).layers
    twice = snapshot({}).model_copy(update={"layers": before * 2})
    assert layer_rates(twice, snapshot({"a": 50})) == {"a": 0.75}


def test_findings() -> None:
    (cell,) = cells(rate=[0.5])
    found = Findings(result(cell, {"a": 300, "b": 400}), NAMES)
    assert (found.title, found.layers) == ("rate 0.5", {"a": 0.5, "b": 0.0})
    assert found.rate == pytest.approx(0.3)
    assert found.classes is not None and found.class_name(found.classes.hardest) == "owl"
    assert Findings(found.result, NAMES[:1]).class_name(2) == "2"
    assert found.class_name(None) is None


def test_table() -> None:
    """One row a cell in the grid's order, whatever became of it; numbers in full."""
    done, failed, missing = cells(rate=[0.25, 0.5, 0.75])
    timed = result(done, {"a": 300, "b": 400}, bench=bench(timing(8, 1.1, 1.5, 1.9)))
    outcome = Outcome({done.name: timed}, {failed.name: Failure("l1: found, expected")})
    rows = table([done, failed, missing], outcome, Reading(NAMES))
    assert [row["status"] for row in rows] == ["done", "failed", "not run"]
    assert [row["rate"] for row in rows] == [0.25, 0.5, 0.75]
    assert rows[1]["error"] == "l1: found, expected" and rows[2]["top1"] is None
    assert all(list(row) == list(rows[0]) for row in rows)
    accuracy = timed.final.score
    assert accuracy is not None
    expected = {
        "cell": done.name, "params_before": 100, "params": 70, "macs_before": 1000, "macs": 700,
        "mac_rate": pytest.approx(0.3), "top1_before": 0.9, "top1": 0.7, "top1_low": accuracy.low,
        "top1_high": accuracy.high, "samples": 100, "hardest_class": "owl", "accuracy[cat]": 0.8,
        "class_variance": pytest.approx((0.1**2 + 0.2**2 + 0.3**2) / 3), "mislabel[cat]": "dog",
        "mislabel[owl]": "cat", "speedup_batch8": 1.5, "speedup_batch8_low": 1.1, "speedup_batch8_high": 1.9,
        "seconds": 1.5,
    }  # fmt: skip
    assert {name: rows[0][name] for name in expected} == expected


def test_top5_has_columns_where_it_was_counted() -> None:
    (cell,) = cells(rate=[0.5])
    made = result(cell, {"a": 300, "b": 400})
    counted = {
        part: snap.model_copy(update={"score": snap.score.model_copy(update={"top5": top5})})
        for part, snap, top5 in (("baseline", made.baseline, 0.95), ("final", made.final, 0.75))
        if snap.score is not None
    }
    (row,) = table([cell], Outcome({cell.name: made.model_copy(update=counted)}), Reading())
    assert (row["top5_before"], row["top5"], row["top5_change"]) == (0.95, 0.75, pytest.approx(-0.2))
    (row,) = table([cell], Outcome({cell.name: made}), Reading())
    assert "top5" not in row


def test_table_of_values() -> None:
    """The error in place of accuracy; nothing about classes."""
    first, second = cells(rate=[0.25, 0.5])
    outcome = Outcome({first.name: with_error(first, 0.25), second.name: result(second, {"a": 1, "b": 1})})
    alone = table([first], outcome, Reading(NAMES))[0]
    expected = {"mae_before": 0.2, "mae": 0.25, "mae_low": 0.24, "mae_high": 0.26, "samples": 50}
    assert {name: alone[name] for name in expected} == pytest.approx(expected)
    assert not {name for name in alone if name.startswith(("top1", "class", "accuracy"))}
    both = table([first, second], outcome, Reading(NAMES))
    assert [(row["mae"], row["top1"]) for row in both] == [(0.25, None), (None, 0.7)]


def test_csv() -> None:
    """Read back, it is the table; commas and line ends inside of fields do not matter."""
    found = cells(region={"all": 1, "a, b": 2})
    outcome = Outcome({found[0].name: result(found[0], {"a": 1, "b": 1})}, {found[1].name: Failure("a\nb")})
    rows = table(found, outcome, Reading())
    back = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert back == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert back[1]["region"] == "a, b" and back[0]["accuracy[2]"] == str(MATRIX[2][2] / 10)


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet

    found = cells(rate=[0.5], region={"1": 1, "all": 2})
    outcome = Outcome({found[0].name: result(found[0], {"a": 1, "b": 1})})
    rows = table(found, outcome, Reading(NAMES))
    write_parquet(rows, tmp_path / "t.parquet")
    back = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert [row["region"] for row in back] == ["1.0", "all"]
    assert [row["top1"] for row in back] == [0.7, None]
