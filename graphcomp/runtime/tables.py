"""Benchmarks as tables."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from graphcomp import records


def format_table(bench: records.Bench) -> Table:
    """The result as a table that fits 80 columns: times of both models, and below them one line a batch."""
    plural = "s" if bench.threads > 1 else ""
    where = f"{bench.runtime}, {bench.threads} thread{plural}, {bench.environment.cpu}"
    files = f"base {Path(bench.base.path).name}, new {Path(bench.new.path).name}"
    end_to_end = any(row.base.end_to_end_median_ms is not None for row in bench.batches)
    table = Table(
        title=Text(f"Time per run in ms ({where}, {bench.environment.isa})\n{files}"),
        caption=Text("\n".join(_line(row) for row in bench.batches)),
        caption_justify="left",
    )
    table.add_column("batch", justify="right")
    table.add_column("model")
    for name in ("runs", "first", "median", "p90", "p99", "CPU", *(["end to end"] if end_to_end else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in bench.batches:
        table.add_row(str(row.batch), "base", *_cells(row.base, end_to_end))
        table.add_row("", "new", *_cells(row.new, end_to_end), end_section=True)
    return table


def sweep_table(benches: Sequence[records.Bench]) -> Table:
    """Speedup by batch size, theory beside what every provider measured: one line a batch.

    All are of the same two files and the same batch sizes. A busy machine's speedup is that of CPU time.
    """
    table = Table(title="Speedup by batch size", caption=Text(_marks(benches)), caption_justify="left")
    for name in ("batch", "by MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in benches:
        table.add_column(f"{one.runtime}, 95 % interval", justify="right")
        table.add_column("of theory", justify="right", no_wrap=True)
    for rows in zip(*(one.batches for one in benches), strict=True):
        cells = [str(rows[0].batch), f"{rows[0].theoretical:.2f}x"]
        for row in rows:
            quoted = row.quoted
            mark = " *" if row.busy else ""
            cells += [f"{_interval(quoted)}{mark}", f"{quoted.value / row.theoretical:.0%}"]
        table.add_row(*cells)
    return table


def _marks(benches: Sequence[records.Bench]) -> str:
    busy = any(row.busy for one in benches for row in one.batches)
    return "* CPU time: the machine was busy" if busy else ""


def _line(row: records.BatchTiming) -> str:
    """One batch in words."""
    wall, cpu = _interval(row.speedup), _interval(row.cpu_speedup)
    return (
        f"batch {row.batch}: {wall} in wall time, {cpu} in CPU time, "
        f"{row.theoretical:.2f}x by MACs: {row.verdict}"
    )


def _cells(stats: records.TimingStats, end_to_end: bool) -> list[str]:
    times = [stats.first_ms, stats.median_ms, stats.p90_ms, stats.p99_ms, stats.cpu_median_ms]
    if end_to_end and stats.end_to_end_median_ms is not None:
        times.append(stats.end_to_end_median_ms)
    return [str(stats.runs), *(f"{value:.3f}" for value in times)]


def _interval(speedup: records.Interval) -> str:
    return f"{speedup.value:.3f}x [{speedup.low:.3f}, {speedup.high:.3f}]"
