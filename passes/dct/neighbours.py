"""What is near a column: by a k-d tree where columns are short, else by matrix products with all of them."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ROUNDING = 1e-9
"""Relative room for what another order of summation makes of a distance."""


def summed(terms: Floats) -> Floats:
    """Sums along the last axis, term by term: numpy's own order depends on the memory layout."""
    total = terms[..., 0].copy()
    for i in range(1, terms.shape[-1]):
        total += terms[..., i]
    return total


class Tree:
    """A k-d tree over the points `ids`: what is near a point is in a few leaves."""

    NEIGHBOURS, BATCH = 12, 64

    def __init__(self, points: Floats, ids: Integers, p: int) -> None:
        self.points, self.ids, self.p = points, ids, p
        self.tree = KDTree(points[ids], leafsize=16)
        self.sequence = ids[self.tree.indices]  # leaf after leaf
        # Starting threads costs as much as looking a batch up, unless there are many dimensions.
        self.workers = torch.get_num_threads() if points.shape[1] > 5 else 1

    def nearest(self, which: Integers, k: int) -> tuple[Integers, Floats]:
        """The k nearest of each point, in any order, and a distance that no other point is below."""
        far, found = self.tree.query(self.points[which], k, p=self.p, workers=self.workers)
        shape = (len(which), k)
        return self.ids[found.reshape(shape)], far.reshape(shape).max(axis=1) ** self.p * (1 - ROUNDING)


class Scan:
    """All points `ids` at once, by matrix products in float32 whose error is bounded."""

    NEIGHBOURS, BATCH = 32, 64

    def __init__(self, points: Floats, ids: Integers, p: int) -> None:
        self.points, self.ids, self.p = points, ids, p
        self.sequence = ids
        self.scale = float(np.abs(points).max()) or 1.0
        self.columns = self._scaled(ids)
        self.sizes = self.columns.abs().pow(p).sum(1)
        # g products, g additions and a few conversions, each off by an ulp of at most the sum of both sizes
        self.error = 4 * (points.shape[1] + 8) * 2.0**-24

    def nearest(self, which: Integers, k: int) -> tuple[Integers, Floats]:
        """As `Tree.nearest`."""
        rows = self._scaled(which)
        sizes = rows.abs().pow(self.p).sum(1)
        if self.p == 1:
            distances = torch.cdist(rows, self.columns, p=1)
        else:
            distances = torch.addmm(sizes[:, None] + self.sizes, rows, self.columns.T, alpha=-2)
        far, found = distances.topk(k, dim=1, largest=False, sorted=False)
        bound = far.amax(1) - self.error * (sizes + self.sizes.max())
        return self.ids[found.numpy()], bound.double().numpy() * self.scale**self.p

    def _scaled(self, which: Integers) -> torch.Tensor:
        return torch.from_numpy((self.points[which] / self.scale).astype(np.float32))
