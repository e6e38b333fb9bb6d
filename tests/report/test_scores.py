"""Scores as text and as plots."""

from typing import get_args

import pytest
from matplotlib.figure import Figure

from graphcomp.records import Score
from graphcomp.report.scores import (
    Verdict,
    change,
    change_text,
    draw_scores,
    judge,
    measure_of,
    plotted,
    range_text,
    score_text,
    spread,
)

GOOD = Score(measure="accuracy", value=0.75, samples=8, low=0.409, high=0.929)
CLOSE = Score(measure="error", value=0.012341, samples=8, low=0.01, high=0.0147)


def test_what_was_measured() -> None:
    assert measure_of(GOOD) == measure_of(None) == "Accuracy (top-1)" and GOOD.higher_is_better
    assert measure_of(CLOSE) == "Mean absolute error" and not CLOSE.higher_is_better


def test_text() -> None:
    assert score_text(GOOD) == "75.00 % [40.9, 92.9]"
    assert score_text(CLOSE) == "0.01234 [0.01, 0.0147]" and range_text(CLOSE) == "0.01, 0.0147"
    assert score_text(None) == "not measured"


def accuracy(top1: float) -> Score:
    return Score(measure="accuracy", value=top1, samples=100, low=top1 - 0.02, high=top1 + 0.02)


def error(mae: float) -> Score:
    return Score(measure="error", value=mae, samples=100, low=mae - 0.1, high=mae + 0.1)


@pytest.mark.parametrize(
    ("before", "after", "found", "text"),
    [
        (accuracy(0.9), accuracy(0.69), "lost", "21.0 points less accurate"),
        (accuracy(0.9), accuracy(0.8799), "lost", "2.0 points less accurate"),
        (accuracy(0.9), accuracy(0.8801), "kept", "as accurate within its interval (-1.99 points)"),
        (accuracy(0.9), accuracy(0.9), "kept", "equally accurate"),
        (accuracy(0.9), accuracy(0.93), "gained", "3.0 points more accurate"),
        (error(2.0), error(2.5), "lost", "mean error 25.0 % larger"),
        (error(2.0), error(2.05), "kept", "equal in error within its interval (+2.5 %)"),
        (error(2.0), error(1.5), "gained", "mean error 25.0 % smaller"),
        (accuracy(0.9), error(2.0), None, "accuracy not measured"),
        (None, accuracy(0.9), None, "accuracy not measured"),
        (error(2.0), None, None, "accuracy not measured"),
    ],
)
def test_what_became_of_the_score(
    before: Score | None, after: Score | None, found: str | None, text: str
) -> None:
    """Lost or gained: outside of the interval before."""
    assert (change(before, after), change_text(before, after)) == (found, text)


@pytest.mark.parametrize(
    ("speed", "verdicts"),  # for a score that was lost, kept, gained, not measured
    [
        ("faster", ["mixed", "good", "good", "plain"]),
        ("faster (by CPU time: the machine was busy)", ["mixed", "good", "good", "plain"]),
        ("no measurable difference", ["bad", "plain", "good", "plain"]),
        ("slower", ["bad", "bad", "mixed", "bad"]),
        (None, ["bad", "plain", "good", "plain"]),
    ],
)
def test_speed_and_score_are_judged_together(speed: str | None, verdicts: list[str]) -> None:
    """Nothing that lost accuracy is good, nothing that became slower either."""
    scores = [accuracy(0.5), accuracy(0.9), accuracy(0.99), None]
    found = [judge(speed, accuracy(0.9), score) for score in scores]
    assert [verdict for _, verdict in found] == verdicts
    assert all(said.startswith(speed or "time not measured") for said, _ in found)
    assert set(verdicts) <= set(get_args(Verdict))


def test_plotted() -> None:
    """Accuracies in per cent; errors as they are. No bar has a negative length."""
    assert plotted(GOOD) == pytest.approx((75, 40.9, 92.9))
    assert plotted(CLOSE) == (0.012341, 0.01, 0.0147)
    assert spread([2.0, 1.0], [1.5, 1.0 + 1e-15], [2.25, 1.0 - 1e-15]) == [[0.5, 0.0], [0.25, 0.0]]


@pytest.mark.parametrize(
    ("score", "label", "top"), [(GOOD, "top-1 accuracy, %", 92.9), (CLOSE, "mean absolute error", 0.0147)]
)
def test_drawn(score: Score, label: str, top: float) -> None:
    ax = Figure().subplots()
    draw_scores(ax, [0, 1], [score, score], color="red")
    assert ax.get_ylabel() == f"{label}\n(bars: 95 % interval)"
    assert ax.lines[0].get_ydata().tolist() == [plotted(score)[0]] * 2  # type: ignore[union-attr]
    assert ax.dataLim.y1 == pytest.approx(top)
