"""The files that a study leaves: one table as CSV (and Parquet), and one HTML page without scripts.

Everything is derived from the cells' results; nothing is measured here.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graphcomp.base import write_text
from graphcomp.measure import largest_confusions
from graphcomp.report import measure_of, render, score_text
from graphcomp.study.grid import Cell
from graphcomp.study.plots import chosen_rates, distinct_rates, draw
from graphcomp.study.reading import Reading, Value
from graphcomp.study.repeats import collapsed, with_spreads
from graphcomp.study.run import Outcome
from graphcomp.study.table import (
    Findings,
    as_csv,
    by_measure,
    findings,
    measured,
    table,
    write_parquet,
)

MOST_CLASSES = 20
"""For which tables have a column a class; with more of them, only the largest confusions are listed."""


def write_results(cells: Sequence[Cell], outcome: Outcome, out: Path, reading: Reading) -> None:
    """Write `results.csv`, `study.html`, and `results.parquet` where pyarrow is installed.

    Raises:
        OutputError: naming the file that cannot be written.
    """
    found = list(findings(cells, outcome, reading).values())
    spreads = [spread for _, spread in collapsed(found, reading.repeats)]
    rows = with_spreads(table(cells, outcome, reading), spreads)
    write_text(out / "results.csv", as_csv(rows))
    write_text(out / "study.html", render_html(cells, outcome, reading))
    if find_spec("pyarrow") is not None:
        write_parquet(rows, out / "results.parquet")


def render_html(cells: Sequence[Cell], outcome: Outcome, reading: Reading) -> str:
    """The study as one HTML document that makes no request and runs no script."""
    found = list(findings(cells, outcome, reading).values())
    means = collapsed(found, reading.repeats)
    failed = [(c, outcome.failures[c.name]) for c in cells if c.name in outcome.failures]
    plots, layers = draw(found, means)
    distinct = distinct_rates(found)
    filters: dict[str, Callable[[Any], str]] = {
        "count": lambda n: f"{n:,}",
        "percent": lambda x: f"{100 * x:.2f}",
        "score": score_text,
        "number": number_text,
    }
    return render(
        "graphcomp.study",
        "study.html.j2",
        filters,
        axes=list(dict.fromkeys(axis for cell in cells for axis in cell.labels)),
        cells=cells,
        found=found,
        means=means,
        repeats=reading.repeats,
        source=reading.source,
        beside=beside([cell for cell, _ in means]),
        failed=failed,
        missing=len(cells) - len(found) - len(failed),
        models=list(dict.fromkeys(cell.job.model for cell in cells)),
        data=list(dict.fromkeys(cell.result.data for cell in found)),
        plots=plots,
        measures=list(by_measure(found)) or ["Accuracy"],
        measure_of=measure_of,
        layers=layers,
        rates=_by_layers(distinct),
        compressions=len(distinct),
        drawn=len(chosen_rates(distinct)),
        most_classes=MOST_CLASSES,
        shade=shade,
        largest=largest_confusions,
        timed=any(cell.result.bench for cell in found),
        ordered=any(cell.result.final.params_order for cell in found),
    )


def beside(found: Sequence[Findings]) -> list[tuple[Findings, list[tuple[str, Value, Value]]]]:
    """Cells that the source says something of: column, what was found here, what the source has."""
    return [
        (cell, [(column, measured(cell).get(column), said) for column, said in cell.expected.items()])
        for cell in found
        if cell.expected
    ]


def number_text(value: Value) -> str:
    """A number of the table as people read it, with what they need of its digits."""
    if value is None:
        return "not measured"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value


def _by_layers(found: Sequence[Findings]) -> list[tuple[list[str], list[Findings]]]:
    """Cells of the same layers together."""
    groups: dict[tuple[str, ...], list[Findings]] = {}
    for cell in found:
        groups.setdefault(tuple(cell.layers), []).append(cell)
    return [(list(layers), group) for layers, group in groups.items()]


def shade(count: int, row: Sequence[int], right: bool) -> str:
    """Colours of a field of a confusion matrix: the larger its share of the row, the stronger."""
    share = count / sum(row) if sum(row) else 0.0
    colour = "0, 114, 178" if right else "213, 94, 0"
    text = "#fff" if share > 0.55 else "var(--ink)"
    return f"background: rgba({colour}, {share:.3f}); color: {text}"
