"""Rows of reductions, and of what goes along an axis."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.wires import NoRow, Wire, fixed, is_open
from graphcomp.onnx.rows.writing import Writing

# ---- reading


def _axes(node: Node, x: Made) -> tuple[int, ...]:
    """The axes that are reduced; empty for none."""
    axes, noop = node.listed("axes", 1), bool(node.integer("noop_with_empty_axes", 0))
    if not axes:
        return () if noop else tuple(range(x.rank))
    return tuple(node.along(a, x.rank) for a in axes)


def _kept(x: Made) -> dict[str, Any]:
    """What sums of whole numbers are told to keep their type, which torch widens."""
    return {} if x.dtype.is_floating_point or x.dtype == torch.int64 else {"dtype": x.dtype}


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
    kept = _kept(x) if node.operator == "ReduceSum" else {}
    return reading.call(_REDUCTIONS[node.operator], x, axes, keep, **kept)


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
    x = reading.call(torch.sum, x, axes, keep, **_kept(x))
    return x if after is None else reading.call(after, x)


@reads("ReduceProd")
def read_product(node: Node, reading: Reading) -> Made:
    """A product, axis by axis."""
    x = reading.tensor(node.input(0))
    keep = bool(node.integer("keepdims", 1))
    for axis in sorted(_axes(node, x), reverse=True):
        x = reading.call(torch.prod, x, axis, keep, **_kept(x))
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
        return reading.call(torch.cumsum, x, along, **_kept(x))
    flipped = reading.call(torch.flip, x, (along,))
    return reading.call(torch.flip, reading.call(torch.cumsum, flipped, along, **_kept(x)), (along,))


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

_SUMS = {"mean": "ReduceMean", "sum": "ReduceSum"}
_EXTREMES = {"max": "ReduceMax", "min": "ReduceMin", "amax": "ReduceMax", "amin": "ReduceMin"}


@writes(*_SUMS)
def write_sum(
    writing: Writing, input: Wire, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> str:
    """A sum or a mean, in the type of the result."""
    axes = _from_front(input, dim)
    is_plane = input.rank > 3 and axes == list(range(2, input.rank))
    if writing.operator == "mean" and is_plane and writing.dtype is input.dtype:
        pooled = writing.op("GlobalAveragePool", input)  # which keeps the layout of convolutions
        return pooled if keepdim else writing.op("Flatten", pooled, axis=1)
    return _reduced(writing, _SUMS[writing.operator], writing.typed(input, writing.dtype), axes, keepdim)


@writes("prod")
def write_prod(
    writing: Writing, input: Wire, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> str:
    """A product."""
    x = writing.typed(input, writing.dtype)
    return _reduced(writing, "ReduceProd", x, _from_front(input, dim), keepdim)


@writes("amax", "amin")
def write_extreme(writing: Writing, input: Wire, dim: Any = None, keepdim: bool = False) -> str:
    """The largest or the smallest."""
    axes = _from_front(input, None if dim in ((), []) else dim)
    return _reduced(writing, _EXTREMES[writing.operator], input, axes, keepdim)


@writes("max", "min")
def write_max(writing: Writing, input: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
    """The larger of two tensors, the largest of all, or that along an axis and where it is."""
    second = dim if isinstance(dim, Wire | Tensor) else other
    if second is not None:
        both = (writing.typed(x, writing.dtype) for x in (input, second))
        return writing.op(writing.operator.capitalize(), *both)
    values = _reduced(writing, _EXTREMES[writing.operator], input, _from_front(input, dim), keepdim)
    if dim is None:
        return values
    kind = "ArgMax" if writing.operator == "max" else "ArgMin"
    return values, writing.op(kind, input, axis=input.axis(dim), keepdims=int(keepdim))


@writes("argmax", "argmin")
def write_argmax(writing: Writing, input: Wire, dim: int | None = None, keepdim: bool = False) -> str:
    """Where the largest or smallest is."""
    kind = "ArgMax" if writing.operator == "argmax" else "ArgMin"
    if dim is None:
        flat = writing.op("Reshape", input, writing.ints(-1))
        return writing.op(kind, flat, axis=0, keepdims=0)
    return writing.op(kind, input, axis=input.axis(dim), keepdims=int(keepdim))


@writes("any", "all")
def write_any(writing: Writing, input: Wire, dim: Any = None, keepdim: bool = False) -> str:
    """Whether any, or every, value is not 0."""
    counted = writing.cast(writing.typed(input, torch.bool), torch.float32)
    kind = "ReduceMax" if writing.operator == "any" else "ReduceMin"
    return writing.cast(_reduced(writing, kind, counted, _from_front(input, dim), keepdim), torch.bool)


@writes("logsumexp")
def write_logsumexp(writing: Writing, input: Wire, dim: Any, keepdim: bool = False) -> str:
    """log(sum(exp(x)))."""
    return _reduced(writing, "ReduceLogSumExp", input, _from_front(input, dim), keepdim)


@writes("norm", "vector_norm")
def write_norm(
    writing: Writing, input: Wire, p: Any = None, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> str:
    """The norm of vectors; several axes are one vector."""
    many = isinstance(dim, tuple | list) and len(dim) == 2 or dim is None and input.rank == 2
    if writing.target is torch.linalg.norm and many and p not in (None, "fro"):
        raise NoRow("a norm of matrices")
    order, axes = 2 if p in (None, "fro") else p, _from_front(input, dim)
    if order in (1, 2):
        return _reduced(writing, f"ReduceL{int(order)}", input, axes, keepdim)
    if isinstance(order, str) or order == 0:
        raise NoRow(f"a norm of order {order!r}")
    size = writing.op("Abs", input)
    if math.isinf(order):
        return _reduced(writing, "ReduceMax" if order > 0 else "ReduceMin", size, axes, keepdim)
    total = writing.op("Pow", size, writing.number(float(order), writing.dtype))
    total = _reduced(writing, "ReduceSum", total, axes, keepdim)
    return writing.op("Pow", total, writing.number(1 / order, writing.dtype))


@writes("var_mean", "std_mean")
def write_var_mean(
    writing: Writing, input: Wire, dim: Any = None, *rest: Any, **named: Any
) -> tuple[str, str]:
    """Both."""
    variance = write_var(writing, input, dim, *rest, **named)
    keepdim = named.get("keepdim", rest[1] if len(rest) > 1 else False)
    axes = _from_front(input, None if isinstance(dim, bool) else dim)
    return variance, _reduced(writing, "ReduceMean", input, axes, keepdim)


@writes("var", "std")
def write_var(
    writing: Writing,
    input: Wire,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    correction: Any = None,
) -> str:
    """The mean square of what differs from the mean, over one value less unless it is said otherwise."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    axes = _from_front(input, dim)
    sizes = [input.shape[axis] for axis in axes]
    less = int(unbiased) if correction is None else correction
    if less and any(map(is_open, sizes)):
        raise NoRow("a variance over an open size")
    centred = writing.op("Sub", input, _reduced(writing, "ReduceMean", input, axes, True))
    result = _reduced(writing, "ReduceMean", writing.op("Mul", centred, centred), axes, keepdim)
    if less:
        count = math.prod(size for size in sizes if isinstance(size, int))
        result = writing.op("Mul", result, writing.number(count / (count - less), input.dtype))
    return writing.op("Sqrt", result) if writing.operator.startswith("std") else result


@writes("cumsum")
def write_cumsum(writing: Writing, input: Wire, dim: int, dtype: Any = None) -> str:
    """CumSum."""
    axis = writing.store(torch.tensor(input.axis(dim)))
    return writing.op("CumSum", writing.typed(input, writing.dtype), axis)


@writes("cumprod")
def write_cumprod(writing: Writing, input: Wire, dim: int, dtype: Any = None) -> str:
    """Products of 1, 2, 4, … neighbours, each of the last two: ONNX has sums only."""
    axis = input.axis(dim)
    size = fixed(input.shape[axis], "products along an axis")
    name, step = writing.typed(input, writing.dtype), 1
    while step < size:
        pads = [step if i == axis else 0 for i in range(2 * input.rank)]
        moved = writing.op("Pad", name, writing.ints(*pads), writing.number(1, writing.dtype))
        ends = (writing.ints(n) for n in (0, size, axis))
        name = writing.op("Mul", name, writing.op("Slice", moved, *ends))
        step *= 2
    return name


@writes("median")
def write_median(writing: Writing, input: Wire, dim: Any = None, keepdim: bool = False) -> Any:
    """The last of the smaller half, and where it is."""
    axis, value = 0 if dim is None else input.axis(dim), input.name
    what = "the median along an axis"
    if dim is None:
        size = math.prod(fixed(n, what) for n in input.shape)
        value = writing.op("Reshape", input, writing.ints(-1))
    else:
        size = fixed(input.shape[axis], what)
    both = writing.several("TopK", 2, value, writing.ints((size + 1) // 2), axis=axis, largest=0, sorted=1)
    at = writing.store(torch.tensor(-1 if dim is None or not keepdim else [-1]))
    found = tuple(writing.op("Gather", name, at, axis=axis) for name in both)
    return found[0] if dim is None else found


@writes("topk")
def write_topk(
    writing: Writing, input: Wire, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[str, ...]:
    """TopK: values and where they are."""
    axis = input.axis(dim)
    count = writing.size(k)
    return writing.several("TopK", 2, input, count, axis=axis, largest=int(largest), sorted=int(sorted))


def _from_front(input: Wire, dim: Any) -> list[int]:
    """All that are reduced, from the front."""
    dims = range(input.rank) if dim is None else dim if isinstance(dim, tuple | list) else (dim,)
    return sorted(input.axis(d) for d in dims)


def _reduced(writing: Writing, kind: str, value: Any, axes: list[int], keepdim: bool) -> str:
    if not axes:
        return writing.name(value)
    # ReduceSum takes axes as an input since opset 13, the others since opset 18
    return writing.op(kind, value, writing.ints(*axes), keepdims=int(keepdim))
