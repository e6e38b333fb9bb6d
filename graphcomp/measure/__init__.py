"""What a program costs and how good it is."""

from graphcomp.measure import calibrate
from graphcomp.measure.classes import ClassStatistics, class_statistics, largest_confusions
from graphcomp.measure.cost import layer_row, layer_weight, macs, params_trainable, snapshot, with_macs
from graphcomp.measure.damage import Corruption, Kind, require_images, robustness
from graphcomp.measure.evaluate import (
    absolute_errors,
    accuracy,
    confusion,
    count_outputs,
    drift,
    first_inputs,
    is_classifier,
    mean_error,
    require_classes,
    values_like,
)
from graphcomp.measure.gradients import mean_gradients
from graphcomp.measure.statistics import Covariance, Request, Statistic, Zeros

__all__ = [
    "ClassStatistics",
    "Corruption",
    "Covariance",
    "Kind",
    "Request",
    "Statistic",
    "Zeros",
    "absolute_errors",
    "accuracy",
    "calibrate",
    "class_statistics",
    "confusion",
    "count_outputs",
    "drift",
    "first_inputs",
    "is_classifier",
    "largest_confusions",
    "layer_row",
    "layer_weight",
    "macs",
    "mean_error",
    "mean_gradients",
    "params_trainable",
    "require_classes",
    "require_images",
    "robustness",
    "snapshot",
    "values_like",
    "with_macs",
]
