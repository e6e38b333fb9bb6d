"""Arithmetic on label tensors, the data that the channel analysis runs the graph on.

A label tensor is int64 and shaped like the activation that it stands for (batch 1); every element is the
label of its channel, 0 where there is none. Labels are constant along most axes and stay broadcast there
(stride 0), so that the label tensor of a 64x56x56 activation holds 64 numbers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Marks = NDArray[np.bool_]
"""One bool a channel id, or one a node in the order of the graph."""


def varying(labels: Tensor) -> tuple[int, ...]:
    """The axes along which the labels differ (not broadcast ones)."""
    return tuple(d for d in range(labels.ndim) if labels.size(d) > 1 and labels.stride(d) != 0)


def compact(labels: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """The labels with every broadcast axis, but those in `keep`, narrowed to one element."""
    for d in range(labels.ndim):
        if d not in keep and labels.size(d) > 1 and labels.stride(d) == 0:
            labels = labels.narrow(d, 0, 1)
    return labels


def canonical(labels: Tensor) -> Tensor:
    """The same labels, broadcast along every axis along which they turn out to be constant."""
    shape = labels.shape
    labels = compact(labels)
    for d in varying(labels):
        first, last = (labels.narrow(d, at, 1) for at in (0, labels.size(d) - 1))
        if torch.equal(first, last) and bool((labels == first).all()):  # most differ at the ends already
            labels = first
    return labels.expand(shape)


def along(vector: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """A vector of labels laid along one axis of `shape` and broadcast along the others."""
    view = [1] * len(shape)
    view[axis] = vector.numel()
    return vector.reshape(view).expand(tuple(shape))


def unlabelled(shape: Sequence[int]) -> Tensor:
    """Of what belongs to no channel."""
    return torch.zeros([1] * len(shape), dtype=torch.int64).expand(tuple(shape))


def concatenate(parts: Sequence[Tensor], axis: int) -> Tensor:
    """`torch.cat` that stays broadcast along the axes along which all parts are."""
    axis %= parts[0].ndim
    free = [
        d
        for d in range(parts[0].ndim)
        if d != axis and all(p.size(d) == 1 or (p.size(d) and p.stride(d) == 0) for p in parts)
    ]
    shape = list(parts[0].shape)
    shape[axis] = sum(p.size(axis) for p in parts)
    thin = list(parts)
    for d in free:
        thin = [p.narrow(d, 0, 1) for p in thin]
    return torch.cat(thin, axis).expand(shape)


def components(count: int, a: Ints, b: Ints) -> Ints:
    """The smallest member of each element's connected component, for elements 0..count-1 and edges a-b.

    Roots hook onto the smallest root that they touch, then all pointers are shortened; O(E log V) or better.
    """
    parent = np.arange(count)
    while True:
        ra, rb = parent[a], parent[b]
        open_ = ra != rb
        if not open_.any():
            return parent
        a, b, ra, rb = a[open_], b[open_], ra[open_], rb[open_]
        np.minimum.at(parent, np.maximum(ra, rb), np.minimum(ra, rb))
        while True:
            shorter = parent[parent]
            if np.array_equal(shorter, parent):
                break
            parent = shorter
