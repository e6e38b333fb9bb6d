"""The whole numbers that an input may hold: what is drawn for checks, exports and random data."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """The whole numbers that an input may hold: `low` to `high`, both included.

    `ends`: below and above which the network takes none; None where that is not known, and `low` or `high` is
    a guess at what such an input usually is.
    """

    dtype: torch.dtype
    low: int
    high: int
    ends: tuple[int | None, int | None] = field(default=(None, None), compare=False)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Each as likely as any other."""
        found = torch.randint(self.low, self.high + 1, tuple(shape), generator=generator)
        return found.to(self.dtype)
