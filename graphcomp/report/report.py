"""The report of a compilation: `report.json` (the record itself) and `report.html` (one file, no script).

The text, the tables and the plots are all derived from `records.Report`, so a saved `report.json` can be
rendered again. Nothing is measured here, and a number is shown only if the record holds it.
"""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from pydantic_core import to_jsonable_python
from rich import box
from rich.table import Table
from rich.text import Text

from graphcomp.base import read_record, write_texts
from graphcomp.records import (
    BatchTiming,
    CorruptedScore,
    Evaluation,
    Interval,
    LayerRow,
    ModelFile,
    Report,
    Score,
    Snapshot,
    Step,
)
from graphcomp.report.explanation import COLUMNS, describe, label_of, layers, waterfall_svg
from graphcomp.report.html import render
from graphcomp.report.layer_pairs import LayerPair, pair_layers
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
from graphcomp.report.rounds import removals, removed_figure, rounds_figure
from graphcomp.report.scores import (
    Verdict,
    change,
    draw_scores,
    judge,
    judge_speed,
    measure_of,
    plotted,
    range_text,
    score_text,
    spread,
    value_text,
)
from graphcomp.report.spectra import spectra_figure, spectra_of

COLOURS: dict[Verdict, str] = {"good": "green", "mixed": "yellow", "bad": "red", "plain": ""}
"""Of a verdict on the terminal."""

__all__ = ["describe_timing", "read_report", "render_html", "summary_table", "write_report"]


# -- writing and reading -------------------------------------------------------------------------------


def write_report(report: Report, out: Path) -> None:
    """Write `report.json` and `report.html` into the folder `out`, both or neither.

    Raises:
        OutputError: a file cannot be written (full disk, no permission); names the file. What stood there
            before is left as it was, and no temporary file stays behind.
    """
    texts = {
        out / "report.json": report.model_dump_json(indent=2) + "\n",
        out / "report.html": render_html(report),
    }
    write_texts(texts)


def read_report(path: Path) -> Report:
    """The report saved in the file `path`.

    Raises:
        LoadError: the file cannot be read or is no report of this schema version; names the first field.
    """
    return read_record(path, Report, "a report of schema version 2 or 1; compile the model again")


# -- numbers as text -----------------------------------------------------------------------------------


def _count(value: int) -> str:
    return f"{value:,}"


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # 999,999 is 1 M, not 1e+03 k
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def _bytes(value: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value} B"


def _change(before: float, after: float) -> str:
    if before == after:
        return "unchanged"
    return f"{100 * (after - before) / before:+.1f} %" if before else "was nothing"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _ms(value: float) -> str:
    decimals = 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:.{decimals}f} ms"


def _error(value: float) -> str:
    return f"{value:.2g}"


def _interval(interval: Interval) -> str:
    return f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def _points(before: Score | None, after: Score | None) -> str:
    if before is None or after is None or before.measure != after.measure:
        return ""
    if after.measure == "error":
        return _change(before.value, after.value)
    return f"{100 * (after.value - before.value):+.2f} points"


# -- what the report says ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; `theory` is what the MAC ratio promises, where that applies."""

    label: str
    before: str
    after: str
    change: str
    theory: str = ""


@dataclass(frozen=True)
class KeptGroup:
    """Everything that was left alone for one reason, as (step, place)."""

    reason: str
    places: tuple[tuple[str, str], ...]


def describe_timing(
    timing: BatchTiming, before: Score | None = None, after: Score | None = None
) -> tuple[str, Verdict]:
    """One plain sentence: what was measured at this batch size, beside what the MACs promised and what it
    cost in accuracy; and how good both together are.
    """
    speedup, theory = timing.quoted, timing.theoretical
    said, verdict = judge_speed(timing, before, after)
    spread = f"95 % interval of the speedup {speedup.low:.2f} to {speedup.high:.2f}"
    if timing.verdict.startswith("faster") and 0 < theory < math.inf:
        promise = f"realised {100 * speedup.value / theory:.0f} % of the theoretical {_ratio(theory)}"
    else:
        promise = f"theory says {_ratio(theory)}"
    return f"Batch {timing.batch}: {said} ({spread}); {promise}.", verdict


def comparison(report: Report) -> list[Row]:
    """The before/after table: parameters, MACs, accuracy, file size and a row for each batch size timed."""
    old, new = report.baseline, report.final
    files = (report.baseline_export.bytes, report.export.bytes)
    before, after = old.score, new.score
    rows = [
        _count_row("Trainable params", old.params_trainable, new.params_trainable),
        _count_row("Params + buffers", old.params_state, new.params_state),
        _count_row("MACs per sample", old.macs, new.macs),
        Row(measure_of(before), score_text(before), score_text(after), _points(before, after)),
        Row("ONNX file", _bytes(files[0]), _bytes(files[1]), _change(*files)),
    ]
    if report.dense_export:
        dense = report.dense_export.bytes
        rows.append(Row("  with dense weights", _bytes(files[0]), _bytes(dense), _change(files[0], dense)))
    return rows + [_time_row(timing) for timing in (report.bench.batches if report.bench else [])]


def _count_row(label: str, before: int, after: int) -> Row:
    return Row(label, _count(before), _count(after), _change(before, after))


def _time_row(timing: BatchTiming) -> Row:
    clock = "CPU time" if timing.busy else "Time"
    times, change = timing.quoted_ms, _interval(timing.quoted)
    return Row(
        f"{clock}, batch {timing.batch}", _ms(times[0]), _ms(times[1]), change, _ratio(timing.theoretical)
    )


def summary_table(report: Report) -> Table:
    """The before/after table for a terminal: one row a quantity, one row a batch size."""
    title = Text(f"{report.model}: before and after")
    lines = [Text(line, COLOURS[verdict]) for line, verdict in headlines(report)]
    remarks = [_sentence(remark) for remark in report.remarks]
    unknown = [] if report.final.score else [_why_no_accuracy(report)]
    notes = [*unknown, *remarks, *describe_loss(report), *describe_dct(report)]
    said = Text("\n").join([*lines, *map(Text, notes)])
    table = Table(title=title, caption=said, box=box.SIMPLE_HEAD, padding=0)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for name in ("before", "after", "change", "theory"):
        # Folded, not cut, where the terminal is narrow: every digit counts.
        table.add_column(name, justify="right", overflow="fold", no_wrap=name == "change")
    for row in comparison(report):
        sides = (side.replace(" [", "\n[") for side in (row.before, row.after))
        table.add_row(*(Text(cell) for cell in (row.label, *sides, row.change, row.theory)))
    return table


@dataclass(frozen=True)
class RobustnessRow:
    """One kind of damage: how good baseline and result are on images that were damaged so."""

    label: str
    before: Score
    after: Score


def robustness_rows(report: Report) -> list[RobustnessRow]:
    """Undamaged images first; nothing if it was not asked for."""
    found, old, new = report.robustness, report.baseline.score, report.final.score
    if found is None or old is None or new is None:
        return []
    rows = [RobustnessRow("none", old, new)]
    for before, after in zip(found.baseline, found.final, strict=True):
        rows.append(RobustnessRow(_damage(before), before.score, after.score))
    return rows


def _damage(row: CorruptedScore) -> str:
    said = {
        "motion-blur": f"motion blur, {100 * row.amount:g} % of the side",
        "occlusion": f"occlusion, {100 * row.amount:g} % of the area",
        "brightness": f"brightness x {row.amount:g}",
    }
    return said.get(row.corruption, f"{row.corruption} {row.amount:g}")


def robustness_table(report: Report) -> Table | None:
    """For a terminal; None if it was not asked for."""
    rows = robustness_rows(report)
    if not rows:
        return None
    table = Table(title=Text("on damaged images"), box=box.SIMPLE_HEAD, padding=0)
    table.add_column("damage")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        change = _points(row.before, row.after)
        table.add_row(row.label, Text(score_text(row.before)), Text(score_text(row.after)), change)
    return table


def evaluation_table(found: Evaluation) -> Table:
    """What `graphcomp evaluate` shows."""
    said = Text("\n".join([found.data, *map(_sentence, found.remarks)]))
    table = Table(title=Text(found.model), caption=said, box=box.SIMPLE_HEAD, padding=0)
    table.caption_justify = "left"
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("Trainable params", _count(found.snapshot.params_trainable))
    table.add_row("MACs per sample", _count(found.snapshot.macs))
    table.add_row(measure_of(found.snapshot.score), Text(score_text(found.snapshot.score)))
    for row in found.robustness:
        table.add_row(f"  {_damage(row)}", Text(score_text(row.score)))
    return table


def headlines(report: Report) -> list[tuple[str, Verdict]]:
    """What was measured, a sentence a batch size, with how good that is; says so if nothing was."""
    before, after = report.baseline.score, report.final.score
    if report.bench is None or not report.bench.batches:
        said, verdict = judge(None, before, after)
        measured = f"{said[0].upper()}{said[1:]}."
        return [(f"{measured} MACs are not time: nothing here says that the result is faster.", verdict)]
    return [describe_timing(timing, before, after) for timing in report.bench.batches]


def describe_loss(report: Report) -> list[str]:
    """What would repair a score that fell and that nothing repaired; nothing otherwise."""
    lost = report.final.score
    if lost is None or change(report.baseline.score, lost) != "lost":
        return []
    trained = [step for step in report.steps if step.training is not None or step.start]
    changed = [step for step in report.steps if step.drift is not None and step not in trained]
    if not changed or (trained and trained[-1].index > changed[-1].index):
        return []
    fell = "Accuracy fell" if lost.higher_is_better else "The error grew"
    place = ", in front of fold-bn" if any(step.name == "fold-bn" for step in report.steps) else ""
    return [
        f"{fell}, and nothing behind {changed[-1].name} repairs it: train on with finetune{place}, or "
        "first only measure the normalisations' statistics again, finetune{epochs=0, bn_reestimate=500}."
    ]


def describe_dct(report: Report) -> list[str]:
    """What storing DCT coefficients gains and what it does not; nothing for a result without DCT layers."""
    stored, dense = report.export.dct, report.dense_export
    if stored is None:
        return []
    layers = f"{stored.layers} layer{'s' if stored.layers != 1 else ''}"
    if stored.stored == "dense":
        return [f"The weights of {layers} with DCT coefficients are stored dense: the file gains nothing."]
    size = f"The weights of {layers} are stored as DCT coefficients: {_bytes(report.export.bytes)}"
    size += f", with dense weights {_bytes(dense.bytes)}" if dense else ""
    speed = "The gain is size, not speed: the weights are rebuilt when the file is loaded"
    if report.dct_bench is None:
        return [f"{size}. {speed}."]
    old, new = report.dct_bench.base, report.dct_bench.new
    times = (f"batch {t.batch}: {_interval(t.quoted)}" for t in report.dct_bench.batches)
    return [
        f"{size}. {speed} ({_load(new)}; dense: {_load(old)}). Then it runs at this multiple of the dense "
        f"file's speed: {'; '.join(times)}."
    ]


def _load(file: ModelFile) -> str:
    if file.load_cpu_seconds is None:
        return f"{file.load_seconds:.2f} s"
    return f"{file.load_seconds:.2f} s with {file.load_cpu_seconds:.2f} s of CPU time"


def group_kept(report: Report) -> list[KeptGroup]:
    """What every pass left alone, by reason, the most frequent reason first."""
    places: dict[str, list[tuple[str, str]]] = {}
    for step in report.steps:
        for kept in step.plan.kept:
            places.setdefault(kept.reason, []).append((f"{step.index + 1} {step.name}", kept.where))
    groups = [KeptGroup(reason, tuple(where)) for reason, where in places.items()]
    return sorted(groups, key=lambda group: -len(group.places))


def notes(report: Report) -> list[str]:
    """What a careful reader should know before quoting a number of this report."""
    remarks = [_sentence(remark) for remark in report.remarks]
    return [*remarks, *_size_notes(report), *_accuracy_notes(report), *_timing_notes(report)]


def _sentence(remark: str) -> str:
    return f"{remark[0].upper()}{remark[1:]}."


def _size_notes(report: Report) -> list[str]:
    old, new = report.baseline, report.final
    found = [
        "MACs count convolutions, linear layers and matrix products; bias, normalisation, activation and "
        "pooling cost time but no MACs. The theoretical speedup is the ratio of MACs, nothing more."
    ]
    if (old.params_state, old.macs) == (new.params_state, new.macs):
        found.append("Nothing became smaller: parameters and MACs are what they were.")
    return found


def _accuracy_notes(report: Report) -> list[str]:
    old, new = report.baseline.score, report.final.score
    if old is None or new is None:
        return [_why_no_accuracy(report)]
    what, kind = (
        ("The mean absolute error is", "normal")
        if new.measure == "error"
        else ("Accuracy is top-1", "Wilson")
    )
    found = [
        f"{what} on {_count(new.samples)} samples of {report.data} with a 95 % {kind} interval; "
        "it holds for data like these and says nothing about others."
    ]
    if value_text(old) != value_text(new) and change(old, new) == "kept":
        found.append(
            "What was measured after lies within the interval before: the difference may be chance. "
            "More evaluation samples would tell."
        )
    if report.robustness:
        found.append(
            "Baseline and result saw the same damaged images. How strong the damage is was chosen: compare "
            "within a row."
        )
    return found


def _why_no_accuracy(report: Report) -> str:
    drifts = [step.drift for step in report.steps if step.drift]
    if report.data.partition(":")[0] == "random":
        reason = "the data are random and have no labels"
    elif drifts and all(drift.top1_agreement is None for drift in drifts):
        reason = "the outputs are not those of a classifier"
    else:
        reason = f"the data ({report.data}) gave no labels to compare with"
    return f"Accuracy was not measured: {reason}. The drift of each step is all that is known of its loss."


def _timing_notes(report: Report) -> list[str]:
    if report.bench is None or not report.bench.batches:
        return ["Time was not measured."]
    found = [
        "Time is that of the two exported ONNX files in one process, interleaved; the speedup is the ratio "
        "of medians with a bootstrap 95 % interval. It holds for this machine, runtime and thread count."
    ]
    if busy := [str(timing.batch) for timing in report.bench.batches if timing.busy]:
        found.append(
            f"The machine was busy at batch {', '.join(busy)}: wall time exceeded CPU time by over 10 %. "
            "There the speedup is quoted in CPU time."
        )
    if copies := report.bench.new.memcpy_nodes:
        found.append(f"The result copies between host and device inside the graph ({copies} Memcpy nodes).")
    if report.bench.environment != report.environment:
        found.append("Time was measured in another environment than the rest; see the table of timings.")
    return found


# -- plots ---------------------------------------------------------------------------------------------


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
    _draw_bars(widths, pairs, "out_channels", _count)
    _draw_bars(macs, pairs, "macs", _short)
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
    ax.barh(range(len(pairs)), [value or 0 for value in old], height=0.78, color=BEFORE, label="before")
    drawn = [bar for row, pair in enumerate(pairs) for bar in _bars(row, pair, field)]
    for parity, alpha, label in ((0, 1.0, "after"), (1, 0.55, None)):  # factors stand out from each other
        some = [bar for bar in drawn if bar.place % 2 == parity]
        columns = [[getattr(bar, side) for bar in some] for side in ("y", "width", "height", "left")]
        if some:
            ax.barh(*columns, color=AFTER, alpha=alpha, label=label)
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


def _plots(report: Report, pairs: Sequence[LayerPair]) -> dict[str, Markup]:
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


# -- the page ------------------------------------------------------------------------------------------


def render_html(report: Report) -> str:
    """The report as one HTML document that makes no request and runs no script."""
    filters: dict[str, Callable[..., Any]] = {
        "accuracy": score_text,
        "bytes": _bytes,
        "compact_json": lambda value: json.dumps(to_jsonable_python(value), ensure_ascii=False),
        "count": _count,
        "error": _error,
        "interval": _interval,
        "ms": _ms,
        "ratio": _ratio,
        "why_no_accuracy": _why_no_accuracy,
        "range": range_text,
        "short": _short,
        "value": value_text,
        "signed_ms": lambda value: f"{value:+.4f}" if abs(value) >= 5e-5 else "",
    }
    pairs = pair_layers(report.baseline.layers, report.final.layers)
    return render(
        "graphcomp.report",
        "report.html.j2",
        filters,
        report=report,
        change=_change,
        points=_points,
        measure_of=measure_of,
        headlines=headlines(report),
        advice=[*describe_loss(report), *describe_dct(report)],
        dct=describe_dct(report),
        explained=report.explanation,
        reasons=describe(report.explanation) if report.explanation else [],
        explained_layers=layers(report.explanation) if report.explanation else [],
        part_columns=COLUMNS,
        label_of=label_of,
        rows=comparison(report),
        pairs=pairs,
        kept=group_kept(report),
        notes=notes(report),
        robustness=robustness_rows(report),
        plots=_plots(report, pairs),
        removals={step.index: removals(step) for step in report.steps},
        recipe=yaml.safe_dump(to_jsonable_python(report.recipe), sort_keys=False, allow_unicode=True),
        command=_command(report),
    )


def _command(report: Report) -> str:
    """What computes the same again, in a shell, with the recipe in `recipe.yaml`: whatever the command line
    said, and whatever else the recipe does not hold. Paths are as they were given.
    """
    recipe = report.recipe
    options: list[tuple[str, object]] = [
        ("--recipe", "recipe.yaml"),
        ("--weights", recipe.get("weights")),  # those that come with a model are found again
        ("--input-shape", ",".join(map(str, report.input_shape or ())) or None),
        ("--data", recipe.get("data", report.data)),
        ("--classes", ",".join(map(str, recipe.get("classes", ()))) or None),
        ("--head", recipe.get("head") if recipe.get("classes") else None),
        ("--target", report.target),
        ("--seed", report.seed),
        ("-o", "OUT"),
    ]
    given = [(name, str(value)) for name, value in options if value is not None]
    return shlex.join(["graphcomp", "compile", report.model, *(word for pair in given for word in pair)])
