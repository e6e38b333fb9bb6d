"""The chain from column to column: neighbourhoods looked up once, and widened where all of one is taken."""

import numpy as np

from graphcomp.passes.dct.neighbours import Floats, Integers, Scan, Tree, summed

TREE_DIMENSIONS = 10
"""Above this a k-d tree visits most of its leaves, and scanning all columns by matrix products is faster."""

SHRINK = 0.5
"""An index is built again once this fraction of its columns is left."""


class Walk:
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
        self.kind = Tree if points.shape[1] <= TREE_DIMENSIONS else Scan
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
        distances = summed(np.abs(self.points[found] - self.points[which][:, None]) ** self.p)
        ranks = np.argsort(distances, axis=1, kind="stable")
        certain = np.take_along_axis(distances, ranks, axis=1) < bound[:, None]
        if k == len(self.index.ids):
            certain[:] = True
        return np.where(certain, np.take_along_axis(found, ranks, axis=1), self.count)
