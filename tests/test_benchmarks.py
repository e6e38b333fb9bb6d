"""Benchmarks run for hours and not in the suite; that what they import is there is seen here."""

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
FILES = sorted(FOLDER.glob("*.py"))
HEAD = ["criterion", "repair", "top-1, %"]
HEADS = ["method", "% params", "% MACs", "top-1, %"]
SAID = "`python some.py`, weights."
OURS = {("l1", "refit"): (["l1", "refit", "83.60"], "machine B, 2026-12-01")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_are_there(path: Path) -> None:
    imports = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "graphcomp"
    ]
    missing = [
        f"{node.module}.{alias.name}"
        for node in imports
        for alias in node.names
        if not hasattr(import_module(node.module or ""), alias.name)
    ]
    assert not missing


def test_some_are_there() -> None:
    assert len(FILES) > 5


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("rows")


@pytest.mark.parametrize("places", [1, 2])
def test_lines_of_a_document_are_read_as_they_were_written(rows: ModuleType, places: int) -> None:
    there = {("obs", ""): (["obs", "", "85.75"], "machine A, 2026-11-30; 2 more")}
    lines = there | (OURS if places == 2 else {})
    section = rows.page(f"{SAID} Not run: 3.", HEAD, lines)
    assert rows.written(section, SAID, HEAD, 2) == lines
    assert section.count("machine A") == 1 and section.count("where") == places - 1
    assert rows.written("", SAID, HEAD, 2) == {}


@pytest.mark.parametrize(("said", "head"), [("`python other.py`", HEAD), (SAID, HEAD[:2])])
def test_lines_of_other_settings_are_not_mixed_in(rows: ModuleType, said: str, head: list[str]) -> None:
    section = rows.page(SAID, HEAD, OURS)
    with pytest.raises(SystemExit, match=r"rows of .* expected"):
        rows.written(section, said, head, 2)


def test_what_is_measured_anew_takes_the_place_of_a_line_and_the_others_stay(
    rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = import_module("methods")
    recipes = [methods.Recipe((name,), name) for name in ("first", "second", "third")]
    monkeypatch.setitem(methods.SUITES, "mine", methods.Suite(recipes, ("method",)))

    def section(there: str, top1: float, place: str, *names: str) -> str:
        row = {"params": 100, "macs": 100, "top1": top1, "where": place}
        found = dict.fromkeys((methods.BEFORE, *names), row)
        found[methods.BEFORE] = row | {"top1": 0.9}
        settings = {"model": "models:net", "weights": "w", "data": "d"}
        return str(methods._section("mine", rows.Rows(tmp_path / "x", found, settings), there))

    first = section("", 0.5, "machine A", "third", "second")
    again = section(first, 0.75, "machine B", "first", "third")
    values = {cells[0]: (cells[-1], place) for cells, place in rows.written(again, "", HEADS, 1).values()}
    assert values == {
        "first": ("75.00", "machine B"),
        "second": ("50.00", "machine A"),
        "third": ("75.00", "machine B"),
    }
    assert list(values) == ["first", "second", "third"] and "Not run: `first`." in first
    assert "Not run" not in again and section(again, 0.75, "machine B", "first", "third") == again


def test_parts_of_a_section_stay_where_others_are_measured(
    rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8 = import_module("int8")
    document = tmp_path / "results.md"
    document.write_text("# Results\n\nbefore\n")
    monkeypatch.setattr(int8, "DOCS", document)
    size = {"kB": 1.0, "load ms": 1.0, "worst layer": 0, "in float": 0}
    decibels = (("float32", 0.0), ("ORT defaults", 10.0), ("NNCF", 30.0), ("graphcomp", 20.0))
    row = {"files": [{"file": name, "snr_db": db} | size for name, db in decibels], "images": 8, "samples": 8}
    row |= {"data": "npz:x", "where": "machine A", "load": 1.0, "as": None}

    def render(found: dict[str, object]) -> str:
        int8.render(rows.Rows(tmp_path / "x", found, {}))
        return document.read_text()

    first = render({"One": row, "Two": row})
    assert first.count("Missed: NNCF: 30.0 dB, ours 20.0.") == 2 and render({}) == first
    again = render({"Two": row | {"where": "machine B"}, "Three": row})
    assert again.count("machine A") == 2 and "### One\n\n8 images to calibrate" in again
    assert [again.index(f"### {name}\n") for name in ("One", "Two", "Three")] == sorted(
        again.index(f"### {name}\n") for name in ("One", "Two", "Three")
    )
    assert "machine B" in again.split("### Two")[1].split("### Three")[0]
