"""The plots of steps, layers and times, and which plots a report has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from graphcomp.records import BatchTiming, LayerRow, Report, Snapshot, Step
from graphcomp.report.explanation import waterfall_svg
from graphcomp.report.fitted import fit_figure
from graphcomp.report.layer_pairs import LayerPair
from graphcomp.report.plots import (
    AFTER,
    BEFORE,
    INK,
    NARROW,
    THEORY,
    WIDE,
    draw_sizes,
    elide,
    responsive,
    style,
)
from graphcomp.report.rounds import removed_figure, rounds_figure
from graphcomp.report.scores import draw_scores, measure_of, plotted, spread
from graphcomp.report.spectra import spectra_figure, spectra_of
from graphcomp.report.words import count_text, headlines, short_text


def _steps_figure(report: Report, inches: float = WIDE) -> Figure:
    """Accuracy after every step above, size after every step below."""
    snapshots = [report.baseline, *(step.after for step in report.steps)]
    names = ["baseline", *(f"{step.index + 1} {step.name}" for step in report.steps)]
    measured = any(snapshot.score for snapshot in snapshots)
    figure = Figure(figsize=(inches, 5.4 if measured else 2.9), layout="constrained")
    axes = figure.subplots(2 if measured else 1, 1, sharex=True, squeeze=False)[:, 0]
    if measured:
        _draw_accuracy(axes[0], snapshots)
    sizes = {
        "parameters and buffers": [s.params_state for s in snapshots],
        "MACs": [s.macs for s in snapshots],
    }
    draw_sizes(axes[-1], sizes, "% of the baseline")
    style(axes[-1], "y")
    crowded = sum(len(name) for name in names) > 9 * inches
    axes[-1].set_xticks(
        range(len(names)),
        [elide(name, inches) for name in names],
        rotation=40 if crowded else 0,
        ha="right" if crowded else "center",
        parse_math=False,
    )
    return figure


def _draw_accuracy(ax: Axes, snapshots: Sequence[Snapshot]) -> None:
    every = [(i, snapshot.score) for i, snapshot in enumerate(snapshots)]
    known = [(i, q) for i, q in every if q is not None]
    look = {"color": AFTER, "marker": "o", "capsize": 4, "linewidth": 1.6, "elinewidth": 1.2}
    draw_scores(ax, [i for i, _ in known], [q for _, q in known], **look)
    if len(known) <= 16:
        for i, score in known:
            value, _, top = plotted(score)
            ax.annotate(
                f"{value:.3g}" if score.measure == "error" else f"{value:.1f}",
                (i, max(value, top)),
                (0, 4),
                textcoords="offset points",
                ha="center",
                color=INK,
            )
    ax.margins(x=0.06, y=0.15)
    style(ax, "y")


def _layers_figure(pairs: Sequence[LayerPair], inches: float = WIDE) -> Figure:
    """Widths and MACs, side by side where there is room, a line a layer: as high as the network is long."""
    down = 2 if inches == NARROW else 1
    figure = Figure(figsize=(inches, 1.1 + 0.235 * len(pairs) * down), layout="constrained")
    widths, macs = figure.subplots(down, 3 - down, sharey=True)
    rows = range(len(pairs))
    _draw_bars(widths, pairs, "out_channels", count_text)
    _draw_bars(macs, pairs, "macs", short_text)
    names = [elide(pair.name, inches) for pair in pairs]
    for ax in (widths, macs)[:down]:
        ax.set_yticks(rows, names, fontsize=10, parse_math=False)
    widths.set_ylim(len(pairs) - 0.3, -0.7)
    widths.set_xlabel("output channels")
    macs.set_xlabel("MACs per sample")
    macs.xaxis.set_major_formatter(EngFormatter())
    for ax in (widths, macs):
        ax.tick_params(axis="y", length=0)
        ax.tick_params(top=len(pairs) > 40, labeltop=len(pairs) > 40)
    figure.legend(*widths.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return figure


def _draw_bars(ax: Axes, pairs: Sequence[LayerPair], field: str, show: Callable[[int], str]) -> None:
    """What was as wide bars, what is as narrow ones."""
    old = [_value(pair.before, field) for pair in pairs]
    wide = [(0, row - 0.39, value or 0, 0.78) for row, value in enumerate(old)]
    _draw_boxes(ax, wide, facecolors=BEFORE, label="before")
    drawn = [bar for row, pair in enumerate(pairs) for bar in _bars(row, pair, field)]
    for parity, alpha, label in ((0, 1.0, "after"), (1, 0.55, None)):  # factors stand out from each other
        some = [bar for bar in drawn if bar.place % 2 == parity]
        if some:
            boxes = [(bar.left, bar.y - bar.height / 2, bar.width, bar.height) for bar in some]
            _draw_boxes(ax, boxes, facecolors=AFTER, alpha=alpha, label=label)
    ends = [value or 0 for value in old]
    for bar in drawn:
        ends[bar.row] = max(ends[bar.row], bar.left + bar.width)
    widest, labels = max(ends, default=0) or 1, [_bar_label(pair, field, show) for pair in pairs]
    for row, end in enumerate(ends):
        start = end + 0.012 * widest
        ax.text(start, row, labels[row], va="center", fontsize=9, color=INK, in_layout=False)
    # A character takes about 1/40 of a panel: leave room for the longest label behind the widest bar.
    ax.set_xlim(0, widest / max(1 - 0.025 * max(map(len, labels)), 0.4))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    style(ax, "x")


def _draw_boxes(ax: Axes, boxes: Sequence[tuple[float, float, float, float]], **look: Any) -> None:
    """Rectangles (left, top, width, height) as one artist: hundreds of their own take a second to draw."""
    corners = [((x, y), (x + w, y), (x + w, y + h), (x, y + h)) for x, y, w, h in boxes]
    ax.add_collection(PolyCollection(corners, linewidths=0, **look), autolim=False)


@dataclass(frozen=True)
class _Bar:
    """What is left of a layer, or its factor number `place`."""

    row: int
    place: int
    y: float
    width: int
    height: float
    left: int


def _bars(row: int, pair: LayerPair, field: str) -> list[_Bar]:
    """Factors share the row of the layer that they replace: end to end for what they add up to, below each
    other for what each has of its own.
    """
    values = [getattr(layer, field) for layer in pair.after]
    if field in SUMMED or len(values) < 2:
        return [_Bar(row, i, row, value, 0.42, sum(values[:i])) for i, value in enumerate(values)]
    pitch, middle = 0.78 / len(values), (len(values) - 1) / 2
    return [
        _Bar(row, i, row + (i - middle) * pitch, value, 0.75 * pitch, 0) for i, value in enumerate(values)
    ]


SUMMED = ("macs",)
"""Fields that factors share; a width belongs to each of them."""


def _value(layer: LayerRow | None, field: str) -> int | None:
    return None if layer is None else getattr(layer, field)


def _bar_label(pair: LayerPair, field: str, show: Callable[[int], str]) -> str:
    old, values = _value(pair.before, field), [getattr(layer, field) for layer in pair.after]
    new = show(sum(values)) if field in SUMMED else ", ".join(map(show, values))
    if not values:
        return f"{show(old or 0)} → gone"
    if old is None:
        return f"new: {new}"
    return new if [old] == values else f"{show(old)} → {new}"


def _time_figure(batches: Sequence[BatchTiming], inches: float = WIDE) -> Figure:
    """Median time a sample, and the speedup with its interval beside theory."""
    down = 2 if inches == NARROW else 1
    figure = Figure(figsize=(inches, 3.7 * down), layout="constrained")
    times, speedups = figure.subplots(down, 3 - down)
    _draw_times(times, batches)
    _draw_speedups(speedups, batches)
    for ax in (times, speedups):
        ax.set_xticks(range(len(batches)), [str(timing.batch) for timing in batches])
        ax.set_xlabel("batch size")
        ax.set_xlim(-0.6, len(batches) - 0.4)
        style(ax, "y")
    return figure


def _draw_times(ax: Axes, batches: Sequence[BatchTiming]) -> None:
    for offset, label, colour, side in ((-0.19, "before", BEFORE, "base"), (0.19, "after", AFTER, "new")):
        stats = [getattr(timing, side) for timing in batches]
        median = [s.median_ms / t.batch for s, t in zip(stats, batches, strict=True)]
        tail = [max(s.p90_ms - s.median_ms, 0) / t.batch for s, t in zip(stats, batches, strict=True)]
        x = [i + offset for i in range(len(batches))]
        whisker = {"ecolor": INK, "capsize": 3, "elinewidth": 1}
        ax.bar(x, median, 0.36, yerr=([0] * len(x), tail), color=colour, label=label, error_kw=whisker)
    ax.set_ylabel("wall time, ms per sample\n(bar: median, whisker: p90)")
    ax.legend(frameon=False)


def _draw_speedups(ax: Axes, batches: Sequence[BatchTiming]) -> None:
    quoted = [timing.quoted for timing in batches]
    x = range(len(batches))
    value = [q.value for q in quoted]
    bars = spread(value, [q.low for q in quoted], [q.high for q in quoted])
    ax.axhline(1, color=INK, linewidth=1, linestyle=":", label="no difference")
    theory = [timing.theoretical for timing in batches]
    ax.plot(x, theory, color=THEORY, marker="D", linestyle="--", linewidth=1.2, label="theoretical (MACs)")
    clock = "CPU time where busy" if any(timing.busy for timing in batches) else "wall time"
    label = f"measured ({clock})"
    ax.errorbar(x, value, bars, color=AFTER, marker="o", linestyle="none", capsize=5, label=label)
    ax.set_ylabel("speedup, x\n(bars: 95 % interval)")
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.05, high + 0.45 * (high - low))
    ax.legend(frameon=False, loc="upper left", fontsize=9)


def plots_of(report: Report, pairs: Sequence[LayerPair]) -> dict[str, Markup]:
    """All plots of the page, by name."""
    plots = {}
    if report.steps:
        plots["steps"] = responsive(
            partial(_steps_figure, report),
            "plot-steps",
            f"{measure_of(report.baseline.score)} and size after every step",
            "Line plots; the numbers are in the table of steps.",
        )
    for step in report.steps:
        spectra = spectra_of(step)
        if spectra:
            plots[f"spectra_{step.index}"] = responsive(
                partial(spectra_figure, spectra),
                f"plot-spectra-{step.index}",
                f"Spectra of the responses that {step.name} decided by",
                f"Cumulative energy over channels of {len(spectra)} groups; numbers in {step.plan_file}.",
            )
        plots |= _rounds_plots(step)
        if step.fit is not None and step.fit.layers:
            plots[f"fit_{step.index}"] = responsive(
                partial(fit_figure, step.fit),
                f"plot-fit-{step.index}",
                f"Error of every layer before and after {step.name}",
                "Line plots on a logarithmic scale; the numbers are in the table below.",
            )
    if pairs:
        plots["layers"] = responsive(
            partial(_layers_figure, pairs),
            "plot-layers",
            "Output channels and MACs of every layer, before and after",
            f"Horizontal bars for {len(pairs)} layers; the numbers are in the table of layers.",
        )
    if report.bench and report.bench.batches:
        plots["time"] = responsive(
            partial(_time_figure, report.bench.batches),
            "plot-time",
            "Time and speedup for every batch size",
            " ".join(line for line, _ in headlines(report)),
        )
    if report.explanation:
        plots["explain"] = waterfall_svg(report.explanation)
    return plots


def _rounds_plots(step: Step) -> dict[str, Markup]:
    """Of a pass that goes over several."""
    plots = {}
    if step.start:
        plots[f"rounds_{step.index}"] = responsive(
            partial(rounds_figure, step),
            f"plot-rounds-{step.index}",
            f"Held-out accuracy and size after every round of {step.name}",
            "Line plots; the numbers are in the table of rounds.",
        )
    if any(row.removed for row in step.rounds):
        plots[f"removed_{step.index}"] = responsive(
            partial(removed_figure, step),
            f"plot-removed-{step.index}",
            f"Channels that the rounds of {step.name} removed from each layer",
            "Stacked bars, a piece for each round; the numbers are in the table below.",
        )
    return plots
