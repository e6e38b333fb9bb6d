"""Rows of comparisons, conditions and choices."""

from collections.abc import Callable
from typing import Any

import torch

from graphcomp.onnx.rows.arithmetic import pair
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Made, Value
from graphcomp.onnx.rows.wires import NoRow, Wire, example
from graphcomp.onnx.rows.writing import Writing

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

_COMPARISONS = {"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal"}


@writes(*_COMPARISONS, "ne")
def write_comparison(writing: Writing, input: Any, other: Any) -> str:
    """In the type that holds both."""
    dtype = torch.result_type(example(input), example(other))
    x, y = writing.typed(input, dtype), writing.typed(other, dtype)
    if writing.operator == "ne":
        return _wanted(writing, writing.op("Not", writing.op("Equal", x, y)))
    return _wanted(writing, writing.op(_COMPARISONS[writing.operator], x, y))


def _wanted(writing: Writing, truth: str) -> str:
    """A truth value; as a number where it was written in the place of one."""
    return truth if writing.dtype is torch.bool else writing.cast(truth, writing.dtype)


_LOGIC = {"and": "And", "or": "Or", "xor": "Xor"}


@writes("logical_and", "logical_or", "logical_xor")
def write_logical(writing: Writing, input: Any, other: Any) -> str:
    """Of truth values; of numbers, whether they are not 0."""
    kind = _LOGIC[writing.operator.removeprefix("logical_")]
    return _wanted(
        writing, writing.op(kind, writing.typed(input, torch.bool), writing.typed(other, torch.bool))
    )


@writes("logical_not")
def write_logical_not(writing: Writing, input: Any) -> str:
    """Whether a number is 0."""
    return _wanted(writing, writing.op("Not", writing.typed(input, torch.bool)))


@writes("bitwise_and", "bitwise_or", "bitwise_xor")
def write_bitwise(writing: Writing, input: Any, other: Any) -> str:
    """Of truth values, or bit by bit."""
    kind = _LOGIC[writing.operator.removeprefix("bitwise_")]
    kind = kind if writing.dtype is torch.bool else f"Bitwise{kind}"
    return writing.op(kind, writing.typed(input, writing.dtype), writing.typed(other, writing.dtype))


@writes("bitwise_not")
def write_bitwise_not(writing: Writing, input: Any) -> str:
    """Of truth values, or bit by bit."""
    return writing.op("Not" if writing.dtype is torch.bool else "BitwiseNot", input)


@writes("where")
def write_where(writing: Writing, condition: Any, input: Any, other: Any) -> str:
    """The first value where a condition holds; as a method, it is called on the first value."""
    if writing.target == "where":
        condition, input = input, condition
    if example(condition).dtype is not torch.bool:
        raise NoRow("a condition of numbers")
    return writing.op(
        "Where", condition, writing.typed(input, writing.dtype), writing.typed(other, writing.dtype)
    )


@writes("masked_fill")
def write_masked_fill(writing: Writing, input: Wire, mask: Any, value: Any) -> str:
    """A number where a mask holds."""
    return writing.op("Where", mask, writing.typed(value, writing.dtype), input)


@writes("isnan", "isinf")
def write_is(writing: Writing, input: Any) -> str:
    """IsNaN or IsInf."""
    return writing.op("IsNaN" if writing.operator == "isnan" else "IsInf", input)


@writes("nan_to_num")
def write_nan_to_num(
    writing: Writing, input: Any, nan: float | None = None, posinf: float | None = None,
    neginf: float | None = None,
) -> str:  # fmt: skip
    """Numbers in the place of what is none, and of infinities."""
    limits = torch.finfo(writing.dtype)
    name = writing.op("Where", writing.op("IsNaN", input), writing.number(nan or 0.0, writing.dtype), input)
    for sign, value in (
        (1, limits.max if posinf is None else posinf),
        (0, limits.min if neginf is None else neginf),
    ):
        found = writing.op("IsInf", name, detect_positive=sign, detect_negative=1 - sign)
        name = writing.op("Where", found, writing.number(value, writing.dtype), name)
    return name
