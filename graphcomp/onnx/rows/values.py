"""What a value of a file is while the file is read: known numbers, or a node of the program.

A file is read for several *cases*: sizes that its inputs may have, which differ in the batch (1, 7 and 11;
only 1 where a batch size is baked in) and, where the file leaves others open, in these. A number that is not
the same in all cases is a size of an input, or follows from one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Known:
    """Numbers that the file holds, or that follow from these and the sizes of inputs.

    Attributes:
        values: one array a case; one and the same object where they do not depend on the case.
        name: of the initialiser that it is, "" for what was computed or stands in a node.
    """

    values: tuple[Array, ...]
    name: str = ""

    @property
    def array(self) -> Array:
        """The numbers in the first case: batch 1."""
        return self.values[0]

    @property
    def is_constant(self) -> bool:
        """Whether the numbers are the same in all cases."""
        first = self.values[0]
        return all(
            v is first or (v.shape == first.shape and np.array_equal(v, first, equal_nan=v.dtype.kind == "f"))
            for v in self.values[1:]
        )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape in every case."""
        return tuple(v.shape for v in self.values)


@dataclass(frozen=True, eq=False)
class Made:
    """A node of the program, with what it yields in every case: meta tensors, or whole numbers for sizes."""

    node: fx.Node
    values: tuple[Any, ...]

    @property
    def tensor(self) -> Tensor:
        """What it yields in the first case: batch 1."""
        return cast(Tensor, self.values[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the first case."""
        return tuple(self.tensor.shape)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Its shape in every case."""
        return tuple(tuple(v.shape) for v in self.values)

    @property
    def rank(self) -> int:
        """The number of its axes."""
        return self.tensor.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        return self.tensor.dtype


Value = Known | Made


def map_made(value: Any, change: Callable[[Made], Any]) -> Any:
    """A value, or nested lists, tuples and slices of values, with `change` applied to what is a node."""
    if isinstance(value, Made):
        return change(value)
    if isinstance(value, slice):
        return slice(*(map_made(v, change) for v in (value.start, value.stop, value.step)))
    if isinstance(value, tuple | list):
        return type(value)(map_made(v, change) for v in value)
    return value
