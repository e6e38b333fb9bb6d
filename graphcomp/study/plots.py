"""The plots of a study's page: scores and parameters along every axis, and the rate of every layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from graphcomp.report import (
    AFTER,
    BEFORE,
    FASTER,
    INK,
    SLOWER,
    THEORY,
    WIDE,
    draw_scores,
    elide,
    label_scores,
    responsive,
    style,
)
from graphcomp.study.axes import number, numeric_axes
from graphcomp.study.repeats import Spread
from graphcomp.study.table import Findings, by_measure

COLOURS = (AFTER, THEORY, FASTER, SLOWER, "#E69F00", "#56B4E9", INK, "#8c6d1f")
"""Okabe and Ito's, but for the last two; markers tell lines apart as well."""
MARKERS = "os^Dv<>P"
MOST_LINES = len(COLOURS)


@dataclass(frozen=True)
class Line:
    """Cells that differ on one axis only, in the order of that axis; `label` is what they have in common."""

    label: str
    cells: tuple[Findings, ...]


Spreads = Mapping[int, Spread]
"""What a cell stands for that stands for several, by its place in memory (`id`)."""


def lines_along(axis: str, found: Sequence[Findings], scored: bool = True) -> list[Line]:
    """All lines of at least two cells (with scores); in a numeric axis the cells are sorted."""
    groups: dict[tuple[tuple[str, str], ...], list[Findings]] = {}
    for cell in found:
        if axis in cell.result.labels and (cell.score is not None or not scored):
            rest = tuple((k, v) for k, v in cell.result.labels.items() if k != axis)
            groups.setdefault(rest, []).append(cell)
    groups = {rest: cells for rest, cells in groups.items() if len(cells) > 1}
    return [Line(_common(rest, groups), _sorted(axis, cells)) for rest, cells in groups.items()]


def _common(rest: tuple[tuple[str, str], ...], groups: Iterable[tuple[tuple[str, str], ...]]) -> str:
    """What tells a line from the others; all of it if there is no other."""
    several = {axis for axis, _ in rest if len({dict(other).get(axis) for other in groups}) > 1}
    return ", ".join(f"{axis} {label}" for axis, label in rest if axis in several or not several)


def _sorted(axis: str, cells: Sequence[Findings]) -> tuple[Findings, ...]:
    values = [number(cell.result.labels[axis]) for cell in cells]
    if None in values:
        return tuple(cells)
    order = sorted(range(len(cells)), key=lambda i: values[i] or 0.0)
    return tuple(cells[i] for i in order)


def plotted_axes(found: Sequence[Findings]) -> list[str]:
    """The axes to draw scores against: numbers, and words of three kinds or more; else the longest."""
    kinds: dict[str, set[str]] = {}
    for cell in found:
        for axis, label in cell.result.labels.items():
            kinds.setdefault(axis, set()).add(label)
    drawable = [axis for axis in kinds if lines_along(axis, found)]
    numeric = numeric_axes(cell.result.labels for cell in found)
    chosen = [axis for axis in drawable if axis in numeric or len(kinds[axis]) > 2]
    return chosen or sorted(drawable, key=lambda axis: -len(kinds[axis]))[:1]


def score_figure(axis: str, lines: Sequence[Line], spreads: Spreads, inches: float = WIDE) -> Figure:
    """Scores of one kind with their intervals; below accuracies the variance of those of the classes.

    Crosses, on a dotted line, are what the source says; triangles the best of the cells that a mean is of.
    """
    judged = any(cell.classes for line in lines for cell in line.cells)
    figure = Figure(figsize=(inches, 6.4 if judged else 4.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)) if judged else [figure.subplots()]
    top, bottom = panels[0], panels[-1]
    places = places_of(axis, lines)
    for index, line in enumerate(lines):
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5}
        x = [places[cell.result.labels[axis]] for cell in line.cells]
        scores = [cell.score for cell in line.cells if cell.score]
        bars = {"linewidth": 1.4, "elinewidth": 0.8, "capsize": 2, "label": elide(line.label)}
        draw_scores(top, x, scores, **bars, **look)
        if spreads:
            label_scores(top, scores[0], "standard deviation")
        _draw_others(top, x, line, spreads, look["color"])
        if judged:
            variances = [cell.classes.variance if cell.classes else float("nan") for cell in line.cells]
            bottom.plot(x, variances, linewidth=1.4, **look)
            bottom.set_ylabel("population variance of\nthe class accuracies")
    label_axis(bottom, axis, lines, inches)
    for panel in panels:
        style(panel, "y")
    if lines[0].label:
        top.legend(frameon=False, fontsize=9, ncols=int(inches // 3), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def places_of(axis: str, lines: Sequence[Line]) -> dict[str, float]:
    """Where labels stand on an axis: at their numbers, or one after the other."""
    labels = list(dict.fromkeys(cell.result.labels[axis] for line in lines for cell in line.cells))
    numeric = all(number(label) is not None for label in labels)
    return {label: float(label) if numeric else float(i) for i, label in enumerate(labels)}


def label_axis(panel: Axes, axis: str, lines: Sequence[Line], inches: float) -> None:
    """The name of an axis, and its words where it is none of numbers."""
    panel.set_xlabel(axis)
    places = places_of(axis, lines)
    if any(number(label) is None for label in places):
        words = [elide(label, inches) for label in places]
        panel.set_xticks(range(len(words)), words, rotation=0 if sum(map(len, words)) < 9 * inches else 45)


def _draw_others(top: Axes, x: Sequence[float], line: Line, spreads: Spreads, colour: str) -> None:
    """The best of several, and what the source says, in the colour of the line."""
    factor = 1 if line.cells[0].score and line.cells[0].score.measure == "error" else 100
    best = [
        (at, factor * spreads[id(c)].best) for at, c in zip(x, line.cells, strict=True) if id(c) in spreads
    ]
    if best:
        look: dict[str, Any] = {"color": colour, "markerfacecolor": "none", "linestyle": "none"}
        top.plot(*zip(*best, strict=True), marker="^", markersize=7, **look)
    said = [
        (at, factor * y) for at, c in zip(x, line.cells, strict=True) if (y := source_score(c)) is not None
    ]
    if said:
        top.plot(
            *zip(*said, strict=True), color=colour, marker="x", linestyle=":", linewidth=1.0, markersize=7
        )


def source_score(cell: Findings) -> float | None:
    """What the source says of a cell's score, if it does: itself, or the one before and the change."""
    name = "mae" if cell.score is not None and cell.score.measure == "error" else "top1"
    said = {column: value for column, value in cell.expected.items() if isinstance(value, int | float)}
    if name in said:
        return float(said[name])
    before, change = said.get(f"{name}_before"), said.get(f"{name}_change")
    return None if before is None or change is None else before + change


def params_figure(axis: str, lines: Sequence[Line], inches: float = WIDE) -> Figure:
    """The part of the network's parameters that went, in steps; lines that are the same are drawn once."""
    figure = Figure(figsize=(inches, 3.2), layout="constrained")
    ax = figure.subplots()
    places = places_of(axis, lines)
    for index, line in enumerate(lines):
        x = [places[cell.result.labels[axis]] for cell in line.cells]
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 4}
        gone = [100 * (1 - cell.params_left) for cell in line.cells]
        ax.plot(x, gone, drawstyle="steps-mid", linewidth=1.4, label=elide(line.label), **look)
    ax.set_ylabel("parameters that went, %")
    label_axis(ax, axis, lines, inches)
    style(ax, "y")
    if len(lines) > 1:
        ax.legend(frameon=False, fontsize=9, ncols=int(inches // 3), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def params_lines(axis: str, found: Sequence[Findings]) -> list[Line]:
    """Lines of parameters along an axis, each course of them once; none where nothing changes."""
    seen: dict[tuple[tuple[str, int], ...], Line] = {}
    for line in lines_along(axis, found, scored=False):
        key = tuple((c.result.labels[axis], c.result.final.params_trainable) for c in line.cells)
        seen.setdefault(key, line)
    return [line for key, line in seen.items() if len({params for _, params in key}) > 1]


def distinct_rates(found: Sequence[Findings]) -> list[Findings]:
    """One cell for each different compression of the layers; those that leave all layers alone, none."""
    seen: dict[tuple[tuple[str, float], ...], Findings] = {}
    for cell in found:
        if any(cell.layers.values()):
            seen.setdefault(tuple(cell.layers.items()), cell)
    return list(seen.values())


def chosen_rates(found: Sequence[Findings]) -> list[Findings]:
    """At most `MOST_LINES` of the different compressions, evenly spread over the network's rate."""
    ordered = sorted(distinct_rates(found), key=lambda cell: cell.rate)
    if len(ordered) <= MOST_LINES:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(i * last / (MOST_LINES - 1))] for i in range(MOST_LINES)]


def layers_figure(cells: Sequence[Findings], inches: float = WIDE) -> Figure:
    """The rate of every layer, a line a cell."""
    figure = Figure(figsize=(inches, 4.6), layout="constrained")
    ax = figure.subplots()
    for index, cell in enumerate(cells):
        rates = [100 * rate for rate in cell.layers.values()]
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 3}
        ax.plot(range(1, len(rates) + 1), rates, linewidth=1.1, label=elide(cell.title), **look)
    ax.axhline(0, color=BEFORE, linewidth=0.8)
    ax.set_xlabel("convolution or linear layer, in the network's order")
    ax.set_ylabel("MACs that went, %")
    style(ax, "y")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=8, ncols=int(inches // 4), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def draw(
    found: Sequence[Findings], means: Sequence[tuple[Findings, Spread | None]]
) -> tuple[list[dict[str, Any]], Markup | None]:
    """Plots of scores and parameters for each axis (`title`, `svg`, lines `left_out`, whether it has
    `classes`, …), and one of the layers, if any.

    Args:
        found: all cells.
        means: one for all cells that repeat each other.
    """
    cells, spreads = [cell for cell, _ in means], {id(cell): s for cell, s in means if s is not None}
    scores = [p for measure, some in by_measure(cells).items() for p in _score_plots(measure, some, spreads)]
    scores += _params_plots(cells)
    chosen = chosen_rates(found)
    if not chosen:
        return scores, None
    title = "Compression rate of every layer"
    said = "Numbers are in the table of layers."
    return scores, responsive(partial(layers_figure, chosen), "layers", title, said)


def _params_plots(found: Sequence[Findings]) -> list[dict[str, Any]]:
    """Of parameters, for every axis that scores are drawn along too."""
    plots = []
    for place, axis in enumerate(plotted_axes(found)):
        lines = params_lines(axis, found)
        if lines:
            title, said = f"Parameters against {axis}", "Numbers are in the table."
            make = partial(params_figure, axis, lines[:MOST_LINES])
            plots.append(
                {
                    "title": title,
                    "svg": responsive(make, f"params-{place}", title, said),
                    "left_out": max(0, len(lines) - MOST_LINES),
                    **dict.fromkeys(["classes", "best", "source"], False),
                    "params": True,
                }
            )
    return plots


def _score_plots(measure: str, found: Sequence[Findings], spreads: Spreads) -> list[dict[str, Any]]:
    """Of cells whose scores are of one kind."""
    plots = []
    for place, axis in enumerate(plotted_axes(found)):
        lines = lines_along(axis, found)
        title = f"{measure} against {axis}"
        key = f"{measure.partition(' ')[0].lower()}-{place}"
        plots.append(
            {
                "title": title,
                "svg": responsive(
                    partial(score_figure, axis, lines[:MOST_LINES], spreads),
                    key,
                    title,
                    "Numbers are in the table.",
                ),
                "left_out": max(0, len(lines) - MOST_LINES),
                "classes": any(cell.classes for line in lines for cell in line.cells),
                "params": False,
                "best": any(id(cell) in spreads for line in lines for cell in line.cells),
                "source": any(source_score(cell) is not None for line in lines for cell in line.cells),
            }
        )
    return plots
