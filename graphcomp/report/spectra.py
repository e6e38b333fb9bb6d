"""The picture that explains PFA: every group's spectrum, and how much energy is kept with how many channels.

A steep curve is a layer whose responses move together: few channels carry all there is. A diagonal one is a
layer of equals, which cannot be cut without loss.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from graphcomp.records import Spectrum, Step
from graphcomp.report.plots import AFTER, BEFORE, GRID, INK, NARROW, THEORY, WIDE, elide, style

COLUMNS, ROW_INCHES = {WIDE: 6, NARROW: 3}, 1.45


def spectra_of(step: Step) -> list[Spectrum]:
    """The spectra that a step was decided by, in the order of the network; empty for other methods."""
    groups = step.plan.evidence.get("groups", [])
    return [Spectrum.model_validate(g) for g in groups if "eigenvalues" in g]


def spectra_figure(spectra: Sequence[Spectrum], inches: float = WIDE) -> Figure:
    """One panel a group: cumulative energy over channels, the part that is kept filled."""
    columns = COLUMNS[inches]
    rows = -(-len(spectra) // columns)
    figure = Figure(figsize=(inches, 0.5 + ROW_INCHES * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, spectrum in zip(panels.flat, spectra, strict=False):
        _draw(panel, spectrum)
        panel.set_title(elide(spectrum.group, inches), fontsize=8, pad=2, parse_math=False)
    for panel in panels.flat[len(spectra) :]:
        panel.set_axis_off()
    figure.supxlabel("channels of the group, by energy", fontsize=10)
    figure.supylabel("cumulative energy", fontsize=10)
    return figure


def _draw(panel: Axes, spectrum: Spectrum) -> None:
    n = spectrum.channels
    energy = np.concatenate([[0.0], np.cumsum(spectrum.eigenvalues)])
    x = np.linspace(0, 1, len(energy))
    panel.plot([0, 1], [0, 1], color=BEFORE, linewidth=0.8, linestyle=":")
    panel.plot(x, energy, color=AFTER, linewidth=1.4)
    end = spectrum.kept / n
    panel.fill_between(x, energy, where=(x <= end + 1e-9).tolist(), color=AFTER, alpha=0.18, linewidth=0)
    panel.axvline(end, color=THEORY, linewidth=1.2)
    panel.text(
        0.97, 0.08, f"{spectrum.kept}/{n}", transform=panel.transAxes, ha="right", fontsize=9, color=INK
    )
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1.04)
    panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.tick_params(labelsize=8)
    style(panel, "y")
    panel.grid(axis="y", color=GRID)
