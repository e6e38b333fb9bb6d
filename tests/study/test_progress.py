"""What is shown while a study runs."""

import io

import pytest
from rich.console import Console

from graphcomp.base.workers import Failure
from graphcomp.study.progress import CellProgress


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: a line a cell, with an estimate from those that have ended."""
    now = [0.0]
    monkeypatch.setattr("graphcomp.study.progress.time.monotonic", lambda: now[0])
    text = io.StringIO()
    with CellProgress(Console(file=text), 3) as shown:
        shown.told("a", "l1: plan", 0.5)
        for seconds, name, failure in ((10.0, "a", None), (240.0, "b[x]", Failure("no")), (300.0, "c", None)):
            now[0] = seconds
            shown.ended(name, failure)
    assert text.getvalue().splitlines() == [
        "1/3 a: done (about 20 s left)",
        "2/3 b[x]: failed: no (about 2 min left)",
        "3/3 c: done",
    ]


def test_bars() -> None:
    """On a terminal: all cells, and how far each running one is."""
    text = io.StringIO()
    with CellProgress(Console(file=text, force_terminal=True, width=120), 2) as shown:
        shown.told("a", "l1: plan", 0.5)
        shown.bars.refresh()
        assert "a: l1: plan" in text.getvalue() and "0/2" in text.getvalue()
        shown.ended("a", None)
        shown.bars.refresh()
        assert shown.cells == {} and "1/2" in text.getvalue()
