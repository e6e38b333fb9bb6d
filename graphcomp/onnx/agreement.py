"""Whether two runtimes yield the same numbers: one measure for files that are read and that are written.

e = max |found - expected| / max(max |expected|, floor / tolerance)

is at most the tolerance exactly where the largest difference is within it of the largest value, or below the
floor: outputs that are tiny as a whole (a detector that sees nothing peaks at 8e-6) differ by what the
arithmetic before them rounds away, whatever their own size is.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FLOOR = 1e-6
"""A difference that says nothing; about eight units in the last place of 1 in float32."""

TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Of networks that compute in these types: what another order of sums makes of them."""


def tolerance_for(tensors: Iterable[Tensor]) -> float:
    """What two runtimes may differ by in a network of these tensors: by the coarsest of their types."""
    names = {str(t.dtype).removeprefix("torch.") for t in tensors}
    return max((TOLERANCES[name] for name in names & TOLERANCES.keys()), default=TOLERANCES["float32"])


def disagreement(found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> float:
    """e of the module's text: above `tolerance`, or NaN, where they differ. Arrays of one shape."""
    if not expected.size:
        return 0.0
    wide = expected.astype(np.float64)
    peak = float(np.abs(wide).max())
    error = float(np.abs(found.astype(np.float64) - wide).max())
    return error / max(peak, FLOOR / tolerance)
