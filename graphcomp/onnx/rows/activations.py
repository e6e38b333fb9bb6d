"""Rows of element-wise functions of one tensor that networks put between layers."""

import torch

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Made
from graphcomp.onnx.rows.writing import Call, Writing

# ---- reading

_PLAIN = {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
"""Functions of the same meaning that take nothing else."""


@reads(*_PLAIN)
def read_plain(node: Node, reading: Reading) -> Made:
    """The function of the same name."""
    return reading.call(_PLAIN[node.operator], reading.tensor(node.input(0)))


# ---- writing

_OPERATORS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


@writes(*_OPERATORS)
def write_plain(call: Call, writing: Writing) -> str:
    """The operator of the same name."""
    return writing.add(_OPERATORS[call.operator], [writing.value(call.given["input"])])
