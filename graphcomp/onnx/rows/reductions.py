"""Rows of reductions, and of what goes along an axis."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads
from graphcomp.onnx.rows.values import Known, Made

# ---- reading


def _axes(node: Node, x: Made) -> tuple[int, ...]:
    """The axes that are reduced; empty for none."""
    axes, noop = node.listed("axes", 1), bool(node.integer("noop_with_empty_axes", 0))
    if not axes:
        return () if noop else tuple(range(x.rank))
    return tuple(node.along(a, x.rank) for a in axes)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceLogSumExp": torch.logsumexp,
}


@reads(*_REDUCTIONS)
def read_reduction(node: Node, reading: Reading) -> Made:
    """The function of the same meaning, over several axes at once."""
    x = reading.tensor(node.input(0))
    axes, keep = _axes(node, x), bool(node.integer("keepdims", 1))
    if not axes:
        return x
    return reading.call(_REDUCTIONS[node.operator], x, axes, keep)


_COMPOSED = {
    "ReduceL1": (torch.abs, None),
    "ReduceL2": (torch.square, torch.sqrt),
    "ReduceSumSquare": (torch.square, None),
    "ReduceLogSum": (None, torch.log),
}
"""What is done before and behind a sum."""


@reads(*_COMPOSED)
def read_composed(node: Node, reading: Reading) -> Made:
    """A sum with functions around it."""
    x = reading.tensor(node.input(0))
    before, after = _COMPOSED[node.operator]
    axes, keep = _axes(node, x), bool(node.integer("keepdims", 1))
    if not axes and node.opset >= 18:
        raise node.refusal("no axes", "one at least", "remove the node")
    x = x if before is None else reading.call(before, x)
    x = reading.call(torch.sum, x, axes, keep)
    return x if after is None else reading.call(after, x)


@reads("ReduceProd")
def read_product(node: Node, reading: Reading) -> Made:
    """A product, axis by axis."""
    x = reading.tensor(node.input(0))
    keep = bool(node.integer("keepdims", 1))
    for axis in sorted(_axes(node, x), reverse=True):
        x = reading.call(torch.prod, x, axis, keep)
    return x


@reads("ArgMax", "ArgMin")
def read_position(node: Node, reading: Reading) -> Made:
    """Where the largest or smallest element is, the first of equal ones."""
    x = reading.tensor(node.input(0))
    function = torch.argmax if node.operator == "ArgMax" else torch.argmin
    node.only("select_last_index", 0, 0)
    return reading.call(function, x, node.axis("axis", 0, x.rank), bool(node.integer("keepdims", 1)))


@reads("TopK")
def read_top_k(node: Node, reading: Reading) -> tuple[Made, ...]:
    """The largest (or smallest) elements, and where they are."""
    x = reading.tensor(node.input(0))
    count = node.listed("k", 1) if not node.has("k") else (node.integer("k", 0),)
    if count is None or len(count) != 1:
        raise node.refusal(f"k={count}", "one number", "the file is not valid ONNX")
    axis, largest = node.axis("axis", -1, x.rank), bool(node.integer("largest", 1))
    found = reading.call(torch.topk, x, count[0], axis, largest, bool(node.integer("sorted", 1)))
    return reading.parts(found)


@reads("CumSum")
def read_cumulated(node: Node, reading: Reading) -> Made:
    """Running sums."""
    x, axis = reading.tensor(node.input(0)), node.listed("axis", 1)
    node.only("exclusive", 0, 0)
    if axis is None or len(axis) != 1:
        raise node.refusal(f"axis={axis}", "one number", "the file is not valid ONNX")
    along = node.along(axis[0], x.rank)
    if not node.integer("reverse", 0):
        return reading.call(torch.cumsum, x, along)
    flipped = reading.call(torch.flip, x, (along,))
    return reading.call(torch.flip, reading.call(torch.cumsum, flipped, along), (along,))


@reads("LpNormalization")
def read_lp_normalization(node: Node, reading: Reading) -> Made:
    """Divided by its norm along an axis."""
    x = reading.tensor(node.input(0))
    order, axis = node.integer("p", 2), node.axis("axis", -1, x.rank)
    if order not in (1, 2):
        raise node.refusal(f"p={order}", "1 or 2", "the file is not valid ONNX")
    return reading.call(F.normalize, x, float(order), axis)


@reads("Einsum")
def read_einsum(node: Node, reading: Reading) -> Made:
    """A sum of products that an equation describes."""
    equation = node.word("equation", "").replace(" ", "")
    if not equation or not set(equation) <= _EQUATION:
        raise node.refusal(f"equation {equation!r:.80}", "letters, commas, '...' and '->'", "rewrite it")
    return reading.call(torch.einsum, equation, *map(reading.tensor, node.all_inputs()))


_EQUATION = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,->")


_MOST_CLASSES = 1 << 20


@reads("OneHot")
def read_one_hot(node: Node, reading: Reading) -> Made:
    """One of two values, depending on whether the index is the position along a new axis."""
    at, depth, values = reading.tensor(node.input(0)), node.listed("depth", 1), node.constant(2, "values")
    if depth is None or len(depth) != 1 or values is None or values.array.size != 2:
        raise node.refusal("no depth or values", "one depth and two values", "the file is not valid ONNX")
    if not 0 < depth[0] <= _MOST_CLASSES:
        raise node.refusal(f"depth {depth[0]}", f"1 to {_MOST_CLASSES}", "the file is not valid ONNX")
    axis = node.axis("axis", -1, at.rank + 1)
    positions = np.arange(depth[0]).reshape(-1, *(1,) * (at.rank - axis))
    at = reading.call(torch.unsqueeze, reading.method("to", at, torch.int64), axis)
    negative, wrapped = reading.call(torch.lt, at, 0), reading.call(operator.add, at, depth[0])
    at = reading.call(torch.where, negative, wrapped, at)
    hot = reading.call(torch.eq, at, reading.tensor(Known((positions,))))
    off, on = (reading.tensor(Known((v,))) for v in values.array.reshape(2, 1))
    return reading.call(torch.where, hot, on, off)


# ---- writing
