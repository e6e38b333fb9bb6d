"""Tables for a terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from graphcomp.records import Evaluation, Report
from graphcomp.report.advice import advice
from graphcomp.report.quantized import quantized_rows
from graphcomp.report.scores import TOP5, Verdict, measure_of, score_text, share_text
from graphcomp.report.words import (
    comparison,
    count_text,
    damage_text,
    headlines,
    points_text,
    robustness_rows,
    sentence,
    why_no_accuracy,
)

COLOURS: dict[Verdict, str] = {"good": "green", "mixed": "yellow", "bad": "red", "plain": ""}
"""Of a verdict on the terminal."""


def summary_table(report: Report) -> Table:
    """The before/after table for a terminal: one row a quantity, one row a batch size."""
    title = Text(f"{report.model}: before and after")
    lines = [Text(line, COLOURS[verdict]) for line, verdict in headlines(report)]
    remarks = [sentence(remark) for remark in report.remarks]
    unknown = [] if report.final.score else [why_no_accuracy(report)]
    notes = [*unknown, *remarks, *advice(report)]
    said = Text("\n").join([*lines, *map(Text, notes)])
    table = Table(title=title, caption=said, box=box.SIMPLE_HEAD, padding=0)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for name in ("before", "after", "change", "theory"):
        # Folded, not cut, where the terminal is narrow: every digit counts.
        table.add_column(name, justify="right", overflow="fold", no_wrap=name == "change")
    for row in (*comparison(report), *quantized_rows(report)):
        sides = (side.replace(" [", "\n[") for side in (row.before, row.after))
        table.add_row(*(Text(cell) for cell in (row.label, *sides, row.change, row.theory)))
    return table


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
        change = points_text(row.before, row.after)
        table.add_row(row.label, Text(score_text(row.before)), Text(score_text(row.after)), change)
    return table


def evaluation_table(found: Evaluation) -> Table:
    """What `graphcomp evaluate` shows."""
    said = Text("\n".join([found.data, *map(sentence, found.remarks)]))
    table = Table(title=Text(found.model), caption=said, box=box.SIMPLE_HEAD, padding=0)
    table.caption_justify = "left"
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("Trainable params", count_text(found.snapshot.params_trainable))
    table.add_row("MACs per sample", count_text(found.snapshot.macs))
    score = found.snapshot.score
    table.add_row(measure_of(score), Text(score_text(score)))
    if score is not None and score.top5 is not None:
        table.add_row(TOP5, share_text(score.top5))
    for row in found.robustness:
        table.add_row(f"  {damage_text(row)}", Text(score_text(row.score)))
    return table
