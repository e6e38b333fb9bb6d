"""How far a network that was fitted in closed form is from the original, layer by layer along its depth."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from graphcomp.records import Fit
from graphcomp.report.plots import AFTER, BEFORE, GRID, WIDE, elide, style

LEAST = 1e-6
"""Errors below are drawn there: they are rounding, or none."""


def fit_figure(fit: Fit, inches: float = WIDE) -> Figure:
    """The relative error of every layer that was looked at, before and after, in the order of the graph."""
    figure = Figure(figsize=(inches, 3.4), layout="constrained")
    ax = figure.subplots()
    for values, colour, marker, label in (
        ([row.before for row in fit.layers], BEFORE, "s", "cut"),
        ([row.after for row in fit.layers], AFTER, "o", "fitted again"),
    ):
        drawn = [max(value, LEAST) for value in values]
        numbers = range(1, len(drawn) + 1)
        ax.plot(numbers, drawn, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
    ax.set_yscale("log")
    ax.set_ylabel("squared error, share of variance")
    first, last = (elide(row.layer, inches) for row in (fit.layers[0], fit.layers[-1]))
    ax.set_xlabel(f"layer, from {first} to {last}", parse_math=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    style(ax, "y")
    ax.grid(axis="y", color=GRID)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure
