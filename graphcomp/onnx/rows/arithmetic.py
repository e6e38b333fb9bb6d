"""Rows of arithmetic on one or several tensors, element by element."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made, Value
from graphcomp.onnx.rows.wires import NoRow, Wire
from graphcomp.onnx.rows.writing import Writing

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
def read_cast(node: Node, reading: Reading) -> Value:
    """To another kind of number; between floating point types nothing, since a program has only one."""
    given = node.input(0)
    node.ignore("saturate", "round_mode")  # of 8-bit types, which are refused
    if isinstance(given, Known) and isinstance(like := node.input(1), Made):
        # Only its type is asked for: numbers stay numbers, or a bias that follows from them was no bias.
        kind = torch.empty(0, dtype=like.dtype).numpy().dtype
        changed = {id(v): v.astype(kind) for v in given.values}
        return Known(tuple(changed[id(v)] for v in given.values))
    x = reading.tensor(given)
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

_UNARY = {
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs", "neg": "Neg", "erf": "Erf", "sin": "Sin",
    "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh",
    "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh", "reciprocal": "Reciprocal",
    "sign": "Sign",
}  # fmt: skip


@writes(*_UNARY)
def write_unary(writing: Writing, input: Any) -> str:
    """The operator of the same name."""
    return writing.op(_UNARY[writing.operator], writing.typed(input, writing.dtype))


_ROUNDING = {"round": "Round", "floor": "Floor", "ceil": "Ceil"}


@writes(*_ROUNDING)
def write_rounding(writing: Writing, input: Wire) -> str:
    """The operator of the same name; whole numbers are what they are."""
    if not writing.dtype.is_floating_point:
        return input.name
    return writing.op(_ROUNDING[writing.operator], input)


@writes("trunc")
def write_trunc(writing: Writing, input: Wire) -> str:
    """Towards zero."""
    return writing.op("Mul", writing.op("Sign", input), writing.op("Floor", writing.op("Abs", input)))


@writes("rsqrt")
def write_rsqrt(writing: Writing, input: Any) -> str:
    """1 / sqrt(x)."""
    return writing.op("Reciprocal", writing.op("Sqrt", writing.typed(input, writing.dtype)))


@writes("square")
def write_square(writing: Writing, input: Any) -> str:
    """x x."""
    return writing.op("Mul", input, input)


@writes("log1p")
def write_log1p(writing: Writing, input: Any) -> str:
    """log(1 + x)."""
    return writing.op("Log", writing.op("Add", input, writing.number(1, writing.dtype)))


@writes("expm1")
def write_expm1(writing: Writing, input: Any) -> str:
    """exp(x) - 1."""
    return writing.op("Sub", writing.op("Exp", input), writing.number(1, writing.dtype))


@writes("log2", "log10")
def write_log_of_base(writing: Writing, input: Any) -> str:
    """log(x) / log(base)."""
    base = writing.number(math.log(int(writing.operator[3:])), writing.dtype)
    return writing.op("Div", writing.op("Log", input), base)


@writes("add", "sub", "rsub")
def write_add(writing: Writing, input: Any, other: Any, alpha: Any = 1) -> str:
    """x + alpha y, x - alpha y, or y - alpha x."""
    if writing.dtype is torch.bool:
        raise NoRow("a sum of truth values")
    first, second = (other, input) if writing.operator == "rsub" else (input, other)
    x, y = writing.typed(first, writing.dtype), writing.typed(second, writing.dtype)
    if alpha != 1:
        y = writing.op("Mul", y, writing.number(alpha, writing.dtype))
    return writing.op("Add" if writing.operator == "add" else "Sub", x, y)


@writes("mul")
def write_mul(writing: Writing, input: Any, other: Any) -> str:
    """A product."""
    if writing.dtype is torch.bool:
        return writing.op("And", input, other)
    return writing.op("Mul", *_operands(writing, input, other))


@writes("div")
def write_div(writing: Writing, input: Any, other: Any, rounding_mode: str | None = None) -> str:
    """A quotient, as it is or rounded."""
    if rounding_mode == "floor":
        return write_floordiv(writing, input, other)
    if rounding_mode is not None:
        raise NoRow(f"rounding_mode={rounding_mode!r}")
    return writing.op("Div", *_operands(writing, input, other))


@writes("floordiv")
def write_floordiv(writing: Writing, input: Any, other: Any) -> str:
    """A quotient rounded down: ONNX rounds those of whole numbers towards zero."""
    x, y = _operands(writing, input, other)
    if writing.dtype.is_floating_point:
        return writing.op("Floor", writing.op("Div", x, y))
    return writing.op("Div", writing.op("Sub", x, writing.op("Mod", x, y)), y)


@writes("remainder")
def write_remainder(writing: Writing, input: Any, other: Any) -> str:
    """What a division that rounds down leaves: of the divisor's sign."""
    x, y = _operands(writing, input, other)
    if not writing.dtype.is_floating_point:
        return writing.op("Mod", x, y)
    return writing.op("Sub", x, writing.op("Mul", writing.op("Floor", writing.op("Div", x, y)), y))


@writes("fmod")
def write_fmod(writing: Writing, input: Any, other: Any) -> str:
    """What a division that rounds towards zero leaves."""
    return writing.op("Mod", *_operands(writing, input, other), fmod=1)


@writes("pow")
def write_pow(writing: Writing, input: Any, exponent: Any) -> str:
    """A power."""
    return writing.op("Pow", *_operands(writing, input, exponent))


@writes("maximum", "minimum")
def write_extreme(writing: Writing, input: Any, other: Any) -> str:
    """The larger or the smaller of two."""
    kind = "Max" if writing.operator == "maximum" else "Min"
    return writing.op(kind, *_operands(writing, input, other))


@writes("fmax", "fmin")
def write_extreme_number(writing: Writing, input: Any, other: Any) -> str:
    """The same, of two of which one may be no number."""
    x, y = _operands(writing, input, other)
    both = writing.op("Max" if writing.operator == "fmax" else "Min", x, y)
    if not writing.dtype.is_floating_point:
        return both
    known = writing.op("Where", writing.op("IsNaN", y), x, both)
    return writing.op("Where", writing.op("IsNaN", x), y, known)


@writes("clamp")
def write_clamp(writing: Writing, input: Any, min: Any = None, max: Any = None) -> str:
    """Between two numbers, or two tensors."""
    x = writing.typed(input, writing.dtype)
    bounds = [None if b is None else writing.typed(b, writing.dtype) for b in (min, max)]
    if any(isinstance(b, Wire | Tensor) and b.shape != () for b in (min, max)):
        x = x if min is None else writing.op("Max", x, bounds[0])
        return x if max is None else writing.op("Min", x, bounds[1])
    return writing.op("Clip", x, *bounds)


@writes("clamp_min")
def write_clamp_min(writing: Writing, input: Any, min: Any) -> str:
    """Not below."""
    return write_clamp(writing, input, min=min)


@writes("clamp_max")
def write_clamp_max(writing: Writing, input: Any, max: Any) -> str:
    """Not above."""
    return write_clamp(writing, input, max=max)


@writes("lerp")
def write_lerp(writing: Writing, input: Any, end: Any, weight: Any) -> str:
    """x + weight (y - x)."""
    x, y = _operands(writing, input, end)
    part = writing.op("Mul", writing.op("Sub", y, x), writing.typed(weight, writing.dtype))
    return writing.op("Add", x, part)


@writes("addcmul", "addcdiv")
def write_addc(writing: Writing, input: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> str:
    """x + value y z, or x + value y / z."""
    y, z = _operands(writing, tensor1, tensor2)
    part = writing.op("Mul" if writing.operator == "addcmul" else "Div", y, z)
    if value != 1:
        part = writing.op("Mul", part, writing.number(value, writing.dtype))
    return writing.op("Add", writing.typed(input, writing.dtype), part)


@writes("atan2")
def write_atan2(writing: Writing, input: Any, other: Any) -> str:
    """atan(y / x), half a turn further where x is negative, and 0 where both are."""
    y, x = _operands(writing, input, other)
    zero, turn = (writing.number(v, writing.dtype) for v in (0.0, math.pi))
    both = writing.op("And", writing.op("Equal", x, zero), writing.op("Equal", y, zero))
    ratio = writing.op("Where", both, zero, writing.op("Div", y, x))
    behind = writing.op("Where", writing.op("Less", y, zero), writing.op("Neg", turn), turn)
    shift = writing.op("Where", writing.op("Less", x, zero), behind, zero)
    return writing.op("Add", writing.op("Atan", ratio), shift)


def _operands(writing: Writing, *values: Any) -> list[str]:
    """In the type of the result."""
    return [writing.typed(value, writing.dtype) for value in values]
