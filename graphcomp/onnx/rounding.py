"""What rounding may explain, of files that are read and of files that are written: one rule for both.

Two runtimes that are right differ by more than the tolerance where a network amplifies rounding. There the
program's own float32 is as far from its float64: some times that distance is allowed, and said, if every node
alone is within a part of the tolerance (`onnx.alone`). However far that is: where float32 yields noise the
outputs prove nothing, and the nodes all there is to prove.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.ir import Program, output_tensors
from graphcomp.onnx.agreement import disagreement

OF_ROUNDING = 10
"""What ONNX Runtime may differ by, in distances of float32 from float64."""

ALONE = 0.1
"""Of the tolerance, what a node alone may differ by where more is allowed of the outputs."""

Samples = tuple[Tensor, ...]


@dataclass(frozen=True)
class Allowance:
    """What outputs may differ by, if that is more than the tolerance; and why it is not more.

    Attributes:
        most: a disagreement (see `onnx.agreement`); 0 where rounding explains nothing.
        apart: the first node that differs alone.
    """

    most: float = 0.0
    apart: str | None = None

    @property
    def advice(self) -> str:
        """For the message that refuses: which node it was."""
        return f" (alone: {self.apart})" if self.apart else ""


def remark(error: float) -> str:
    """What is said of a network that was taken all the same."""
    return f"the network amplifies rounding: ONNX Runtime's numbers are up to {error:.1g} off"


def allowance(
    program: Program,
    cases: Sequence[Samples],
    tolerance: float,
    apart: Callable[[Samples, float], str | None],
) -> Allowance:
    """What rounding may explain on these inputs.

    Args:
        program: in float32.
        cases: its inputs, one after another.
        tolerance: of a network that does not amplify anything.
        apart: the first node that differs alone by more than a number; asked where more is to be allowed.
    """
    try:
        wide = program.to(torch.float64)
        far = max(
            disagreement(a, b, tolerance)
            for samples in cases
            for a, b in zip(_run(program, samples), _run(wide, _widened(samples)), strict=True)
        )
    # Whatever operators of torch raise that have no float64.
    except Exception:
        return Allowance()
    allowed = OF_ROUNDING * far if np.isfinite(far) else 0.0
    if allowed > tolerance:
        for samples in cases:
            found = apart(samples, ALONE * tolerance)
            if found is not None:
                return Allowance(0.0, found)
    return Allowance(allowed)


def _run(program: Program, samples: Samples) -> list[NDArray[np.generic]]:
    with torch.inference_mode():
        return [t.numpy() for t in output_tensors(program(*(x.clone() for x in samples)))]


def _widened(samples: Samples) -> Samples:
    return tuple(x.double() if x.is_floating_point() else x for x in samples)
