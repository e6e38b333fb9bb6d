"""What a program costs and how good it is."""

from graphcomp.measure import calibrate
from graphcomp.measure.classes import ClassStatistics, class_statistics, largest_confusions
from graphcomp.measure.cost import (
    layer_row,
    layer_weight,
    macs,
    macs_of,
    params_trainable,
    plane_of,
    snapshot,
    with_macs,
)
from graphcomp.measure.damage import Corruption, Kind, require_images, robustness
from graphcomp.measure.evaluate import (
    absolute_errors,
    accuracy,
    confusion,
    count_outputs,
    drift,
    first_inputs,
    is_classifier,
    paired_difference,
    require_classes,
    score,
    values_like,
)
from graphcomp.measure.gradients import mean_gradients
from graphcomp.measure.grams import Gram, grams, output_weights
from graphcomp.measure.patches import (
    Positions,
    as_weight,
    groups_of,
    is_linear,
    is_mixing,
    matrix,
    matrix_shape,
    outputs_at,
    patches_at,
)
from graphcomp.measure.regression import Moments, Normal, root
from graphcomp.measure.statistics import Covariance, Request, Statistic, Zeros

__all__ = [
    "ClassStatistics",
    "Corruption",
    "Covariance",
    "Gram",
    "Kind",
    "Moments",
    "Normal",
    "Positions",
    "Request",
    "Statistic",
    "Zeros",
    "absolute_errors",
    "accuracy",
    "as_weight",
    "calibrate",
    "class_statistics",
    "confusion",
    "count_outputs",
    "drift",
    "first_inputs",
    "grams",
    "groups_of",
    "is_classifier",
    "is_linear",
    "is_mixing",
    "largest_confusions",
    "layer_row",
    "layer_weight",
    "macs",
    "macs_of",
    "matrix",
    "matrix_shape",
    "mean_gradients",
    "output_weights",
    "outputs_at",
    "paired_difference",
    "params_trainable",
    "plane_of",
    "patches_at",
    "require_classes",
    "require_images",
    "robustness",
    "root",
    "score",
    "snapshot",
    "values_like",
    "with_macs",
]
