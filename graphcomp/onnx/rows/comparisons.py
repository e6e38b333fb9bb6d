"""Rows of comparisons, conditions and choices."""

from collections.abc import Callable
from typing import Any

import torch

from graphcomp.onnx.rows.arithmetic import pair
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads
from graphcomp.onnx.rows.values import Made, Value

# ---- reading

_COMPARES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Equal": (torch.eq, torch.eq),
    "Greater": (torch.gt, torch.lt),
    "Less": (torch.lt, torch.gt),
    "GreaterOrEqual": (torch.ge, torch.le),
    "LessOrEqual": (torch.le, torch.ge),
}
"""The function, and the one with its operands exchanged."""


@reads(*_COMPARES)
def read_comparison(node: Node, reading: Reading) -> Made:
    """A comparison; torch wants the tensor first."""
    function, exchanged = _COMPARES[node.operator]
    a, b = pair(node, reading)
    return reading.call(function, a, b) if isinstance(a, Made) else reading.call(exchanged, b, a)


_LOGICAL = {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}


@reads(*_LOGICAL)
def read_logical(node: Node, reading: Reading) -> Made:
    """An operator on truth values."""
    return reading.call(_LOGICAL[node.operator], *map(reading.tensor, node.all_inputs()))


_TESTS = {"Not": torch.logical_not, "IsNaN": torch.isnan}


@reads(*_TESTS)
def read_test(node: Node, reading: Reading) -> Made:
    """A question about every element."""
    return reading.call(_TESTS[node.operator], reading.tensor(node.input(0)))


@reads("IsInf")
def read_is_inf(node: Node, reading: Reading) -> Made:
    """Whether elements are infinite, of either sign or of one."""
    x = reading.tensor(node.input(0))
    negative, positive = node.integer("detect_negative", 1), node.integer("detect_positive", 1)
    if not negative and not positive:
        raise node.refusal("neither sign", "one at least", "remove the node")
    function = torch.isinf if negative and positive else torch.isneginf if negative else torch.isposinf
    return reading.call(function, x)


@reads("Where")
def read_where(node: Node, reading: Reading) -> Made:
    """A choice, element by element; single numbers (an infinite one, for a mask) are literals."""
    condition = reading.tensor(node.input(0))
    values: tuple[Value, Value] = (node.input(1), node.input(2))
    operands = [reading.operand(v, condition) for v in values]
    if not any(isinstance(o, Made) for o in operands):
        operands[0] = reading.tensor(values[0])
    return reading.call(torch.where, condition, *operands)


# ---- writing
