"""One streaming pass over data that feeds what passes want to know about activations."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.errors import DataError
from graphcomp.program import Program

Watcher = Callable[[Tensor], None]


@torch.no_grad()
def watch(program: Program, batches: Iterable[Tensor], watchers: Mapping[fx.Node, Watcher]) -> int:
    """Run the program over `batches` in eval mode and hand each watched node's output to its watcher.

    Watchers see the tensor before any later in-place operator changes it, and must not keep it.

    Returns:
        The number of samples seen.

    Raises:
        DataError: if there are none.
    """
    module = program.module.eval()

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in watchers:
                watchers[n](value)
            return value

    samples = 0
    interpreter = Watching(module)
    for x in batches:
        interpreter.run(x)
        samples += len(x)
    if not samples:
        raise DataError(
            "calibration: found no samples, expected at least one; give --data a non-empty source"
        )
    return samples


class ZeroCounter:
    """Counts exact zeros a channel: integers, so that the result does not depend on the batch size.

    Args:
        channels: how many there are.
        dim: the dimension of the watched tensors that they are on.
    """

    def __init__(self, channels: int, dim: int = 1) -> None:
        self.zeros = torch.zeros(channels, dtype=torch.int64)
        self.entries, self.dim = 0, dim

    def __call__(self, output: Tensor) -> None:
        """Count one batch."""
        flat = output.movedim(self.dim, 0).flatten(1)
        self.zeros += (flat == 0).sum(1)
        self.entries += flat.size(1)

    @property
    def fraction(self) -> Tensor:
        """Average percentage of zeros a channel, in [0, 1] (Hu et al. 2016; METHODS eq. 2.1)."""
        return self.zeros.double() / max(self.entries, 1)
