"""The plots of a study's page: scores along every axis of the grid, and the rate of every layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup
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
    responsive,
    style,
)
from graphcomp.study.axes import number, numeric_axes
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


def lines_along(axis: str, found: Sequence[Findings]) -> list[Line]:
    """All lines of at least two cells with scores; in a numeric axis the cells are sorted."""
    groups: dict[tuple[tuple[str, str], ...], list[Findings]] = {}
    for cell in found:
        if axis in cell.result.labels and cell.score is not None:
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


def score_figure(axis: str, lines: Sequence[Line], inches: float = WIDE) -> Figure:
    """Scores of one kind with their intervals; below accuracies the variance of those of the classes."""
    judged = any(cell.classes for line in lines for cell in line.cells)
    figure = Figure(figsize=(inches, 6.4 if judged else 4.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)) if judged else [figure.subplots()]
    top, bottom = panels[0], panels[-1]
    labels = list(dict.fromkeys(cell.result.labels[axis] for line in lines for cell in line.cells))
    numeric = all(number(label) is not None for label in labels)
    places = {label: float(label) if numeric else float(i) for i, label in enumerate(labels)}
    for index, line in enumerate(lines):
        look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5}
        x = [places[cell.result.labels[axis]] for cell in line.cells]
        scores = [cell.score for cell in line.cells if cell.score]
        bars = {"linewidth": 1.4, "elinewidth": 0.8, "capsize": 2, "label": elide(line.label)}
        draw_scores(top, x, scores, **bars, **look)
        if judged:
            variances = [cell.classes.variance if cell.classes else float("nan") for cell in line.cells]
            bottom.plot(x, variances, linewidth=1.4, **look)
            bottom.set_ylabel("population variance of\nthe class accuracies")
    bottom.set_xlabel(axis)
    if not numeric:
        words = [elide(label, inches) for label in labels]
        bottom.set_xticks(range(len(labels)), words, rotation=0 if sum(map(len, words)) < 9 * inches else 45)
    for panel in panels:
        style(panel, "y")
    if lines[0].label:
        top.legend(frameon=False, fontsize=9, ncols=int(inches // 3), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


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


def draw(found: Sequence[Findings]) -> tuple[list[dict[str, Any]], Markup | None]:
    """Plots of scores for each axis (`title`, `svg`, lines `left_out`, whether it has `classes`), and one of
    the layers, if any.
    """
    scores = [plot for measure, cells in by_measure(found).items() for plot in _score_plots(measure, cells)]
    chosen = chosen_rates(found)
    if not chosen:
        return scores, None
    title = "Compression rate of every layer"
    said = "Numbers are in the table of layers."
    return scores, responsive(partial(layers_figure, chosen), "layers", title, said)


def _score_plots(measure: str, found: Sequence[Findings]) -> list[dict[str, Any]]:
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
                    partial(score_figure, axis, lines[:MOST_LINES]), key, title, "Numbers are in the table."
                ),
                "left_out": max(0, len(lines) - MOST_LINES),
                "classes": any(cell.classes for line in lines for cell in line.cells),
            }
        )
    return plots
