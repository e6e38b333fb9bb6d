"""Training a program: options, schedules, batches, the loop."""

from graphcomp.train.normalisation import BatchNorm, normalisations
from graphcomp.train.options import (
    Distance,
    Loss,
    Metric,
    Seen,
    TrainOptions,
    closeness,
    cross_entropy,
    is_correct,
    value_loss,
)
from graphcomp.train.schedule import OPTIONS
from graphcomp.train.training import check_training, fit

__all__ = [
    "BatchNorm",
    "Distance",
    "Loss",
    "Metric",
    "OPTIONS",
    "Seen",
    "TrainOptions",
    "check_training",
    "closeness",
    "cross_entropy",
    "fit",
    "is_correct",
    "normalisations",
    "value_loss",
]
