"""Results for people: pages, plots, words."""

from graphcomp.report.explanation import describe, layer_table, part_table, waterfall_file
from graphcomp.report.html import render
from graphcomp.report.layer_pairs import owner
from graphcomp.report.plots import AFTER, BEFORE, FASTER, INK, SLOWER, THEORY, WIDE, elide, responsive, style
from graphcomp.report.report import read_report, write_report
from graphcomp.report.scores import (
    Verdict,
    change_text,
    draw_scores,
    judge,
    judge_speed,
    label_scores,
    measure_of,
    score_text,
)
from graphcomp.report.tables import evaluation_table, robustness_table, summary_table

__all__ = [
    "AFTER",
    "BEFORE",
    "FASTER",
    "INK",
    "SLOWER",
    "THEORY",
    "Verdict",
    "WIDE",
    "change_text",
    "describe",
    "draw_scores",
    "elide",
    "evaluation_table",
    "judge",
    "judge_speed",
    "label_scores",
    "layer_table",
    "measure_of",
    "owner",
    "part_table",
    "read_report",
    "render",
    "responsive",
    "robustness_table",
    "score_text",
    "style",
    "summary_table",
    "waterfall_file",
    "write_report",
]
