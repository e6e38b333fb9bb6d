"""What tests of training share: short options, and a stop in the middle of a step."""

import signal
from typing import Any

from torch import Tensor

from graphcomp.ir.program import Program
from graphcomp.train.options import Seen, TrainOptions, cross_entropy
from graphcomp.train.training import fit
from tests.learnable import make_split, normalised_net


def options(**changes: Any) -> TrainOptions:
    """Two epochs of four steps."""
    return TrainOptions(**{"epochs": 2, "batch": 24, "lr": 0.05, "precision": "float32", **changes})


def trained(program: Program | None = None, seed: int = 0, **changes: Any) -> Program:
    return fit(program or normalised_net(), make_split(), options(**changes), seed=seed).program


class Stops:
    """A loss that asks for an end, as Ctrl-C does, in the middle of some step."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, seen: Seen) -> Tensor:
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        self.left -= 1
        return cross_entropy()(seen)
