"""Rows of pooling."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn.functional as F

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.windows import Window, padded, pads_of, window_of
from graphcomp.onnx.rows.writing import Call, Writing

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGES: dict[int, Callable[..., Any]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_GLOBAL: dict[str, dict[int, Callable[..., Any]]] = {
    "GlobalAveragePool": {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d},
    "GlobalMaxPool": {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d},
}

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
def write_max_pool(call: Call, writing: Writing) -> str:
    """MaxPool with its pads on both sides."""
    given = call.given
    return writing.add(
        "MaxPool",
        [writing.value(given["input"])],
        kernel_shape=list(given["kernel_size"]),
        strides=list(given["stride"]),
        pads=[*given["padding"], *given["padding"]],
        dilations=list(given["dilation"]),
        ceil_mode=int(given["ceil_mode"]),
    )
