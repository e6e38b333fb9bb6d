"""Grids of recipes: run, resumed, and shown on one page."""

from graphcomp.study.check import check_cells
from graphcomp.study.grid import expand, load_study, reading_of
from graphcomp.study.page import write_results
from graphcomp.study.progress import CellProgress
from graphcomp.study.run import finished, prepare, run_study, workers_for

__all__ = [
    "CellProgress",
    "check_cells",
    "expand",
    "finished",
    "load_study",
    "prepare",
    "reading_of",
    "run_study",
    "workers_for",
    "write_results",
]
