"""Rows of arithmetic on one or several tensors, element by element."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made, Value
from graphcomp.onnx.rows.writing import Call, Writing

# ---- reading


def pair(node: Node, reading: Reading) -> tuple[Any, Any]:
    """Two operands, at least one of them a node: single numbers are literals."""
    a, b = node.input(0), node.input(1)
    if isinstance(a, Made):
        return a, reading.operand(b, a)
    made = reading.tensor(b)
    return reading.operand(a, made), made


_PAIRS: dict[str, Callable[..., Any]] = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}


@reads(*_PAIRS)
def read_pair(node: Node, reading: Reading) -> Made:
    """An operator of two tensors."""
    return reading.call(_PAIRS[node.operator], *pair(node, reading))


@reads("Div")
def read_div(node: Node, reading: Reading) -> Made:
    """A quotient; whole numbers are cut towards zero."""
    a, b = pair(node, reading)
    made = a if isinstance(a, Made) else b
    if made.dtype.is_floating_point:
        return reading.call(operator.truediv, a, b)
    if not isinstance(a, Made):
        a = reading.tensor(node.input(0))
    return reading.call(torch.div, a, b, rounding_mode="trunc")


@reads("Pow")
def read_pow(node: Node, reading: Reading) -> Made:
    """A power; its type is that of the base."""
    a, b = pair(node, reading)
    made = a if isinstance(a, Made) else b
    result = reading.call(operator.pow, a, b)
    if result.dtype != made.dtype or not made.dtype.is_floating_point:
        raise node.refusal("powers of whole numbers", "of floating point numbers", "cast them before")
    return result


@reads("Mod")
def read_mod(node: Node, reading: Reading) -> Made:
    """The remainder with the sign of the divisor, or of the dividend with `fmod`."""
    a, b = pair(node, reading)
    if not isinstance(a, Made):
        a = reading.tensor(node.input(0))
    return reading.call(torch.fmod if node.integer("fmod", 0) else torch.remainder, a, b)


@reads("Max", "Min")
def read_extreme(node: Node, reading: Reading) -> Made:
    """The larger or smaller of tensors; a clamp where one of two is a single number."""
    function = torch.maximum if node.operator == "Max" else torch.minimum
    values = node.all_inputs()
    result = reading.tensor(_made_first(values))
    for value in _rest(values):
        other = reading.operand(value, result)
        if isinstance(other, Made):
            result = reading.call(function, result, other)
        else:
            bounds = {"min" if node.operator == "Max" else "max": other}
            result = reading.call(torch.clamp, result, **bounds)
    return result


@reads("Sum", "Mean")
def read_sum(node: Node, reading: Reading) -> Made:
    """A sum or mean of tensors."""
    values = node.all_inputs()
    result = reading.tensor(_made_first(values))
    for value in _rest(values):
        result = reading.call(operator.add, result, reading.operand(value, result))
    if node.operator == "Mean" and len(values) > 1:
        result = reading.call(operator.truediv, result, float(len(values)))
    return result


def _made_first(values: Sequence[Value]) -> Value:
    return next((v for v in values if isinstance(v, Made)), values[0])


def _rest(values: Sequence[Value]) -> list[Value]:
    first = _made_first(values)
    at = next(i for i, v in enumerate(values) if v is first)
    return [v for i, v in enumerate(values) if i != at]


@reads("Cast", "CastLike")
def read_cast(node: Node, reading: Reading) -> Made:
    """To another kind of number; between floating point types nothing, since a program has only one."""
    x = reading.tensor(node.input(0))
    node.ignore("saturate", "round_mode")  # of 8-bit types, which are refused
    if node.operator == "CastLike":
        like = node.input(1)
        wanted = (
            like.dtype
            if isinstance(like, Made)
            else reading.tensor(Known((like.array.reshape(-1)[:0],))).dtype
        )
    else:
        wanted = _type_of(node)
    if x.dtype == wanted:
        return x
    return reading.method("to", x, wanted)


_TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float32, 11: torch.float32, 16: torch.float32,
}  # fmt: skip
"""Number of a type in ONNX -> the type of the program: float16, bfloat16 and double become float32."""


def _type_of(node: Node) -> torch.dtype:
    to = node.integer("to", 0)
    if to not in _TYPES:
        raise node.refusal(f"a cast to type {to}", "float, a whole number or bool", "convert the file")
    return _TYPES[to]


@reads("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
def read_bitwise(node: Node, reading: Reading) -> Made:
    """An operator on the bits of whole numbers."""
    if node.operator == "BitShift":
        name = "left" if node.word("direction", "") == "LEFT" else "right"
        function = torch.bitwise_left_shift if name == "left" else torch.bitwise_right_shift
    else:
        function = {
            "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor
        }[node.operator]  # fmt: skip
    return reading.call(function, *map(reading.tensor, node.all_inputs()))


# ---- writing


@writes("add")
def write_add(call: Call, writing: Writing) -> str:
    """A sum."""
    return writing.add("Add", [writing.value(call.given[name]) for name in ("input", "other")])
