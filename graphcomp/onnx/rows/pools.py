"""Rows of pooling."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.windows import Window, padded, pads_of, window_of
from graphcomp.onnx.rows.wires import NoRow, Wire, is_open, pairs
from graphcomp.onnx.rows.writing import Writing

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGES: dict[int, Callable[..., Any]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_GLOBAL: dict[str, dict[int, Callable[..., Any]]] = {
    "GlobalAveragePool": {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d},
    "GlobalMaxPool": {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d},
}

_NORMS: dict[int, Callable[..., Any]] = {1: F.lp_pool1d, 2: F.lp_pool2d, 3: F.lp_pool3d}
_MOST_POWER = 64

# ---- reading


@reads(*_GLOBAL)
def read_global_pool(node: Node, reading: Reading) -> Made:
    """An average or maximum over all of a plane."""
    x, table = reading.tensor(node.input(0)), _GLOBAL[node.operator]
    if x.rank - 2 not in table:
        raise node.refusal(f"{x.rank} axes", "3 to 5", "torch has no such pooling")
    return reading.call(table[x.rank - 2], x, 1 if x.rank == 3 else (1,) * (x.rank - 2))


@reads("MaxPool")
def read_max_pool(node: Node, reading: Reading) -> Made:
    """A maximum over windows."""
    x = reading.tensor(node.input(0))
    window = window_of(node, x, node.integers("kernel_shape"))
    before, after = pads_of(node, x, window)
    node.ignore("storage_order")  # of the second output
    ceil = bool(node.integer("ceil_mode", 0))
    padding: tuple[int, ...] = tuple(before)
    if not _fits(before, after, window):
        if ceil:
            after, ceil = _ceiled(node, x, window, before, after), False
        x, padding = padded(reading, x, before, after, float("-inf")), (0,) * window.rank
    return reading.call(
        _MAX_POOLS[window.rank], x, window.kernel, window.strides, padding, window.dilations, ceil
    )


@reads("AveragePool")
def read_average_pool(node: Node, reading: Reading) -> Made:
    """An average over windows, with or without the pads."""
    x = reading.tensor(node.input(0))
    window = window_of(node, x, node.integers("kernel_shape"))
    if set(window.dilations) != {1}:
        raise node.refusal("dilations", "none", "torch has no such pooling")
    before, after = pads_of(node, x, window)
    ceil, counted = bool(node.integer("ceil_mode", 0)), bool(node.integer("count_include_pad", 0))
    pool = _AVERAGES[window.rank]
    if _fits(before, after, window):
        return reading.call(
            pool, x, window.kernel, window.strides, tuple(before), ceil, counted or not any(before)
        )
    if ceil and counted:
        raise node.refusal("ceil_mode, pads that differ and count_include_pad", "two of them", "convert it")
    if ceil:
        after = _ceiled(node, x, window, before, after)
    x, plane = padded(reading, x, before, after, 0.0), x
    average = reading.call(pool, x, window.kernel, window.strides)
    if counted:
        return average
    return reading.call(operator.mul, average, reading.tensor(_shares(node, plane, window, before, after)))


def _fits(before: list[int], after: list[int], window: Window) -> bool:
    """Whether torch's pooling takes these pads."""
    return before == after and all(p <= k // 2 for p, k in zip(before, window.kernel, strict=True))


def _ceiled(node: Node, x: Made, window: Window, before: list[int], after: list[int]) -> list[int]:
    """Pads behind that make room for the window that `ceil_mode` adds.

    As torch and ONNX have it, that window must begin inside of the input or of the pads before it.
    """
    if len({s[2:] for s in x.shapes}) != 1:
        raise node.refusal("ceil_mode on an open size", "a fixed size", "give --input-shape")
    result = []
    axes = zip(x.shape[2:], before, after, window.extents, window.strides, strict=True)
    for size, b, a, reach, stride in axes:
        count = -(-(size + b + a - reach) // stride) + 1
        if (count - 1) * stride >= size + b:
            count -= 1
        result.append(max((count - 1) * stride + reach - size - b, 0))
    return result


def _shares(node: Node, x: Made, window: Window, before: list[int], after: list[int]) -> Known:
    """Elements of a window over those of it that are no pads."""
    if len({s[2:] for s in x.shapes}) != 1:
        raise node.refusal("pads that differ on an open size", "a fixed size", "give --input-shape")
    shares = np.ones((1,) * x.rank, np.float32)
    axes = zip(x.shape[2:], before, after, window.kernel, window.strides, strict=True)
    for axis, (size, b, a, kernel, stride) in enumerate(axes, start=2):
        starts = np.arange(0, size + b + a - kernel + 1, stride) - b
        inside = np.minimum(starts + kernel, size) - np.maximum(starts, 0)
        if (inside <= 0).any():
            raise node.refusal("a window of pads alone", "elements in every window", "use smaller pads")
        shape = [1] * x.rank
        shape[axis] = -1
        shares = shares * (np.float32(kernel) / inside.astype(np.float32)).reshape(shape)
    return Known((shares,))


@reads("LpPool")
def read_lp_pool(node: Node, reading: Reading) -> Made:
    """A norm over windows: of sizes, because torch's keeps the signs of odd powers."""
    x, order = reading.tensor(node.input(0)), node.integer("p", 2)
    window = window_of(node, x, node.integers("kernel_shape"))
    if set(window.dilations) != {1} or node.integer("ceil_mode", 0) or not 0 < order <= _MOST_POWER:
        raise node.refusal(f"p={order}, dilations or ceil_mode", "neither", "torch has no such pooling")
    x = padded(reading, x, *pads_of(node, x, window), 0.0)
    if order % 2:
        x = reading.call(torch.abs, x)
    kernel, strides = (n if window.rank > 1 else n[0] for n in (window.kernel, window.strides))
    return reading.call(_NORMS[window.rank], x, order, kernel, strides)


@reads("GlobalLpPool")
def read_global_lp_pool(node: Node, reading: Reading) -> Made:
    """A norm over all of a plane."""
    x = reading.tensor(node.input(0))
    if x.rank < 3:
        raise node.refusal(f"{x.rank} axes", "at least 3", "the file is not valid ONNX")
    return reading.call(
        torch.linalg.vector_norm, x, node.integer("p", 2), tuple(range(2, x.rank)), keepdim=True
    )


@reads("LRN")
def read_lrn(node: Node, reading: Reading) -> Made:
    """Normalised by what neighbouring channels have."""
    x, size = reading.tensor(node.input(0)), node.integer("size", 0)
    if size < 1 or size % 2 == 0:
        raise node.refusal(f"size={size}", "an odd number", "torch's window lies one channel to the left")
    alpha, beta, bias = node.number("alpha", 1e-4), node.number("beta", 0.75), node.number("bias", 1.0)
    return reading.call(F.local_response_norm, x, size, alpha, beta, bias)


# ---- writing


@writes("max_pool1d", "max_pool2d", "max_pool3d")
def write_max_pool(
    writing: Writing,
    input: Wire,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> str:
    """MaxPool; a last window that hangs over is a pad more at that end."""
    rank = _plane(writing)
    if return_indices or input.rank != rank + 2:
        raise NoRow("positions of the maxima" if return_indices else "an input without a batch")
    kernel, dilations = pairs(kernel_size, rank), pairs(dilation, rank)
    strides, pads = pairs(kernel if stride is None or stride == [] else stride, rank), pairs(padding, rank)
    after, ceil = _after(writing, input, kernel, strides, pads, dilations, ceil_mode)
    return writing.op(
        "MaxPool",
        input,
        kernel_shape=list(kernel),
        strides=list(strides),
        pads=[*pads, *after],
        dilations=list(dilations),
        ceil_mode=ceil,
    )


@writes("avg_pool1d", "avg_pool2d", "avg_pool3d")
def write_avg_pool(
    writing: Writing,
    input: Wire,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    """AveragePool; zeros beside the plane count, or do not."""
    rank = _plane(writing)
    if input.rank != rank + 2:
        raise NoRow("an input without a batch")
    kernel, pads = pairs(kernel_size, rank), pairs(padding, rank)
    strides = pairs(kernel if stride is None or stride == [] else stride, rank)
    after, ceil = _after(writing, input, kernel, strides, pads, (1,) * rank, ceil_mode)
    counted = count_include_pad and any(pads)
    if (list(pads) != after or ceil) and (counted or divisor_override):
        raise NoRow("windows that hang over the plane, with pads that count")
    if divisor_override and any(pads) and not count_include_pad:
        raise NoRow("a divisor of its own, with pads that do not count")
    name = writing.op(
        "AveragePool",
        input,
        kernel_shape=list(kernel),
        strides=list(strides),
        pads=[*pads, *after],
        count_include_pad=int(counted),
        ceil_mode=ceil,
    )
    if divisor_override:
        name = writing.op("Mul", name, writing.number(math.prod(kernel) / divisor_override, input.dtype))
    return name


@writes("lp_pool1d", "lp_pool2d", "lp_pool3d")
def write_lp_pool(
    writing: Writing,
    input: Wire,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
) -> str:
    """LpPool, of even norms: of odd ones torch's has the sign of what it sums."""
    rank = _plane(writing)
    if norm_type % 2 or ceil_mode or input.rank != rank + 2:
        raise NoRow(f"a norm of {norm_type}, or windows that hang over")
    kernel = pairs(kernel_size, rank)
    strides = pairs(kernel if stride is None or stride == [] else stride, rank)
    return writing.op("LpPool", input, p=int(norm_type), kernel_shape=list(kernel), strides=list(strides))


@writes("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def write_adaptive_avg_pool(writing: Writing, input: Wire, output_size: Any) -> str:
    """GlobalAveragePool or AveragePool; a matrix an axis where windows are of several sizes."""
    sizes = _adaptive(writing, input, output_size)
    if all(size == 1 for size in sizes):
        return writing.op("GlobalAveragePool", input)
    before = _closed(input)
    if before == sizes:
        return input.name
    if all(a % b == 0 for a, b in zip(before, sizes, strict=True)):
        kernel = [a // b for a, b in zip(before, sizes, strict=True)]
        return writing.op("AveragePool", input, kernel_shape=kernel, strides=kernel)
    name = input.name
    for axis, (size, into) in enumerate(zip(before, sizes, strict=True), 2):
        if size == into:
            continue
        matrix = torch.zeros(size, into, dtype=input.dtype)
        for i, (start, stop) in enumerate(_windows(size, into)):
            matrix[start:stop, i] = 1 / (stop - start)
        swap = list(range(input.rank))
        swap[axis], swap[-1] = swap[-1], swap[axis]
        last = axis == input.rank - 1
        name = name if last else writing.op("Transpose", name, perm=swap)
        name = writing.op("MatMul", name, matrix)
        name = name if last else writing.op("Transpose", name, perm=swap)
    return name


@writes("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def write_adaptive_max_pool(
    writing: Writing, input: Wire, output_size: Any, return_indices: bool = False
) -> str:
    """GlobalMaxPool or MaxPool; windows of several sizes are gathered, axis by axis."""
    if return_indices or isinstance(writing.results[0], tuple):
        raise NoRow("positions of the maxima")
    sizes = _adaptive(writing, input, output_size)
    if all(size == 1 for size in sizes):
        return writing.op("GlobalMaxPool", input)
    before = _closed(input)
    if all(a % b == 0 for a, b in zip(before, sizes, strict=True)):
        kernel = [a // b for a, b in zip(before, sizes, strict=True)]
        return writing.op("MaxPool", input, kernel_shape=kernel, strides=kernel)
    name = input.name
    for axis, (size, into) in enumerate(zip(before, sizes, strict=True), 2):
        windows = _windows(size, into)
        width = max(stop - start for start, stop in windows)
        index = torch.tensor([[min(start + i, stop - 1) for i in range(width)] for start, stop in windows])
        name = writing.op("Gather", name, index, axis=axis)
        name = writing.op("ReduceMax", name, writing.ints(axis + 1), keepdims=0)
    return name


def _plane(writing: Writing) -> int:
    """Spatial axes, from the operator's name."""
    return int(writing.operator[-2])


def _closed(input: Wire) -> tuple[int, ...]:
    """The sizes of a plane that has one size."""
    if any(map(is_open, input.shape[2:])):
        raise NoRow("windows of an open size")
    return input.shapes[0][2:]


def _adaptive(writing: Writing, input: Wire, output_size: Any) -> tuple[int, ...]:
    rank = _plane(writing)
    if input.rank != rank + 2:
        raise NoRow("an input without a batch")
    wanted = output_size if isinstance(output_size, tuple | list) else (output_size,) * rank
    wanted = tuple(wanted) * (rank if len(wanted) == 1 else 1)
    if all(isinstance(size, int) for size in wanted):
        return wanted
    before = _closed(input)
    return tuple(b if size is None else size for b, size in zip(before, wanted, strict=True))


def _windows(size: int, into: int) -> list[tuple[int, int]]:
    """Start and end of every window, as torch has them."""
    return [(i * size // into, -(-(i + 1) * size // into)) for i in range(into)]


def _after(
    writing: Writing,
    input: Wire,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    ceil_mode: bool,
) -> tuple[list[int], int]:
    """Pads behind a plane, and ONNX's `ceil_mode`: needed only where the size of the plane is open."""
    if not ceil_mode:
        return list(pads), 0
    if any(map(is_open, input.shape[2:])):
        return list(pads), 1
    after = []
    out = writing.result.shapes[0][2:]
    for size, made, k, s, p, d in zip(
        input.shapes[0][2:], out, kernel, strides, pads, dilations, strict=True
    ):
        after.append(max(p, (made - 1) * s + d * (k - 1) + 1 - size - p))
    return after, 0
