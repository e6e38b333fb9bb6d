"""Passes, plans, and the one check: `rewrite(simulate(p)) == simulate(p)`."""

from graphcomp.pipeline import verify
from graphcomp.pipeline.accounting import Concern
from graphcomp.pipeline.contract import (
    NEED_NO_LABELS,
    Context,
    Course,
    Earlier,
    ExportingPass,
    KeepingRows,
    Outlook,
    Pass,
    Reshaping,
    TrainingPass,
    held,
    require_data,
    require_trained,
    work_name,
)
from graphcomp.pipeline.pipeline import Pipeline, check_order, exporting
from graphcomp.pipeline.rounds import held_out_samples, lost_points
from graphcomp.pipeline.verify import TOLERANCE, relative_error, scrambled

__all__ = [
    "Concern",
    "Context",
    "Course",
    "Earlier",
    "ExportingPass",
    "KeepingRows",
    "NEED_NO_LABELS",
    "Outlook",
    "Pass",
    "Pipeline",
    "Reshaping",
    "TOLERANCE",
    "TrainingPass",
    "check_order",
    "exporting",
    "held",
    "held_out_samples",
    "lost_points",
    "relative_error",
    "require_data",
    "require_trained",
    "scrambled",
    "verify",
    "work_name",
]
