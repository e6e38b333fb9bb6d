"""The greedy nearest-neighbour chain over the columns of a matrix (METHODS 4.2; Ulicny et al. 2020, Alg. 1).

    order[0] = argmax_j |x_j|                              of all columns; ties: the smallest j
    order[i] = argmin_j d(x_j, x_order[i-1])               of those not yet taken; ties: the smallest j

Exact without looking at all pairs: every column's few nearest neighbours are looked up once, in batches, and
the chain takes the first that is still free. Where all of them are taken the neighbourhood is widened; once
that has cost as much as a new index, the index is built again over the columns that are left.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graphcomp.errors import PassError
from graphcomp.passes.dct.neighbours import summed
from graphcomp.passes.dct.walk import Walk

OrderDistance = Literal["euclidean", "manhattan", "cosine"]
StartNorm = Literal["l1", "l2"]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


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
    first = int(np.argmax(summed(np.abs(x.T) if start == "l1" else x.T**2)))
    points = _unit(x.T) if distance == "cosine" else np.ascontiguousarray(x.T)
    if points.shape[1] == 1:
        return _sorted_from(points[:, 0], first)
    members, begins = _distinct(points)
    rank = np.empty(len(begins), np.int64)  # distinct columns are numbered by their smallest member,
    number = np.argsort(members[begins])  # so that ties fall as they must
    rank[number] = np.arange(len(number))
    at = np.searchsorted(begins, np.flatnonzero(members == first)[0], side="right") - 1
    walk = Walk(points[members[begins[number]]], 1 if distance == "manhattan" else 2).run(int(rank[at]))
    order = _expanded(members, begins, number[walk])
    return np.concatenate([[first], order[order != first]])


def _unit(points: Floats) -> Floats:
    """Columns of length 1; those of zeros get a dimension of their own, orthogonal to all others."""
    norms = np.sqrt(summed(points**2))
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
