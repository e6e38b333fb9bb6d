"""Rows of normalisations."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from graphcomp.onnx.rows.layers import fill
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading, as_tensor
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.writing import Call, Writing

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
def write_batch_norm(call: Call, writing: Writing) -> str:
    """By running statistics."""
    names = ("input", "weight", "bias", "running_mean", "running_var")
    return writing.add(
        "BatchNormalization", [writing.value(call.given[n]) for n in names], epsilon=call.given["eps"]
    )
