"""A gather of computed positions that is a view: how exporters write `as_strided`, and some reshapes.

The positions are numbers that are known when the file is read. If they go up by the same step along every
axis, and the steps are those of the tensor that was flattened, the gather only takes its axes in another
order.
"""

import math
import operator
from typing import Any

import torch
from torch import fx

from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.shapes import place
from graphcomp.onnx.rows.values import Array, Known, Made


def strided(reading: Reading, flat: Made, positions: Known) -> Made | None:
    """What a gather from a flattened tensor takes, as a slice and a permutation of it; None if it is more."""
    source = _flattened(reading, flat)
    if source is None or positions.array.ndim == 0:
        return None
    plans = [_plan(v, s) for v, s in zip(positions.values, source.shapes, strict=True)]
    if any(p is None for p in plans):
        return None
    whole = [p for p in plans if p is not None]
    axes, starts, _ = max(whole, key=lambda p: len(p[0]))
    for plan, sizes in zip(whole, source.shapes, strict=True):
        # One sample says nothing of the axis of samples.
        if plan[:2] != (tuple(a for a in axes if sizes[a] > 1), starts):
            return None
    shapes = positions.shapes
    items: list[Any] = []
    for axis in range(source.rank):
        if axis not in axes:
            if any(s[axis] != 1 for s in source.shapes):
                items.append(slice(starts[axis], starts[axis] + 1))
                continue
        elif any(p[2].get(axis, 1) != s[axis] for p, s in zip(whole, source.shapes, strict=True)):
            counts = {p[2].get(axis, 1) for p in whole}
            if len(counts) != 1:
                return None
            items.append(slice(starts[axis], starts[axis] + counts.pop()))
            continue
        items.append(slice(None))
    result = source
    if any(i != slice(None) for i in items):
        result = reading.call(operator.getitem, result, tuple(items))
    order = [*(a for a in range(source.rank) if a not in axes), *axes]
    if order != sorted(order):
        result = reading.call(torch.permute, result, tuple(order))
    return place(reading, result, shapes)


def _flattened(reading: Reading, flat: Made) -> Made | None:
    """The tensor that a flatten or reshape made a vector of."""
    node = flat.node
    if node.op != "call_function" or node.target not in (torch.flatten, torch.reshape):
        return None
    source = node.args[0]
    return reading.made.get(source) if isinstance(source, fx.Node) else None


_Plan = tuple[tuple[int, ...], tuple[int, ...], dict[int, int]]


def _plan(positions: Array, shape: tuple[int, ...]) -> _Plan | None:
    """(axes in their new order, first position on every axis, elements taken of every axis)."""
    if not positions.size:
        return None
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    first = int(positions.flat[0])
    if not 0 <= first < math.prod(shape):
        return None
    expected: Any = first
    axes: list[int] = []
    counts: dict[int, int] = {}
    for k, size in enumerate(positions.shape):
        if size == 1:
            continue
        step = int(positions[tuple(1 if i == k else 0 for i in range(positions.ndim))]) - first
        found = [d for d, s in enumerate(strides) if s == step and shape[d] > 1 and d not in axes]
        if not found:
            return None
        axes.append(found[0])
        counts[found[0]] = size
        column = torch.arange(size).numpy() * step
        expected = expected + column.reshape([-1 if i == k else 1 for i in range(positions.ndim)])
    if not bool((positions == expected).all()):
        return None
    starts = tuple(first // s % n for s, n in zip(strides, shape, strict=True))
    if any(starts[d] + n > shape[d] for d, n in counts.items()):
        return None
    return tuple(axes), starts, counts
