"""Rows of a table that are measured one by one: each is kept in a file as soon as it is known."""

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import graphcomp
from graphcomp.ir.program import Program
from graphcomp.runtime.machine import environment

Row = dict[str, Any]
OUT = Path(__file__).parent.parent / "out"
DOCS = Path(__file__).parent.parent / "docs" / "results.md"
MARK = "where"
"""Head of the column that says in which of several places a line was measured."""

SHOWN = ("torch", "torchvision", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True)
class Rows:
    """The rows of one table.

    Attributes:
        path: JSON, beside other results under `out/`.
        found: row name -> what was measured, in the order of measurement.
        settings: what all rows have in common; a run with others must not add to them.
    """

    path: Path
    found: dict[str, Row]
    settings: Row

    @staticmethod
    def load(name: str) -> "Rows":
        """The rows of `out/NAME.json`; none if it is not there."""
        path = OUT / f"{name}.json"
        content = json.loads(path.read_text()) if path.exists() else {"settings": {}, "rows": {}}
        return Rows(path, content["rows"], content["settings"])

    @staticmethod
    def open(name: str, settings: Mapping[str, Any]) -> "Rows":
        """The same, to be added to; SystemExit if they were measured under other settings."""
        there = Rows.load(name)
        for key, value in settings.items():
            if there.settings.get(key, value) != value:
                raise SystemExit(
                    f"{there.path}: found rows measured with {key} {there.settings[key]!r}, expected "
                    f"{value!r}; give the same, or move the file away"
                )
        return Rows(there.path, there.found, there.settings | dict(settings))

    def measure(self, name: str, measure: Callable[[], Row]) -> Row:
        """The row of this name; measured and written now if it is not there."""
        if name not in self.found:
            self.put(name, measure() | {"where": where()})
        return self.found[name]

    def put(self, name: str, row: Row) -> None:
        """Add a row, or put it in the place of another; the file is written whole or not at all."""
        self.found[name] = row
        self.path.parent.mkdir(exist_ok=True)
        whole = self.path.with_suffix(".partial")
        whole.write_text(json.dumps({"settings": self.settings, "rows": self.found}, indent=1))
        whole.replace(self.path)

    @property
    def places(self) -> str:
        """Where and when the rows were measured, for a document."""
        return "; ".join(dict.fromkeys(row["where"] for row in self.found.values()))


def timed(base: Path, seconds: float, program: Program) -> Row:
    """The speedup of a program against the file `base`, beside which its own is written."""
    new = base.with_name("new.onnx")
    graphcomp.export_onnx(program, new, provider="cpu")
    timing = graphcomp.benchmark(base, new, seconds=seconds).batches[0]
    return {
        "theory": timing.theoretical,
        "measured": (timing.quoted.value, timing.quoted.low, timing.quoted.high),
        "clock": "CPU" if timing.busy else "wall",
    }


def where() -> str:
    """Machine, versions, date and commit."""
    here = environment()
    versions = ", ".join(f"{name} {here.versions[name]}" for name in SHOWN if here.versions.get(name))
    today = datetime.now(UTC).date().isoformat()
    return f"{here.cpu} ({here.isa}), {here.cores} cores, Python {here.python}, {versions}, {today}{commit()}"


def commit() -> str:
    """The commit that is checked out, and whether files differ from it; nothing outside of a checkout."""
    told = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(told, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return f", commit {found.stdout.strip()}" if found.returncode == 0 else ""


Lines = dict[tuple[str, ...], tuple[list[str], str]]
"""Lines of a table by their first cells: all cells, and where they were measured (`where`)."""


def written(section: str, said: str, head: list[str], first: int) -> Lines:
    """The lines that a section of a document has already, of machines and days whose `out/` is gone.

    Args:
        section: as `page` makes it; "": no lines.
        said: what it begins with: the command and what all lines have in common.
        head: of its table.
        first: how many cells a line is known by.

    Raises:
        SystemExit: it says something else, so that its lines do not belong to those that are to be added.
    """
    if not section:
        return {}
    paragraph, *_, found = section.split("\n\n")
    top, _, *lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in found.splitlines()]
    marked = top[-1] == MARK
    if not paragraph.startswith(said) or (top[:-1] if marked else top) != head:
        raise SystemExit(
            f"{DOCS}: found rows of {paragraph[:200]!r} with columns {top}, expected {said!r} and {head}; "
            "measure with the same settings, or take the section out of the document"
        )
    place = paragraph.rsplit(". ", 1)[1].removesuffix(".")
    letters = dict(part.split(": ", 1) for part in re.split("; (?=[a-z]: )", place)) if marked else {}
    return {
        tuple(cells[:first]): (cells[:-1], letters[cells[-1]]) if marked else (cells, place)
        for cells in lines
    }


def page(said: str, head: list[str], lines: Lines) -> str:
    """A section: what is said, where the lines were measured, and the table.

    Where they were measured in several places a last column says which line in which.
    """
    places = list(dict.fromkeys(place for _, place in lines.values()))
    if len(places) == 1:
        return f"{said} {places[0]}.\n\n{table(head, [cells for cells, _ in lines.values()])}"
    marks = dict(zip(places, ascii_lowercase, strict=False))
    told = "; ".join(f"{mark}: {place}" for place, mark in marks.items())
    marked = [[*cells, marks[place]] for cells, place in lines.values()]
    return f"{said} {told}.\n\n{table([*head, MARK], marked)}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
