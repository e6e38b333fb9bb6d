"""Rows of arithmetic on one or several tensors, element by element."""

import torch

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Made
from graphcomp.onnx.rows.writing import Call, Writing

# ---- reading


@reads("Add")
def read_add(node: Node, reading: Reading) -> Made:
    """A sum."""
    return reading.call(torch.add, *map(reading.tensor, node.all_inputs()))


# ---- writing


@writes("add")
def write_add(call: Call, writing: Writing) -> str:
    """A sum."""
    return writing.add("Add", [writing.value(call.given[name]) for name in ("input", "other")])
