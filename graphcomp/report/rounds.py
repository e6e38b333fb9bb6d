"""How a pass over several rounds went, as plots: accuracy and size after every round, and how many channels
each layer lost in which (as figure 4 of Aghli & Ribeiro 2021). Rounds that were undone are told apart.
"""

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from graphcomp.records import Step
from graphcomp.report.plots import AFTER, BEFORE, GRID, INK, WIDE, draw_sizes, elide, style
from graphcomp.report.scores import draw_scores

MOST_NAMED = 12
"""Rounds in a legend; of more of them, some."""

UNDONE = "////"
"""Hatching of channels that came back."""


@dataclass(frozen=True)
class Removals:
    """Channels that a pass over several rounds removed: the rounds, and by layer a count for each."""

    rounds: tuple[int, ...]
    layers: dict[str, tuple[int, ...]]


def removals(step: Step) -> Removals:
    """The rounds that removed something, and what from which layer; layers in the order of the network."""
    active = {number: row.removed for number, row in enumerate(step.rounds, 1) if row.removed}
    touched = {name for removed in active.values() for name in removed}
    order = dict.fromkeys(layer.name for layer in step.after.layers if layer.name in touched)
    names = [*order, *sorted(touched - set(order))]
    return Removals(
        rounds=tuple(active),
        layers={name: tuple(removed.get(name, 0) for removed in active.values()) for name in names},
    )


def rounds_figure(step: Step, inches: float = WIDE) -> Figure:
    """Held-out accuracy after every round above, if it was measured; size below."""
    found = step.snapshots
    scored = [(number, s.score) for number, s in enumerate(found) if s.score is not None]
    figure = Figure(figsize=(inches, 4.8 if scored else 2.9), layout="constrained")
    panels = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    if scored:
        look = {"color": AFTER, "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.4}
        draw_scores(panels[0], [number for number, _ in scored], [score for _, score in scored], **look)
        panels[0].set_ylabel(f"held-out {panels[0].get_ylabel()}")
    sizes = {"trainable parameters": [s.params_trainable for s in found], "MACs": [s.macs for s in found]}
    draw_sizes(panels[-1], sizes, "% of the program as it came")
    undone = step.kept_rounds < len(step.rounds)
    for panel in panels:
        if undone:
            ends = step.kept_rounds + 0.5, len(step.rounds) + 0.5
            panel.axvspan(*ends, color=GRID, alpha=0.6, linewidth=0)
        style(panel, "y")
    panels[-1].set_xlabel("round (0: as it came)" + (", grey: undone" if undone else ""))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def removed_figure(step: Step, inches: float = WIDE) -> Figure:
    """A bar for each layer that lost channels, a piece for each round that took some."""
    lost = removals(step)
    figure = Figure(figsize=(inches, 1.2 + 0.235 * len(lost.layers)), layout="constrained")
    ax = figure.subplots()
    counts = np.array(list(lost.layers.values()))
    ends = counts.cumsum(1)
    # The ends of the map would be lost on a dark or a light page.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.88, len(lost.rounds)))
    patches = []
    for i, number in enumerate(lost.rounds):
        kept = number <= step.kept_rounds
        look = {"color": colours[i]} if kept else {"facecolor": "none", "edgecolor": BEFORE, "hatch": UNDONE}
        ax.barh(range(len(counts)), counts[:, i], 0.7, ends[:, i] - counts[:, i], **look)
        patches.append(Patch(label=f"round {number}{'' if kept else ', undone'}", **look))
    _write_totals(ax, step, lost, ends[:, -1], inches)
    names = [elide(name, inches) for name in lost.layers]
    ax.set_yticks(range(len(counts)), names, fontsize=10, parse_math=False)
    ax.set_ylim(len(counts) - 0.3, -0.7)
    ax.set_xlabel("channels removed")
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    style(ax, "x")
    chosen = np.unique(np.linspace(0, len(patches) - 1, min(MOST_NAMED, len(patches))).round().astype(int))
    handles, columns = [patches[i] for i in chosen], int(inches // 1.6)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
    return figure


def _write_totals(ax: Axes, step: Step, lost: Removals, ends: NDArray[np.int64], inches: float) -> None:
    """Behind each bar what is gone for good, of how many."""
    left = {layer.name: layer.out_channels for layer in step.after.layers}
    texts = []
    for name, counts in lost.layers.items():
        gone = sum(n for r, n in zip(lost.rounds, counts, strict=True) if r <= step.kept_rounds)
        texts.append(f"{gone} of {gone + left.get(name, 0)}")
    longest = max(ends)
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        ax.text(end + 0.008 * longest, row, text, va="center", fontsize=9, color=INK, in_layout=False)
    ax.set_xlim(0, (1.12 if inches == WIDE else 1.5) * longest)
