"""Rows of Conv and ConvTranspose."""

import operator
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from graphcomp.onnx.rows.layers import fill, shared
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made, Value
from graphcomp.onnx.rows.windows import Window, beside, padded, pads_of, window_of
from graphcomp.onnx.rows.wires import NoRow, Wire, pairs
from graphcomp.onnx.rows.writing import Writing

_LAYERS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


# ---- reading


@reads("Conv")
def read_conv(node: Node, reading: Reading) -> Made:
    """A layer, or a function where the weight is computed; pads that differ stand before it."""
    x, weight, bias = reading.tensor(node.input(0)), node.input(1), node.optional(2)
    window, shape = _window(node, x, weight)
    groups = node.integer("group", 1)
    _check_groups(node, groups, shape[0])
    before, after = pads_of(node, x, window)
    padding = tuple(before) if before == after else (0,) * window.rank
    if before != after:
        x = padded(reading, x, before, after, 0.0)
    settings = (window.strides, padding, window.dilations, groups)
    if not (_is_constant(weight) and _is_constant(bias)):
        tensors = [None if v is None else reading.tensor(v) for v in (weight, bias)]
        return reading.call(_FUNCTIONS[window.rank], x, *tensors, *settings)
    module = _LAYERS[window.rank](
        shape[1] * groups, shape[0], window.kernel, *settings, bias=bias is not None, device="meta"
    )
    return _call(node, reading, "conv", module, x, weight, bias, *settings)


@reads("ConvTranspose")
def read_conv_transpose(node: Node, reading: Reading) -> Made:
    """A layer; where pads differ the larger result is cut."""
    x, weight, bias = reading.tensor(node.input(0)), node.input(1), node.optional(2)
    if not (_is_constant(weight) and _is_constant(bias)):
        raise node.refusal("a computed weight", "a constant one", "export the network with constant weights")
    window, shape = _window(node, x, weight)
    groups = node.integer("group", 1)
    _check_groups(node, groups, shape[0])
    extra = node.integers("output_padding", (0,) * window.rank) or ()
    before, after = _transposed_pads(node, x, window, extra)
    padding = tuple(before) if before == after else (0,) * window.rank
    settings = (window.strides, padding, extra, groups)
    module = _TRANSPOSED[window.rank](
        shape[0],
        shape[1] * groups,
        window.kernel,
        *settings,
        bias=bias is not None,
        dilation=window.dilations,
        device="meta",
    )
    result = _call(node, reading, "conv_transpose", module, x, weight, bias, *settings, window.dilations)
    if before == after:
        return result
    cuts = (slice(b, -a if a else None) for b, a in zip(before, after, strict=True))
    return reading.call(operator.getitem, result, (slice(None), slice(None), *cuts))


def _transposed_pads(
    node: Node, x: Made, window: Window, extra: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """(before, after) to cut off along every axis."""
    wanted, auto = node.integers("output_shape"), node.word("auto_pad", "NOTSET")
    axes = list(zip(window.extents, window.strides, extra, strict=True))
    if wanted is not None:
        if len({s[2:] for s in x.shapes}) != 1:
            raise node.refusal("output_shape for an open size", "a fixed size", "give --input-shape")
        node.ignore("pads")
        sizes = zip(x.shape[2:], axes, wanted[-window.rank :], strict=True)
        total = [s * (n - 1) + e + reach - size for n, (reach, s, e), size in sizes]
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        node.ignore("pads")
        total = [reach + e - s for reach, s, e in axes]
    else:
        return pads_of(node, x, window)
    if min(total) < 0:
        raise node.refusal("an output larger than what is computed", "pads of 0 or more", "convert the file")
    less, more = [n // 2 for n in total], [n - n // 2 for n in total]
    return (
        (more, less) if auto == "SAME_LOWER" or wanted is not None and auto != "SAME_UPPER" else (less, more)
    )


def _window(node: Node, x: Made, weight: Value) -> tuple[Window, tuple[int, ...]]:
    """The window, and the shape of the weight, which must say the same."""
    shape = weight.array.shape if isinstance(weight, Known) else weight.shape
    kernel = node.integers("kernel_shape", shape[2:]) or shape[2:]
    if kernel != shape[2:]:
        raise node.refusal(f"kernel_shape={kernel}", f"{shape[2:]}", "the file is not valid ONNX")
    return window_of(node, x, kernel), shape


def _check_groups(node: Node, groups: int, channels: int) -> None:
    if groups < 1 or channels % groups or not channels:
        raise node.refusal(
            f"group={groups} for {channels} channels", "groups of equal size", "the file is not valid ONNX"
        )


def _is_constant(value: Value | None) -> bool:
    return value is None or (isinstance(value, Known) and value.is_constant)


def _call(
    node: Node,
    reading: Reading,
    kind: str,
    module: nn.Module,
    x: Made,
    weight: Value,
    bias: Value | None,
    *settings: Any,
) -> Made:
    assert isinstance(weight, Known) and not isinstance(bias, Made)
    fill(module, weight=weight, bias=bias)
    return reading.layer(node, module, x, key=shared(kind, weight, bias, *settings))


# ---- writing


@writes("conv1d", "conv2d", "conv3d")
def write_conv(
    writing: Writing,
    input: Wire,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> str:
    """Conv; what is not padded with zeros is padded in front of it."""
    kernel = _kernel(input, weight)
    rank = len(kernel)
    dilations, x = pairs(dilation, rank), writing.name(input)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        before, after = [t // 2 for t in totals], [t - t // 2 for t in totals]
    else:
        before = after = list(pairs(padding, rank))
    if padding_mode != "zeros" and any([*before, *after]):
        sides = {axis + 2: pair for axis, pair in enumerate(zip(before, after, strict=True))}
        x = beside(writing, input, sides, padding_mode)
        before = after = [0] * rank
    return writing.op(
        "Conv",
        x,
        weight,
        bias,
        kernel_shape=list(kernel),
        strides=list(pairs(stride, rank)),
        pads=[*before, *after],
        dilations=list(dilations),
        group=groups,
    )


@writes("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def write_conv_transpose(
    writing: Writing,
    input: Wire,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> str:
    """ConvTranspose, which holds weights as torch does."""
    kernel = _kernel(input, weight)
    rank = len(kernel)
    pads = pairs(padding, rank)
    return writing.op(
        "ConvTranspose",
        input,
        weight,
        bias,
        kernel_shape=list(kernel),
        strides=list(pairs(stride, rank)),
        pads=[*pads, *pads],
        output_padding=list(pairs(output_padding, rank)),
        dilations=list(pairs(dilation, rank)),
        group=groups,
    )


def _kernel(input: Wire, weight: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = tuple(weight.shape)
    if input.rank != len(shape):
        raise NoRow(f"an input of {input.rank} axes, which has no batch")
    return shape[2:]
