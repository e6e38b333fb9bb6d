"""Rows of Conv and ConvTranspose."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading, as_tensor
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.windows import padded, pads_of
from graphcomp.onnx.rows.writing import Call, Writing

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


# ---- reading


@reads("Conv")
def read_conv(node: Node, reading: Reading) -> Made:
    """A layer; pads of two sides that differ stand before it."""
    x = reading.tensor(node.input(0))
    weight, bias = node.known(1, "a weight"), node.known(2, "a bias")
    assert weight is not None
    array = weight.array
    rank = array.ndim - 2
    if rank not in _CONVOLUTIONS or x.rank != rank + 2:
        raise node.refusal(f"{rank} spatial axes", "1, 2 or 3", "torch has no such convolution")
    kernel = node.integers("kernel_shape", array.shape[2:])
    if kernel != array.shape[2:]:
        raise node.refusal(f"kernel_shape={kernel}", f"{array.shape[2:]}", "the file is not valid ONNX")
    strides = node.integers("strides", (1,) * rank) or ()
    dilations = node.integers("dilations", (1,) * rank) or ()
    groups = node.integer("group", 1)
    before, after = pads_of(node, x, kernel, strides, dilations)
    padding = tuple(before) if before == after else (0,) * rank
    if before != after:
        x = padded(reading, x, before, after, 0.0)
    with torch.device("meta"):
        module = _CONVOLUTIONS[rank](
            array.shape[1] * groups,
            array.shape[0],
            kernel,
            strides,
            padding,
            dilations,
            groups,
            bias=bias is not None,
        )
    fill(module, weight=weight, bias=bias)
    key = shared("conv", weight, bias, strides, padding, dilations, groups)
    return reading.layer(node, module, x, key=key)


def fill(module: nn.Module, **tensors: Known | None) -> None:
    """Give a layer its parameters: copies of what the file has."""
    for name, known in tensors.items():
        if known is not None:
            module.register_parameter(name, nn.Parameter(as_tensor(known.array)))


def shared(kind: str, weight: Known, bias: Known | None, *settings: Any) -> tuple[Any, ...] | None:
    """Equal for nodes that call one layer: the same initialisers, and the same settings.

    None where the weight is no initialiser of two or more dimensions: exporters merge equal vectors, which
    says nothing.
    """
    if not weight.name or weight.array.ndim < 2 or (bias is not None and not bias.name):
        return None
    return (kind, weight.name, bias.name if bias is not None else "", *settings)


# ---- writing


@writes("conv1d", "conv2d", "conv3d")
def write_conv(call: Call, writing: Writing) -> str:
    """Conv with its pads on both sides."""
    given = call.given
    padding = given["padding"]
    return writing.add(
        "Conv",
        [writing.value(given[name]) for name in ("input", "weight", "bias")],
        strides=list(given["stride"]),
        pads=[*padding, *padding],
        dilations=list(given["dilation"]),
        group=given["groups"],
    )
