"""Files of older schemas: `report-1.json` was written by graphcomp 0.1 with four rounds of `apoz`."""

import json
from pathlib import Path
from typing import Any

import pytest

from graphcomp.records import Evaluation, Report, Step
from graphcomp.report import read_report
from graphcomp.report.report import render_html

FILE = Path(__file__).with_name("report-1.json")
OLD: dict[str, Any] = json.loads(FILE.read_text())


@pytest.mark.slow
def test_a_report_of_schema_1() -> None:
    """Nothing is lost but that of a round's parameters and buffers not all were counted."""
    found = read_report(FILE)
    assert (OLD["schema_version"], found.schema_version) == (1, 2)
    assert [s.name for s in found.steps] == ["fold-bn", "apoz", "finetune"]
    for step, old in zip(found.steps, OLD["steps"], strict=True):
        plan = step.plan.model_dump(mode="json")
        assert {k: plan[k] for k in ("options", "kept", "evidence")} == {
            k: old[k] for k in ("options", "kept", "evidence")
        }
        assert (step.summary, step.plan_file, step.seconds) == (
            old["summary"],
            old["plan_file"],
            old["seconds"],
        )
        assert step.after.macs == old["after"]["macs"]
    rounds, rows = found.steps[1], OLD["steps"][1]["rounds"]
    assert [r.name for r in rounds.rounds] == [row["name"] for row in rows[1:]]
    assert [r.summary for r in rounds.rounds] == [row["summary"] for row in rows[1:]]
    assert [r.removed for r in rounds.rounds] == [row["removed"] for row in rows[1:]]
    assert [s.macs for s in rounds.snapshots] == [row["macs"] for row in rows]
    assert rounds.kept_rounds == 4 and "did not" not in render_html(found)


def test_undone_rounds_of_schema_1() -> None:
    rows = [row | {"kept": row["number"] <= 2} for row in OLD["steps"][1]["rounds"]]
    assert Step.model_validate(OLD["steps"][1] | {"rounds": rows}).kept_rounds == 2


def test_what_is_read_is_written_anew() -> None:
    text = read_report(FILE).model_dump_json()
    assert json.loads(text)["schema_version"] == 2
    assert Report.model_validate_json(text) == read_report(FILE)


def test_an_evaluation_of_schema_1() -> None:
    old = {
        "schema_version": 1,
        "model": "m",
        "weights": None,
        "data": "d",
        "seed": 0,
        "snapshot": OLD["final"],
    }
    assert Evaluation.model_validate(old).snapshot == read_report(FILE).final


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_other_schemas_are_refused(version: Any) -> None:
    with pytest.raises(ValueError, match="schema_version"):
        Report.model_validate(OLD | {"schema_version": version})
