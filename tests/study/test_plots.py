"""Which lines a study's plots have."""

from typing import Any

import pytest
from matplotlib.collections import LineCollection

from graphcomp.study.plots import (
    MOST_LINES,
    chosen_rates,
    distinct_rates,
    draw,
    lines_along,
    params_lines,
    plotted_axes,
    score_figure,
    source_score,
)
from graphcomp.study.repeats import collapsed
from graphcomp.study.table import Findings
from tests.studying import cells, result, with_error


def findings(**grid: Any) -> list[Findings]:
    return [Findings(result(cell, {"a": 300, "b": 400}), None) for cell in cells(**grid)]


def drawn(found: list[Findings], *repeats: str) -> Any:
    return draw(found, collapsed(found, repeats))


def test_lines() -> None:
    """All cells that differ on this axis only; numbers are sorted, words are not."""
    found = findings(rate=[0.5, 0, 0.25], recovery={"raw": 1, "tuned": 2})
    lines = lines_along("rate", found)
    assert [line.label for line in lines] == ["recovery raw", "recovery tuned"]
    rates = [cell.result.labels["rate"] for line in lines for cell in line.cells]
    assert rates == ["0", "0.25", "0.5"] * 2
    (words,) = lines_along("region", findings(region={"none": 0, "1-3": 1, "all": 2}))
    assert [cell.result.labels["region"] for cell in words.cells] == ["none", "1-3", "all"]


def test_a_single_cell_is_no_line() -> None:
    found = findings(rate=[0.5, 1], region={"all": 0}) + findings(rate=[0.5], region={"1-3": 1})
    assert [len(line.cells) for line in lines_along("rate", found)] == [2]
    assert [len(line.cells) for line in lines_along("region", found)] == [2]


def test_without_accuracy_there_is_no_line() -> None:
    found = [Findings(result(cell, {"a": 1, "b": 1}, None), None) for cell in cells(rate=[0, 1])]
    assert lines_along("rate", found) == [] and plotted_axes(found) == []


@pytest.mark.slow
def test_mean_errors_have_plots_of_their_own() -> None:
    """Without classes below them; kinds of scores share no plot."""
    values = [Findings(r, None) for r in map(with_error, cells(rate=[0, 1]), (0.25, 0.5))]
    plots, _ = drawn([*findings(rate=[0, 1], width=[2]), *values])
    assert [(plot["title"], plot["classes"]) for plot in plots] == [
        ("Accuracy (top-1) against rate", True),
        ("Mean absolute error against rate", False),
    ]
    for plot, said, other in zip(plots, ("top-1", "mean"), ("mean", "top-1"), strict=True):
        assert f">{said} a" in plot["svg"] and f">{other} a" not in plot["svg"]
    assert "class accuracies" in plots[0]["svg"] and "class accuracies" not in plots[1]["svg"]
    tall, low = (float(plot["svg"].split('viewBox="0 0 ')[1].split('"')[0].split()[1]) for plot in plots)
    assert low < tall


def test_axes() -> None:
    """Numbers, and words of three kinds; where there is nothing else, words of two."""
    found = findings(rate=[0, 1], region={"all": 0, "1": 1, "2": 2}, recovery={"raw": 1, "tuned": 2})
    assert plotted_axes(found) == ["rate", "region"]
    assert plotted_axes(findings(recovery={"raw": 1, "tuned": 2})) == ["recovery"]


def test_rates() -> None:
    """What leaves all layers alone is no line, nor what compresses them like another one."""
    found = cells(rate=list(range(20)))
    macs = [{"a": 600 - 25 * (i // 2), "b": 400} for i in range(20)]
    every = [Findings(result(cell, m), None) for cell, m in zip(found, macs, strict=True)]
    assert [cell.result.labels["rate"] for cell in distinct_rates(every)] == [str(i) for i in range(2, 20, 2)]
    chosen = chosen_rates(every)
    assert len(chosen) == MOST_LINES < 9
    assert (chosen[0].result.labels["rate"], chosen[-1].result.labels["rate"]) == ("2", "18")


@pytest.mark.slow
def test_draw() -> None:
    """What does not fit on a plot is counted; a study without results has none."""
    accuracy, layers = drawn(findings(rate=[0, 1], width=list(range(10))))
    assert [(plot["title"], plot["left_out"]) for plot in accuracy] == [
        ("Accuracy (top-1) against rate", 2),
        ("Accuracy (top-1) against width", 0),
    ]
    assert all(plot["svg"].count("<svg") == 2 for plot in accuracy)
    assert "width 7" in accuracy[0]["svg"] and "width 8" not in accuracy[0]["svg"]
    assert layers is not None and "MACs that went" in layers
    assert drawn([]) == ([], None)


def test_parameters_by_region_in_steps() -> None:
    """The same course is one line; what nothing changes along is none."""
    grid = cells(region={"none": 0, "1-3": 1, "all": 2}, recovery={"raw": 1, "tuned": 2})
    macs = {"none": 600, "1-3": 500, "all": 200}
    found = [Findings(result(c, {"a": macs[c.labels["region"]], "b": 400}), None) for c in grid]
    (line,) = params_lines("region", found)
    assert [cell.params_left for cell in line.cells] == [1.0, 0.9, 0.6]
    assert params_lines("recovery", found) == []
    unscored = [Findings(result(c, {"a": macs[c.labels["region"]], "b": 400}, None), None) for c in grid]
    assert len(params_lines("region", unscored)) == 1


@pytest.mark.slow
def test_repetitions_are_one_point() -> None:
    """With the deviation as bar and the best beside it; the axis of seeds is none to draw along."""
    grid = cells(rate=[0, 1], seed=[1, 2, 3])
    found = [Findings(result(c, {"a": 300, "b": 400}, 0.5 + int(c.labels["seed"]) / 10), None) for c in grid]
    (plot,), _ = drawn(found, "seed")
    assert plot["title"] == "Accuracy (top-1) against rate" and plot["best"]
    assert "bars: standard deviation" in plot["svg"]
    (plot, _other), _ = drawn(found)
    assert "bars: 95 % interval" in plot["svg"] and not plot["best"]


@pytest.mark.parametrize(("seeds", "bars"), [([1, 2, 3], 2), ([1], 0)])
def test_one_repetition_has_no_bar(seeds: list[int], bars: int) -> None:
    """Nor one of no length: its deviation is not known."""
    grid = cells(rate=[0, 1], seed=seeds)
    found = [Findings(result(c, {"a": 300, "b": 400}, 0.5 + int(c.labels["seed"]) / 10), None) for c in grid]
    means = collapsed(found, ("seed",))
    spreads = {id(cell): s for cell, s in means if s is not None}
    figure = score_figure("rate", lines_along("rate", [cell for cell, _ in means]), spreads)
    (drawn_bars,) = figure.axes[0].collections
    assert isinstance(drawn_bars, LineCollection)
    assert sum(len(ends) > 0 for ends in drawn_bars.get_segments()) == bars


def test_what_the_source_says_of_a_score() -> None:
    (cell,) = cells(rate=[0.5])
    made = result(cell, {"a": 300, "b": 400})
    for said, expected in (
        ({"top1": 0.8}, 0.8),
        ({"top1_before": 0.9, "top1_change": -0.25}, 0.65),
        ({"top1_change": 0.1}, None),
        ({"mae": 0.1}, None),
        ({}, None),
    ):
        assert source_score(Findings(made, None, said)) == (expected and pytest.approx(expected))  # type: ignore[arg-type]
    assert source_score(Findings(with_error(cell, 0.3), None, {"mae": 4.22})) == 4.22
