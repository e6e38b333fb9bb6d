"""The greedy nearest-neighbour chain over the columns of a matrix (METHODS 4.2; Ulicny et al. 2020, Alg. 1).

    order[0] = argmax_j |x_j|                              of all columns; ties: the smallest j
    order[i] = argmin_j d(x_j, x_order[i-1])               of those not yet taken; ties: the smallest j

Exact without looking at all pairs: every column's few nearest neighbours are looked up once, in batches, and
the chain takes the first that is still free. Where all of them are taken the neighbourhood is widened; once
that has cost as much as a new index, the index is built again over the columns that are left.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree

from graphcomp.errors import PassError

OrderDistance = Literal["euclidean", "manhattan", "cosine"]
StartNorm = Literal["l1", "l2"]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

TREE_DIMENSIONS = 10
"""Above this a k-d tree visits most of its leaves, and scanning all columns by matrix products is faster."""

SHRINK = 0.5
"""An index is built again once this fraction of its columns is left."""

ROUNDING = 1e-9
"""Relative room for what another order of summation makes of a distance."""


def chain(x: Floats, distance: OrderDistance = "euclidean", start: StartNorm = "l2") -> Integers:
    """Alg. 1: the order in which the greedy chain takes the columns of `x`.

    Distances are compared as float64 sums over the rows, first to last; equal ones are ties. "cosine" is the
    Euclidean distance of columns scaled to length 1, whose square is 2 (1 - cos); a column of zeros is as far
    from all others as orthogonal ones are. The chain of one row is a sort.

    For M columns of g rows: about O(M log M) with a k-d tree (small g), else O(M^2 g) multiply-adds in matrix
    products; O(M g) memory.

    Args:
        x: shape (g, M), finite.
        distance: that the chain keeps small between neighbours.
        start: the norm by which the first column is the largest.

    Returns:
        A permutation of 0 … M - 1.

    Raises:
        PassError: if a number is not finite.
    """
    if not np.isfinite(x).all():
        raise PassError("order: found NaN or infinite weights, expected finite ones; check the weights")
    first = int(np.argmax(_summed(np.abs(x.T) if start == "l1" else x.T**2)))
    points = _unit(x.T) if distance == "cosine" else np.ascontiguousarray(x.T)
    if points.shape[1] == 1:
        return _sorted_from(points[:, 0], first)
    members, begins = _distinct(points)
    rank = np.empty(len(begins), np.int64)  # distinct columns are numbered by their smallest member,
    number = np.argsort(members[begins])  # so that ties fall as they must
    rank[number] = np.arange(len(number))
    at = np.searchsorted(begins, np.flatnonzero(members == first)[0], side="right") - 1
    walk = _Walk(points[members[begins[number]]], 1 if distance == "manhattan" else 2).run(int(rank[at]))
    order = _expanded(members, begins, number[walk])
    return np.concatenate([[first], order[order != first]])


def _summed(terms: Floats) -> Floats:
    """Sums along the last axis, term by term: numpy's own order depends on the memory layout."""
    total = terms[..., 0].copy()
    for i in range(1, terms.shape[-1]):
        total += terms[..., i]
    return total


def _unit(points: Floats) -> Floats:
    """Columns of length 1; those of zeros get a dimension of their own, orthogonal to all others."""
    norms = np.sqrt(_summed(points**2))
    return np.column_stack([points / np.where(norms > 0, norms, 1)[:, None], norms == 0])


def _sorted_from(values: Floats, first: int) -> Integers:
    """The chain on a line: from one end, so away from it; equal values in their order."""
    order: Integers = np.argsort(-values if values[first] > 0 else values, kind="stable")
    return order


def _distinct(points: Floats) -> tuple[Integers, Integers]:
    """Indices grouped by equal point, ascending in each group, and where the groups begin.

    Equal columns are taken one after the other, at distance 0: the chain through distinct ones is enough.
    """
    members = np.lexsort(points.T)
    ordered = points[members]
    new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
    return members, np.flatnonzero(new)


def _expanded(members: Integers, begins: Integers, groups: Integers) -> Integers:
    """All members of `groups`, group after group."""
    counts = np.diff(np.append(begins, len(members)))[groups]
    offsets = np.arange(len(members)) - np.repeat(np.cumsum(counts) - counts, counts)
    expanded: Integers = members[np.repeat(begins[groups], counts) + offsets]
    return expanded


class _Tree:
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


class _Scan:
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
        """As `_Tree.nearest`."""
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


class _Walk:
    """The chain through distinct points.

    Attributes:
        points: shape (count, g), numbered so that of two at the same distance the smaller number comes first.
        p: distances are sums of |a - b|^p.
        taken: a byte a point, and one more that is never set; `gone` is the same memory.
        rows: of every point that is `known`, others from the nearest on, then `count` from where points that
            are not in the row may be as near.
        index: finds neighbours among the points that were left when it was built.
        place: of a point in the index's sequence.
        wasted: candidates that were looked at in vain since then.
    """

    def __init__(self, points: Floats, p: int) -> None:
        self.points, self.p, self.count = points, p, len(points)
        self.kind = _Tree if points.shape[1] <= TREE_DIMENSIONS else _Scan
        self.taken = bytearray(self.count + 1)
        self.gone = np.frombuffer(self.taken, np.uint8)[: self.count]
        self.rows = np.full((self.count, self.kind.NEIGHBOURS + 1), self.count, np.int32)
        self.known = np.zeros(self.count, bool)
        self.place = np.empty(self.count, np.int64)

    def run(self, here: int) -> Integers:
        """The chain from point `here`."""
        order = np.empty(self.count, np.int64)
        self.build(here)
        for i in range(self.count):
            order[i] = here
            self.taken[here] = 1
            if i + 1 < self.count:
                here = self.next(here, self.count - i)
        return order

    def build(self, here: int) -> None:
        """A new index of what is left, and of `here`."""
        left = self.gone == 0
        left[here] = True
        self.index = self.kind(self.points, np.flatnonzero(left), self.p)
        self.place[self.index.sequence] = np.arange(len(self.index.sequence))
        self.wasted = 0

    def next(self, here: int, left: int) -> int:
        """The nearest point that is not taken."""
        if not self.known[here]:
            if left < SHRINK * len(self.index.ids):
                self.build(here)
            self.look_up(here)
        taken = self.taken
        for there in self.rows[here].tolist():
            if not taken[there]:
                break
        return there if there < self.count else self.widen(here)

    def look_up(self, here: int) -> None:
        """Fill the row of `here`, and of others that lie beside it in the index."""
        at = self.place[here] // self.kind.BATCH * self.kind.BATCH
        batch = self.index.sequence[at : at + self.kind.BATCH]
        batch = batch[~self.known[batch] & ((self.gone[batch] == 0) | (batch == here))]
        found = self.ranked(batch, self.kind.NEIGHBOURS)
        self.rows[batch, : found.shape[1]] = found
        self.known[batch] = True

    def widen(self, here: int) -> int:
        """The nearest point that is not taken, beyond the row of `here`."""
        k = self.kind.NEIGHBOURS
        while True:
            k *= 4
            if self.wasted > len(self.index.ids):
                self.build(here)
            self.wasted += k
            row = self.ranked(np.array([here]), k)[0]
            row = row[row < self.count]
            free = row[self.gone[row] == 0]
            if len(free):
                return int(free[0])

    def ranked(self, which: Integers, k: int) -> Integers:
        """The k nearest of each point by distance and number; `count` for those that are not certain."""
        k = min(k, len(self.index.ids))
        found, bound = self.index.nearest(which, k)
        found = np.sort(found, axis=1)
        distances = _summed(np.abs(self.points[found] - self.points[which][:, None]) ** self.p)
        ranks = np.argsort(distances, axis=1, kind="stable")
        certain = np.take_along_axis(distances, ranks, axis=1) < bound[:, None]
        if k == len(self.index.ids):
            certain[:] = True
        return np.where(certain, np.take_along_axis(found, ranks, axis=1), self.count)
