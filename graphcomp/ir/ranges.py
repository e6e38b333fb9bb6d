"""The whole numbers that an input may hold: what is drawn for checks, exports and random data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """The whole numbers that an input may hold: `low` to `high`, both included.

    `bounded`: the network takes none above; else `high` is a guess at what such an input usually is.
    """

    dtype: torch.dtype
    low: int
    high: int
    bounded: bool = False

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Each as likely as any other."""
        found = torch.randint(self.low, self.high + 1, tuple(shape), generator=generator)
        return found.to(self.dtype)
