"""How good a program is, as reports and studies say it and draw it: accuracy, or the mean error of values."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from graphcomp.records import Accuracy, MeanError, Snapshot

Score = Accuracy | MeanError


def quality(snapshot: Snapshot) -> Score | None:
    """Accuracy, or the mean error where labels are values; None if neither was measured."""
    return snapshot.accuracy or snapshot.error


def measure_of(snapshot: Snapshot) -> str:
    """What `quality` is called."""
    return "Mean absolute error" if snapshot.error else "Accuracy (top-1)"


# ---------------------------------------------------------------------- as text


def value_text(score: Score) -> str:
    """`93.39 %`, or the error in four digits."""
    return f"{score.mae:.4g}" if isinstance(score, MeanError) else f"{100 * score.top1:.2f} %"


def range_text(score: Score) -> str:
    """The ends of the 95 % interval."""
    if isinstance(score, MeanError):
        return f"{score.low:.4g}, {score.high:.4g}"
    return f"{100 * score.low:.1f}, {100 * score.high:.1f}"


def score_text(score: Score | None) -> str:
    """`93.39 % [92.9, 93.9]`."""
    return "not measured" if score is None else f"{value_text(score)} [{range_text(score)}]"


# ---------------------------------------------------------------------- as plots


def plotted(score: Score) -> tuple[float, float, float]:
    """The value and the ends of its interval; accuracies in per cent."""
    if isinstance(score, MeanError):
        return score.mae, score.low, score.high
    return 100 * score.top1, 100 * score.low, 100 * score.high


def spread(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Lengths of error bars, below and above; rounding may put an end on the wrong side of its value."""
    below = [max(value - end, 0.0) for value, end in zip(values, low, strict=True)]
    return [below, [max(end - value, 0.0) for value, end in zip(values, high, strict=True)]]


def draw_scores(ax: Axes, x: Sequence[float], scores: Sequence[Score], **look: Any) -> None:
    """A line of scores of one kind with their intervals, and the label of the axis.

    Args:
        ax: to draw on.
        x, scores: aligned, at least one.
        look: of matplotlib's `errorbar`.
    """
    values, low, high = zip(*map(plotted, scores), strict=True)
    ax.errorbar(x, values, yerr=spread(values, low, high), **look)
    what = "mean absolute error" if isinstance(scores[0], MeanError) else "top-1 accuracy, %"
    ax.set_ylabel(f"{what}\n(bars: 95 % interval)")
