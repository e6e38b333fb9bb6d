"""Rows of sliding blocks and of samples at computed places: fold, unfold, grid_sample."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Made
from graphcomp.onnx.rows.windows import beside
from graphcomp.onnx.rows.wires import NoRow, Wire, fixed, pairs
from graphcomp.onnx.rows.writing import Writing

# ---- reading

_MOST = 1 << 16


@reads("GridSample")
def read_grid_sample(node: Node, reading: Reading) -> Made:
    """Sampled at computed places."""
    x, grid = (reading.tensor(v) for v in node.all_inputs())
    mode = node.word("mode", "linear" if node.opset >= 20 else "bilinear")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    padding, corners = node.word("padding_mode", "zeros"), bool(node.integer("align_corners", 0))
    return reading.call(F.grid_sample, x, grid, mode, padding, corners)


@reads("Col2Im")
def read_col2im(node: Node, reading: Reading) -> Made:
    """Blocks are added up where they lie in an image."""
    x = reading.tensor(node.input(0))
    image, block = node.listed("image_shape", 1), node.listed("block_shape", 2)
    if image is None or block is None or x.rank != 3 or {len(image), len(block)} != {2}:
        raise node.refusal("blocks of other than 2 axes", "images", "torch folds these only")
    ones = (1, 1)
    dilations, strides = node.integers("dilations", ones) or ones, node.integers("strides", ones) or ones
    pads = node.integers("pads", (0,) * 4) or (0,) * 4
    if {len(dilations), len(strides)} != {2} or len(pads) != 4 or pads[:2] != pads[2:]:
        raise node.refusal(f"pads {pads}", "as many at both ends", "torch has no others")
    numbers = (*image, *block, *dilations, *strides, *pads)
    if not all(0 <= n <= _MOST for n in numbers) or min(numbers[:-4]) < 1:
        raise node.refusal(f"sizes {numbers}", "reasonable ones", "the file is not valid ONNX")
    return reading.call(F.fold, x, tuple(image), tuple(block), dilations, pads[:2], strides)


# ---- writing


@writes("grid_sample")
def write_grid_sample(
    writing: Writing,
    input: Wire,
    grid: Any,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> str:
    """GridSample; of operator set 18, which samples images only."""
    if input.rank != 4:
        raise NoRow(f"{input.rank} axes")
    mode, padding_mode = _word(_MODES, mode), _word(_BORDERS, padding_mode)
    corners = int(bool(align_corners))
    return writing.op("GridSample", input, grid, mode=mode, padding_mode=padding_mode, align_corners=corners)


_MODES, _BORDERS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
"""As `torch.grid_sampler` counts them."""


def _word(words: tuple[str, ...], said: Any) -> str:
    return said if isinstance(said, str) else words[said]


@writes("meshgrid")
def write_meshgrid(writing: Writing, *tensors: Any, indexing: str = "ij") -> tuple[str, ...]:
    """Every vector along an axis of its own, repeated along the others."""
    given = tensors[0] if isinstance(tensors[0], tuple | list) else tensors
    if any(len(x.shape) != 1 for x in given):
        raise NoRow("numbers where vectors were expected")
    axes = list(range(len(given)))
    if indexing == "xy":
        axes[:2] = axes[:2][::-1]
    sizes = writing.sizes([given[axis].shape[0] for axis in axes])
    others = [[axis for axis in range(len(axes)) if axes[axis] != i] for i in range(len(axes))]
    return tuple(
        writing.op("Expand", writing.op("Unsqueeze", x, writing.ints(*rest)) if rest else x, sizes)
        for x, rest in zip(given, others, strict=True)
    )


@writes("unfold")
def write_unfold(
    writing: Writing,
    input: Wire,
    kernel_size: Any = None,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    **named: Any,
) -> str:
    """Positions of every block, one Gather an axis: the values themselves, where a convolution adds zeros."""
    if isinstance(writing.target, str) or writing.target is Tensor.unfold:
        given = dict(zip(("dimension", "size", "step"), (kernel_size, dilation, padding), strict=True))
        return _windows(writing, input, **(given | named))
    if input.rank != 4:
        raise NoRow(f"{input.rank} axes")
    kernel, dilations, pads, strides = (pairs(v, 2) for v in (kernel_size, dilation, padding, stride))
    channels, *sizes = (fixed(n, "blocks of a plane") for n in input.shape[1:])
    name = beside(writing, input, {axis + 2: (n, n) for axis, n in enumerate(pads)}, "constant")
    blocks = 1
    for axis, size in enumerate(sizes):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        starts = np.arange(0, size + 2 * pads[axis] - reach + 1, strides[axis])
        index = np.arange(kernel[axis])[:, None] * dilations[axis] + starts
        name = writing.op("Gather", name, torch.from_numpy(index), axis=2 + 2 * axis)
        blocks *= len(starts)
    name = writing.op("Transpose", name, perm=[0, 1, 2, 4, 3, 5])
    return writing.op("Reshape", name, writing.ints(0, channels * kernel[0] * kernel[1], blocks))


def _windows(writing: Writing, input: Wire, dimension: int, size: int, step: int) -> str:
    """`Tensor.unfold`: windows along an axis, each on an axis of its own at the end."""
    axis = input.axis(dimension)
    length = fixed(input.shape[axis], "windows of an axis")
    starts = torch.arange(0, length - size + 1, step)
    name = writing.op("Gather", input, starts[:, None] + torch.arange(size), axis=axis)
    order = [*(a for a in range(input.rank + 1) if a != axis + 1), axis + 1]
    return name if order == sorted(order) else writing.op("Transpose", name, perm=order)


@writes("fold")
def write_fold(
    writing: Writing,
    input: Wire,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> str:
    """Col2Im."""
    if input.rank != 3:
        raise NoRow("blocks of one sample without a batch")
    image, kernel, dilations, pads, strides = (
        pairs(v, 2) for v in (output_size, kernel_size, dilation, padding, stride)
    )
    return writing.op(
        "Col2Im", input, writing.ints(*image), writing.ints(*kernel), dilations=list(dilations),
        pads=[*pads, *pads], strides=list(strides),
    )  # fmt: skip
