"""Grids of recipes: run, resumed, and shown on one page."""

from graphcomp.study.grid import expand, load_study
from graphcomp.study.page import write_results
from graphcomp.study.progress import CellProgress
from graphcomp.study.run import finished, prepare, run_study, workers_for

__all__ = [
    "CellProgress",
    "expand",
    "finished",
    "load_study",
    "prepare",
    "run_study",
    "workers_for",
    "write_results",
]
