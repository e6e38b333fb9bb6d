"""Networks as users of torch write them, one small one a kind; none is written for what graphcomp can do.

They stand in `images`, `attention`, `dense` and `sequences`, and `test_strangers` runs all of them through everything.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Make = Callable[[int], Tensor]
"""Batch size -> an input."""


@dataclass(frozen=True)
class Stranger:
    """A network and its inputs."""

    build: Callable[[], nn.Module]
    inputs: tuple[Make, ...]

    def batch(self, n: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of n samples, floating ones in float64."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return tuple(make(n) for make in self.inputs)


NETWORKS: dict[str, Stranger] = {}


def image(*shape: int) -> Make:
    """Normal numbers, of a shape without the batch."""
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def words(below: int, *shape: int) -> Make:
    """Whole numbers below a bound."""
    return lambda n: torch.randint(below, (n, *shape))


def stranger(*inputs: Make) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class of networks that are built without arguments."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        NETWORKS[kind.__name__] = Stranger(kind, inputs or (image(3, 32, 32),))
        return kind

    return register
