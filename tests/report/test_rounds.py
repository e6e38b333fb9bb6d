"""Plots of rounds: what is drawn for whom, and that it stays legible."""

import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from graphcomp.records import Step
from graphcomp.report.plots import svg
from graphcomp.report.rounds import MOST_NAMED, Removals, removals, removed_figure, rounds_figure
from tests.report.test_report import STEP, with_rounds


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_what_each_layer_lost_in_the_order_of_the_network() -> None:
    assert removals(with_rounds()) == Removals((1, 3), {"stem": (11, 7), "head": (2, 0)})
    assert removals(STEP) == Removals((), {})


def test_accuracy_and_size() -> None:
    top, bottom = rounds_figure(with_rounds()).axes
    assert top.get_ylabel().startswith("held-out top-1 accuracy, %")
    assert top.lines[0].get_xydata().tolist() == [  # type: ignore[union-attr]
        [0.0, 97.0], [1.0, pytest.approx(95.9)], [2.0, pytest.approx(94.8)], [3.0, pytest.approx(93.7)],
    ]  # fmt: skip
    sizes = {line.get_label(): line.get_ydata() for line in bottom.lines}
    assert sizes["trainable parameters"] == pytest.approx([100, 99.9, 99.8, 99.7])
    assert sizes["MACs"] == pytest.approx([100, 99.995, 99.99, 99.985])
    (undone,) = (patch.get_extents() for patch in bottom.patches)
    assert bottom.transData.inverted().transform(undone)[:, 0] == pytest.approx([2.5, 3.5])
    assert bottom.get_xlabel() == "round (0: as it came), grey: undone"


def test_without_accuracy_and_without_undone_rounds() -> None:
    step = with_rounds()
    start, *after = (s.model_copy(update={"score": None}) for s in step.snapshots)
    rows = [row.model_copy(update={"after": a}) for row, a in zip(step.rounds, after, strict=True)]
    (only,) = rounds_figure(step.model_copy(update={"start": start, "rounds": rows, "kept_rounds": 3})).axes
    assert not only.patches and only.get_xlabel() == "round (0: as it came)"


def test_a_bar_a_layer_and_a_piece_a_round() -> None:
    """What was undone is hatched, and not in the totals: 11 of 59, for 48 are left."""
    figure = removed_figure(with_rounds())
    (ax,) = figure.axes
    pieces = [bars for bars in ax.containers if isinstance(bars, BarContainer)]
    assert [[(b.get_x(), b.get_width()) for b in bars] for bars in pieces] == [
        [(0, 11), (0, 2)],
        [(11, 7), (2, 0)],
    ]
    assert [bars[0].get_hatch() for bars in pieces] == [None, "////"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "head"]
    assert [text.get_text() for text in ax.texts] == ["11 of 59", "2 of 12"]
    assert legend(figure) == ["round 1", "round 3, undone"]


def many(count: int) -> Step:
    """As many rounds, of which each takes one channel from the stem."""
    first, *_ = with_rounds().rounds
    rows = [first.model_copy(update={"index": n, "removed": {"stem": 1}}) for n in range(count)]
    return with_rounds().model_copy(update={"rounds": rows, "kept_rounds": count})


def test_many_rounds_have_a_short_legend() -> None:
    """Evenly spread, the first and the last among them; every round has a colour of its own."""
    names = legend(removed_figure(many(60)))
    assert len(names) == MOST_NAMED and (names[0], names[-1]) == ("round 1", "round 60")
    colours = {bars[0].get_facecolor() for bars in removed_figure(many(60)).axes[0].containers}
    assert len(colours) == 60
    assert legend(removed_figure(many(1))) == ["round 1"]


def test_as_svg() -> None:
    text = str(svg(removed_figure(with_rounds()), "removed", "title", "description"))
    assert "11 of 59" in text and "round 3, undone" in text and "<image" not in text
