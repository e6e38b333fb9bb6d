"""When two runtimes have computed the same: one measure for files that are read and that are written."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOOR = 1e-6
"""A difference that is none, whatever the outputs are: a detector that is sure of nothing has only such."""

TOLERANCES = {"float16": 2e-2, "bfloat16": 1e-1}
"""Relative differences that another order of sums makes in types of fewer bits."""


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """max |found - expected| / max |expected|; absolute where all expected values are zero."""
    peak, error = _peaks(found, expected)
    return error / peak if peak else error


def agrees(found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> bool:
    """Whether the relative error is within the tolerance, or the difference below `FLOOR`.

    NaN agrees with nothing.
    """
    peak, error = _peaks(found, expected)
    return error <= max(tolerance * peak if peak else tolerance, FLOOR)


def _peaks(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    if not expected.size:
        return 0.0, 0.0
    wide = expected.astype(np.float64)
    return float(np.abs(wide).max()), float(np.abs(found.astype(np.float64) - wide).max())
