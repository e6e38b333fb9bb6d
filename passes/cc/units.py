"""The units that CC takes from a weight, input channels and singular directions, and what each loses.

With W in matrix form, n x (c k), k = kh kw (1 for a linear layer), and r = min(n, c k):

    unit j < c            input channel j:         X[:, j] := 0
    unit c + d, d < r     singular direction d:    X := X - s u v^T, the d-th largest of X
    I(X) = S[ (G * (X - W))^2 ],   S = sum of all entries                                       (METHODS 1.2)

Units go one after the other from the matrix X that the earlier ones left. Its singular triples change when a
channel goes, so a direction is known by its place: direction d is the triple at d minus the number of lower
ones that are gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphcomp.factors import split_shapes
from graphcomp.measure import macs_of

Unit = int
"""Below the number of input channels: a channel; from there on: a direction."""


@dataclass(frozen=True)
class WeightShape:
    """What the MACs of a layer depend on, for one position of its output: n x c x k."""

    outputs: int
    channels: int
    kernel: int

    @staticmethod
    def of(weight: Tensor) -> "WeightShape":
        """The shape of a weight (n, c, ...)."""
        return WeightShape(weight.shape[0], weight.shape[1], weight[0, 0].numel())

    @property
    def directions(self) -> int:
        """r, the singular directions of the weight."""
        return min(self.outputs, self.channels * self.kernel)

    @property
    def units(self) -> int:
        """All units of the weight."""
        return self.channels + self.directions

    def macs(self, channels: int | None = None, rank: int | None = None) -> int:
        """MACs a position with `channels` left, as one weight or as two of `rank` (METHODS 1.1)."""
        shape = (self.outputs, self.channels if channels is None else channels, self.kernel)
        return sum(map(macs_of, [shape] if rank is None else split_shapes(shape, "svd", [rank])))


class Remainder:
    """What is left of a weight, in float64: X as a product of singular triples, and what it has lost.

    A removed channel costs no further arithmetic: its columns leave all arrays at the next diagonalisation.

    Args:
        weight, gradient: (n, c, ...), of equal shapes.
        units: taken away at once, in this order.

    Attributes:
        shape: of the whole weight.
        channels, directions: numbers of those that are left, ascending; directions count from 0.
        loss: I(X).
        original, current, importance: W, X and G * G on the columns that are left, (n, columns, k).
        left, right: (n, R) and (R, columns, k): X = left @ right.
    """

    def __init__(self, weight: Tensor, gradient: Tensor, units: Sequence[Unit] = ()) -> None:
        self.shape = WeightShape.of(weight)
        self.original = weight.detach().double().reshape(weight.shape[0], weight.shape[1], -1)
        self.importance = gradient.detach().double().reshape(self.original.shape).square()
        self.current = self.original.clone()
        right, values, left = torch.linalg.svd(self.current.flatten(1).T, full_matrices=False)  # mostly tall
        self.left = left.T
        self.right = (values * right).T.reshape(len(values), *self.original.shape[1:])
        self.channels = list(range(self.shape.channels))
        self.directions = list(range(self.shape.directions))
        self.loss = 0.0
        self._columns = list(self.channels)  # channels that the arrays still have columns of
        for unit in units:
            self.remove(unit)

    @property
    def units(self) -> list[Unit]:
        """The units that are left: channels, then directions."""
        return self.channels + [self.shape.channels + d for d in self.directions]

    def removable(self, unit: Unit) -> bool:
        """Whether there is another channel, or another direction, that would stay."""
        return len(self.channels if unit < self.shape.channels else self.directions) > 1

    def remove(self, unit: Unit) -> None:
        """Take one unit away; ValueError if it is gone already."""
        if unit < self.shape.channels:
            self._remove_channel(unit)
        else:
            self._remove_direction(unit - self.shape.channels)

    def _remove_channel(self, channel: int) -> None:
        self.channels.remove(channel)
        at = self._columns.index(channel)
        original, importance, block = self.original[:, at], self.importance[:, at], self.current[:, at]
        self.loss += float((importance * (original.square() - (block - original).square())).sum())
        block.zero_()
        self.right[:, at] = 0

    def _remove_direction(self, direction: int) -> None:
        self.diagonalise()
        at = self.directions.index(direction)
        del self.directions[at]
        triple = self.left[:, at, None, None] * self.right[at]
        change = self.current - self.original
        self.loss += float((self.importance * triple * (triple - 2 * change)).sum())
        self.current -= triple
        self.left, self.right = _without(self.left, 1, at), _without(self.right, 0, at)

    def diagonalise(self) -> None:
        """Drop the columns of removed channels, and make `left` and `right` the singular triples of X again.

        Then the columns of `left` are orthonormal, the rows of `right` orthogonal, the longest first.
        """
        if len(self._columns) == len(self.channels):
            return
        left = set(self.channels)
        kept = torch.tensor([i for i, c in enumerate(self._columns) if c in left], dtype=torch.int64)
        self._columns = list(self.channels)
        for name in ("original", "importance", "current", "right"):
            setattr(self, name, getattr(self, name).index_select(1, kept.to(self.left.device)))
        flat = self.right.flatten(1)
        basis = torch.linalg.eigh(flat @ flat.T).eigenvectors.flip(1)
        self.left, self.right = self.left @ basis, (basis.T @ flat).reshape(self.right.shape)
        self.right[flat.shape[1] :] = 0  # more directions than columns: the last ones are nothing

    def parts(self) -> Tensor:
        """S[(G * s u v^T)^2] of every direction, by channel: (R, channels)."""
        self.diagonalise()
        weighted = self.left.square().T @ self.importance.flatten(1)
        parts: Tensor = weighted.reshape(self.right.shape) * self.right.square()
        return parts.sum(2)


def _without(tensor: Tensor, dim: int, at: int) -> Tensor:
    size = tensor.shape[dim]
    return torch.cat([tensor.narrow(dim, 0, at), tensor.narrow(dim, at + 1, size - at - 1)], dim)
