"""Scores as text and as plots."""

import pytest
from matplotlib.figure import Figure

from graphcomp.quality import draw_scores, measure_of, plotted, quality, range_text, score_text, spread
from graphcomp.records import Accuracy, MeanError, Snapshot

GOOD = Accuracy(top1=0.75, samples=8, low=0.409, high=0.929)
CLOSE = MeanError(mae=0.012341, samples=8, low=0.01, high=0.0147)


def snapshot(accuracy: Accuracy | None = None, error: MeanError | None = None) -> Snapshot:
    return Snapshot(params_trainable=1, params_state=1, macs=1, accuracy=accuracy, error=error)


def test_what_was_measured() -> None:
    assert quality(snapshot(GOOD)) == GOOD and measure_of(snapshot(GOOD)) == "Accuracy (top-1)"
    assert quality(snapshot(error=CLOSE)) == CLOSE
    assert measure_of(snapshot(error=CLOSE)) == "Mean absolute error"
    assert quality(snapshot()) is None


def test_text() -> None:
    assert score_text(GOOD) == "75.00 % [40.9, 92.9]"
    assert score_text(CLOSE) == "0.01234 [0.01, 0.0147]" and range_text(CLOSE) == "0.01, 0.0147"
    assert score_text(None) == "not measured"


def test_plotted() -> None:
    """Accuracies in per cent; errors as they are. No bar has a negative length."""
    assert plotted(GOOD) == pytest.approx((75, 40.9, 92.9))
    assert plotted(CLOSE) == (0.012341, 0.01, 0.0147)
    assert spread([2.0, 1.0], [1.5, 1.0 + 1e-15], [2.25, 1.0 - 1e-15]) == [[0.5, 0.0], [0.25, 0.0]]


@pytest.mark.parametrize(
    ("score", "label", "top"), [(GOOD, "top-1 accuracy, %", 92.9), (CLOSE, "mean absolute error", 0.0147)]
)
def test_drawn(score: Accuracy | MeanError, label: str, top: float) -> None:
    ax = Figure().subplots()
    draw_scores(ax, [0, 1], [score, score], color="red")
    assert ax.get_ylabel() == f"{label}\n(bars: 95 % interval)"
    assert ax.lines[0].get_ydata().tolist() == [plotted(score)[0]] * 2  # type: ignore[union-attr]
    assert ax.dataLim.y1 == pytest.approx(top)
