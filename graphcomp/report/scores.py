"""How good a program is, as reports and studies say it and draw it: accuracy, or the mean error of values.

A result is judged by its speed and its score together: it is not good for being fast alone.
"""

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes

from graphcomp.records import BatchTiming, Score

Change = Literal["lost", "kept", "gained"]
Verdict = Literal["good", "mixed", "bad", "plain"]
"""Of speed and score together: `mixed` pays for one with the other, `plain` says nothing either way."""


TOP5 = "Accuracy (top-5)"
MEASURES = {"accuracy": "Accuracy (top-1)", "error": "Mean absolute error"}


def measure_of(score: Score | None) -> str:
    """What a score says, or would say if it had been measured."""
    return MEASURES["accuracy" if score is None else score.measure]


# ---------------------------------------------------------------------- as text


def value_text(score: Score) -> str:
    """`93.39 %`, or the error in four digits."""
    return f"{score.value:.4g}" if score.measure == "error" else share_text(score.value)


def share_text(share: float) -> str:
    """`93.39 %`."""
    return f"{100 * share:.2f} %"


def range_text(score: Score) -> str:
    """The ends of the 95 % interval."""
    if score.measure == "error":
        return f"{score.low:.4g}, {score.high:.4g}"
    return f"{100 * score.low:.1f}, {100 * score.high:.1f}"


def score_text(score: Score | None) -> str:
    """`93.39 % [92.9, 93.9]`."""
    return "not measured" if score is None else f"{value_text(score)} [{range_text(score)}]"


# ---------------------------------------------------------------------- before and after


def change(before: Score | None, after: Score | None) -> Change | None:
    """What became of the score: lost or gained where it lies outside of the 95 % interval before.

    None if it was not measured on both sides, or not by the same measure.
    """
    if before is None or after is None or before.measure != after.measure:
        return None
    worse, better = after.value < before.low, after.value > before.high
    if not after.higher_is_better:
        worse, better = better, worse
    return "lost" if worse else "gained" if better else "kept"


def change_text(before: Score | None, after: Score | None) -> str:
    """`21.0 points less accurate`; a difference that the interval covers is shown, but not called one."""
    found = change(before, after)
    if before is None or after is None or found is None:
        return "accuracy not measured"
    if after.measure == "error":
        part = 100 * (after.value / before.value - 1) if before.value else 0.0
        if found == "kept":
            return f"equal in error within its interval ({part:+.1f} %)" if part else "equal in error"
        by = f"{abs(part):.1f} % " if part else ""
        return f"mean error {by}{'larger' if found == 'lost' else 'smaller'}"
    points = 100 * (after.value - before.value)
    if found == "kept":
        within = f"as accurate within its interval ({points:+.2f} points)"
        return within if points else "equally accurate"
    decimals = 1 if abs(points) >= 1 else 2
    return f"{abs(points):.{decimals}f} points {'less' if found == 'lost' else 'more'} accurate"


def judge(speed: str | None, before: Score | None, after: Score | None) -> tuple[str, Verdict]:
    """Speed and score in words, and how good both together are.

    Args:
        speed: what a benchmark's verdict begins with: faster, slower, or something else for no difference;
            None if time was not measured.
        before, after: of the original and of the result.
    """
    found = change(before, after)
    said = "time not measured" if speed is None else speed
    word = said.partition(" ")[0]
    verdict: Verdict = "plain"
    if word == "faster" and found is not None:
        verdict = "mixed" if found == "lost" else "good"
    elif word == "slower":
        verdict = "mixed" if found == "gained" else "bad"
    elif found in ("lost", "gained"):
        verdict = "bad" if found == "lost" else "good"
    return f"{said}, {change_text(before, after)}", verdict


def judge_speed(timing: BatchTiming, before: Score | None, after: Score | None) -> tuple[str, Verdict]:
    """The same with the speedup: `1.42x faster, 21.0 points less accurate`."""
    said, verdict = judge(timing.verdict, before, after)
    value = timing.quoted.value
    if timing.verdict.startswith("faster"):
        return f"{value:.2f}x {said}", verdict
    rest = said.removeprefix(timing.verdict)
    return f"{timing.verdict} ({value:.2f}x the original's speed){rest}", verdict


# ---------------------------------------------------------------------- as plots


def plotted(score: Score) -> tuple[float, float, float]:
    """The value and the ends of its interval; accuracies in per cent."""
    factor = 1 if score.measure == "error" else 100
    return factor * score.value, factor * score.low, factor * score.high


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
    label_scores(ax, scores[0])


def label_scores(ax: Axes, score: Score, bars: str = "95 % interval") -> None:
    """Say on the axis what is drawn, and what its bars are."""
    what = "mean absolute error" if score.measure == "error" else "top-1 accuracy, %"
    ax.set_ylabel(f"{what}\n(bars: {bars})")
