"""Rows that give a tensor another shape and keep the order of its elements."""

import math

import torch

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Made
from graphcomp.onnx.rows.writing import Call, Writing

# ---- reading


@reads("Flatten")
def read_flatten(node: Node, reading: Reading) -> Made:
    """A matrix."""
    x = reading.tensor(node.input(0))
    axis = node.integer("axis", 1)
    axis += x.rank if axis < 0 else 0
    if axis == 1 and x.rank > 1:
        return reading.call(torch.flatten, x, 1)
    raise node.refusal(f"axis={axis} of {x.rank} axes", "axis=1", "not yet read")


# ---- writing


@writes("flatten")
def write_flatten(call: Call, writing: Writing) -> str:
    """Flatten where it makes a matrix, else a Reshape of sizes that are copied from the input."""
    given = call.given
    shape = call.value.shape
    if given["start_dim"] == 1 and len(shape) == 2:
        return writing.add("Flatten", [writing.value(given["input"])], axis=1)
    target = writing.value([0] * given["start_dim"] + [-1] + list(shape[given["start_dim"] + 1 :]))
    assert math.prod(shape)
    return writing.add("Reshape", [writing.value(given["input"]), target])
