"""Rows of normalisations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from graphcomp.onnx.rows.layers import fill
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading, as_tensor
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.wires import NoRow, Wire, is_open
from graphcomp.onnx.rows.writing import Writing

_BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_INSTANCE_NORMS: dict[int, Callable[..., nn.Module]] = {
    3: nn.InstanceNorm1d,
    4: nn.InstanceNorm2d,
    5: nn.InstanceNorm3d,
}


# ---- reading


def _vector(node: Node, index: int, what: str, size: int) -> Known:
    """A constant input of that many numbers."""
    value = node.constant(index, what)
    if value is None or value.array.shape != (size,):
        found = "none" if value is None else f"shape {value.array.shape}"
        raise node.refusal(f"{what}: {found}", f"({size},)", "the file is not valid ONNX")
    return value


@reads("BatchNormalization")
def read_batch_normalization(node: Node, reading: Reading) -> Made:
    """A layer by running statistics; one that follows the batch is refused."""
    x = reading.tensor(node.input(0))
    if x.rank not in _BATCH_NORMS:
        raise node.refusal(f"{x.rank} axes", "2 to 5", "torch has no such layer")
    names = ("scale", "B", "mean", "var")
    scale, bias, mean, var = (_vector(node, i, what, x.shape[1]) for i, what in enumerate(names, start=1))
    node.only("training_mode", 0, 0)
    if node.opset < 14 and len(node.proto.output) > 1:  # which is how these versions ask for it
        raise node.refusal(
            "statistics of the batch (more than one output)",
            "running ones",
            "the file was exported in training mode: export it in eval mode, or take the other outputs away",
        )
    node.only("spatial", 1, 1)
    momentum, eps = 1 - node.number("momentum", 0.9), node.number("epsilon", 1e-5)
    module = _BATCH_NORMS[x.rank](x.shape[1], eps, momentum, device="meta")
    fill(module, weight=scale, bias=bias)
    module.running_mean, module.running_var = as_tensor(mean.array), as_tensor(var.array)
    module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return reading.layer(node, module, x)


@reads("InstanceNormalization")
def read_instance_normalization(node: Node, reading: Reading) -> Made:
    """A layer by the statistics of every sample's planes."""
    x = reading.tensor(node.input(0))
    if x.rank not in _INSTANCE_NORMS:
        raise node.refusal(f"{x.rank} axes", "3 to 5", "torch has no such layer")
    scale, bias = (_vector(node, i, what, x.shape[1]) for i, what in ((1, "scale"), (2, "B")))
    eps = node.number("epsilon", 1e-5)
    module = _INSTANCE_NORMS[x.rank](x.shape[1], eps, affine=True, device="meta")
    fill(module, weight=scale, bias=bias)
    return reading.layer(node, module, x)


@reads("GroupNormalization")
def read_group_normalization(node: Node, reading: Reading) -> Made:
    """A layer; before operator set 21 there is one scale a group."""
    x, groups = reading.tensor(node.input(0)), node.integer("num_groups", 0)
    channels = x.shape[1] if x.rank > 1 else 0
    if groups < 1 or channels % groups:
        raise node.refusal(f"{groups} groups of {channels}", "equal ones", "the file is not valid ONNX")
    node.ignore("stash_type")
    each = channels if node.opset >= 21 else groups
    scale, bias = (
        Known((np.repeat(_vector(node, i, what, each).array, channels // each),))
        for i, what in ((1, "scale"), (2, "bias"))
    )
    module = nn.GroupNorm(groups, channels, node.number("epsilon", 1e-5), device="meta")
    fill(module, weight=scale, bias=bias)
    return reading.layer(node, module, x)


@reads("LayerNormalization", "RMSNormalization")
def read_layer_normalization(node: Node, reading: Reading) -> Made:
    """A layer over the last axes."""
    x = reading.tensor(node.input(0))
    axis = node.axis("axis", -1, x.rank)
    shape, eps = x.shape[axis:], node.number("epsilon", 1e-5)
    if len({s[axis:] for s in x.shapes}) != 1:
        raise node.refusal("normalised axes of an open size", "fixed ones", "give --input-shape")
    node.ignore("stash_type")
    scale, bias = node.constant(1, "scale"), None
    if node.operator == "LayerNormalization":
        bias = node.constant(2, "B")
        module: nn.Module = nn.LayerNorm(shape, eps, bias=bias is not None, device="meta")
    else:
        module = nn.RMSNorm(shape, eps, device="meta")
    fill(module, weight=_spread(node, scale, shape), bias=_spread(node, bias, shape))
    return reading.layer(node, module, x)


def _spread(node: Node, value: Known | None, shape: tuple[int, ...]) -> Known | None:
    """Parameters of a layer have the shape of what it normalises."""
    if value is None:
        return None
    try:
        return Known((np.broadcast_to(value.array, shape),))
    except ValueError as error:
        raise node.refusal(
            f"a scale of {value.array.shape}", f"{shape}", "the file is not valid ONNX"
        ) from error


# ---- writing


@writes("batch_norm")
def write_batch_norm(
    writing: Writing,
    input: Wire,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = False,
) -> str:
    """By running statistics."""
    if running_mean is None or running_var is None or training:
        raise NoRow("statistics of the batch")
    scale = torch.ones_like(running_mean) if weight is None else weight
    shift = torch.zeros_like(running_mean) if bias is None else bias
    return writing.op("BatchNormalization", input, scale, shift, running_mean, running_var, epsilon=eps)


@writes("layer_norm")
def write_layer_norm(
    writing: Writing,
    input: Wire,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = False,
) -> str:
    """Over the last axes."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, tuple | list) else (normalized_shape,)
    if any(map(is_open, shape)):
        raise NoRow("a normalisation over an open size")
    scale = torch.ones(shape, dtype=writing.dtype) if weight is None else weight
    return writing.op("LayerNormalization", input, scale, bias, axis=-len(shape), epsilon=eps)


@writes("rms_norm")
def write_rms_norm(
    writing: Writing, input: Wire, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> str:
    """x / sqrt(mean of squares + eps), as runtimes fuse it; an operator of its own is of operator set 23."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, tuple | list) else (normalized_shape,)
    if any(map(is_open, shape)):
        raise NoRow("a normalisation over an open size")
    small = torch.finfo(writing.dtype).eps if eps is None else eps
    square = writing.op("Pow", input, writing.number(2.0, writing.dtype))
    mean = writing.op("ReduceMean", square, writing.ints(*range(-len(shape), 0)), keepdims=1)
    size = writing.op("Sqrt", writing.op("Add", mean, writing.number(small, writing.dtype)))
    result = writing.op("Div", input, size)
    return result if weight is None else writing.op("Mul", result, weight)


@writes("group_norm")
def write_group_norm(
    writing: Writing,
    input: Wire,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = False,
) -> str:
    """InstanceNormalization with groups for channels, then scale and shift by channel."""
    one = torch.ones(num_groups, dtype=writing.dtype)
    grouped = writing.op("Reshape", input, writing.ints(0, num_groups, -1))
    name = writing.op("InstanceNormalization", grouped, one, torch.zeros_like(one), epsilon=eps)
    if any(map(is_open, input.shape[1:])):
        name = writing.op("Reshape", name, writing.op("Shape", input))
    else:
        name = writing.op("Reshape", name, writing.ints(-1, *input.shapes[0][1:]))
    for kind, vector in (("Mul", weight), ("Add", bias)):
        if vector is not None:
            name = writing.op(kind, name, vector.reshape(-1, *[1] * (input.rank - 2)))
    return name


@writes("instance_norm")
def write_instance_norm(
    writing: Writing,
    input: Wire,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: Any = None,
    eps: float = 1e-5,
    track_running_stats: bool = False,
) -> str:
    """By the statistics of every plane, or by running ones."""
    if running_mean is not None and (track_running_stats or not use_input_stats):
        return write_batch_norm(writing, input, running_mean, running_var, weight, bias, eps=eps)
    channels = input.shapes[0][1]
    if input.rank < 3:
        raise NoRow(f"{input.rank} axes")
    one = torch.ones(channels, dtype=writing.dtype)
    scale, shift = one if weight is None else weight, torch.zeros_like(one) if bias is None else bias
    return writing.op("InstanceNormalization", input, scale, shift, epsilon=eps)


@writes("LocalResponseNorm", "local_response_norm")
def write_local_response_norm(
    writing: Writing, input: Wire, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> str:
    """LRN, whose window lies otherwise where it has an even size."""
    if size % 2 == 0:
        raise NoRow(f"a window of {size}")
    return writing.op("LRN", input, size=size, alpha=float(alpha), beta=float(beta), bias=float(k))


@writes("normalize")
def write_normalize(writing: Writing, input: Wire, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> str:
    """x / max(norm, eps) along an axis."""
    if p not in (1, 2) or not isinstance(dim, int):
        raise NoRow(f"a norm of p={p} along {dim}")
    norm = writing.op("ReduceL1" if p == 1 else "ReduceL2", input, writing.ints(input.axis(dim)), keepdims=1)
    return writing.op("Div", input, writing.op("Max", norm, writing.number(eps, writing.dtype)))
