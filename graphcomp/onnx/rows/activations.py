"""Rows of element-wise functions of one tensor."""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from graphcomp.onnx.rows.layers import fill, shared
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.wires import NoRow, Wire
from graphcomp.onnx.rows.writing import Writing

# ---- reading

_PLAIN: dict[str, Callable[..., Any]] = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp, "Log": torch.log,
    "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal, "Abs": torch.abs, "Neg": torch.neg, "Erf": torch.erf,
    "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin,
    "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan,
    "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "HardSwish": F.hardswish, "Softsign": F.softsign, "Mish": F.mish,
}  # fmt: skip
"""Functions of the same meaning that take nothing else."""


@reads(*_PLAIN)
def read_plain(node: Node, reading: Reading) -> Made:
    """The function of the same name."""
    return reading.call(_PLAIN[node.operator], reading.tensor(node.input(0)))


@reads("LeakyRelu", "Elu", "Celu", "ThresholdedRelu")
def read_sloped(node: Node, reading: Reading) -> Made:
    """A function with one number."""
    x = reading.tensor(node.input(0))
    alpha = node.number("alpha", 0.01 if node.operator == "LeakyRelu" else 1.0)
    if node.operator == "ThresholdedRelu":
        return reading.call(F.threshold, x, alpha, 0.0)
    function = {"LeakyRelu": F.leaky_relu, "Elu": F.elu, "Celu": F.celu}[node.operator]
    return reading.call(function, x, alpha)


_SELU = (1.6732632423543772, 1.0507009873554805)


@reads("Selu")
def read_selu(node: Node, reading: Reading) -> Made:
    """Selu, or a scaled elu where its numbers are others."""
    x = reading.tensor(node.input(0))
    alpha, gamma = node.number("alpha", _SELU[0]), node.number("gamma", _SELU[1])
    if np.allclose((alpha, gamma), _SELU, rtol=1e-6):
        return reading.call(F.selu, x)
    return reading.call(operator.mul, reading.call(F.elu, x, alpha), gamma)


@reads("Softplus")
def read_softplus(node: Node, reading: Reading) -> Made:
    """Log(1 + exp(x)); torch takes x itself above 20, where float32 knows no difference."""
    return reading.call(F.softplus, reading.tensor(node.input(0)))


@reads("Gelu")
def read_gelu(node: Node, reading: Reading) -> Made:
    """Exact, or by tanh."""
    return reading.call(F.gelu, reading.tensor(node.input(0)), approximate=node.word("approximate", "none"))


@reads("Swish")
def read_swish(node: Node, reading: Reading) -> Made:
    """The function x * sigmoid(alpha * x)."""
    x, alpha = reading.tensor(node.input(0)), node.number("alpha", 1.0)
    if alpha == 1.0:
        return reading.call(F.silu, x)
    return reading.call(operator.mul, x, reading.call(torch.sigmoid, reading.call(operator.mul, x, alpha)))


@reads("HardSigmoid")
def read_hard_sigmoid(node: Node, reading: Reading) -> Made:
    """Torch's own has a slope of 1/6; others are written out."""
    x = reading.tensor(node.input(0))
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return reading.call(F.hardsigmoid, x)
    line = reading.call(operator.add, reading.call(operator.mul, x, alpha), beta)
    return reading.call(torch.clamp, line, 0.0, 1.0)


@reads("Shrink")
def read_shrink(node: Node, reading: Reading) -> Made:
    """Hard or soft."""
    x, bias, lambd = reading.tensor(node.input(0)), node.number("bias", 0.0), node.number("lambd", 0.5)
    if bias not in (0.0, lambd) or lambd < 0:
        raise node.refusal(f"bias={bias} and lambd={lambd}", "bias 0 or lambd", "torch has no such function")
    return reading.call(F.softshrink if bias else F.hardshrink, x, lambd)


@reads("Clip")
def read_clip(node: Node, reading: Reading) -> Made:
    """Clamp; relu6 where it is that."""
    x = reading.tensor(node.input(0))
    low, high = (_bound(node, reading, x, i, name) for i, name in ((1, "min"), (2, "max")))
    if isinstance(low, Made) or isinstance(high, Made):
        for bound, function in ((low, torch.maximum), (high, torch.minimum)):
            if bound is not None:
                bound = bound if isinstance(bound, Made) else reading.tensor(Known((np.array(bound),)))
                x = reading.call(function, x, bound)
        return x
    if (low, high) == (0.0, 6.0) and x.dtype.is_floating_point:
        return reading.call(F.relu6, x)
    return x if low is None and high is None else reading.call(torch.clamp, x, low, high)


def _bound(node: Node, reading: Reading, x: Made, index: int, name: str) -> Any:
    """A number, a node, or None for no bound."""
    if node.has(name):
        number: Any = node.number(name, 0.0)
    else:
        value = node.optional(index)
        number = None if value is None else reading.operand(value, x)
    if isinstance(number, float) and (np.isinf(number) or abs(number) >= float(np.finfo(np.float32).max)):
        return None  # no bound: the largest number is what operator sets before 11 have for it
    return number


@reads("PRelu")
def read_prelu(node: Node, reading: Reading) -> Made:
    """A layer where there is one slope, or one a channel."""
    x, slope = reading.tensor(node.input(0)), node.input(1)
    if isinstance(slope, Known) and slope.is_constant:
        array = slope.array
        shape = (1,) * (x.rank - array.ndim) + array.shape
        per_channel = x.rank >= 2 and shape[1] in (1, x.shape[1])
        if array.size == 1 or per_channel and array.size == shape[1]:
            module = nn.PReLU(array.size, device="meta")
            fill(module, weight=Known((array.reshape(-1),)))
            return reading.layer(node, module, x, key=shared("prelu", slope, None))
    slope = reading.tensor(slope)
    negative = reading.call(torch.lt, x, 0.0)
    return reading.call(torch.where, negative, reading.call(operator.mul, x, slope), x)


@reads("Softmax", "LogSoftmax")
def read_softmax(node: Node, reading: Reading) -> Made:
    """Along one axis; before operator set 13 along all from `axis` on."""
    x = reading.tensor(node.input(0))
    function = torch.softmax if node.operator == "Softmax" else torch.log_softmax
    if node.opset >= 13:
        return reading.call(function, x, node.axis("axis", -1, x.rank))
    axis = node.axis("axis", 1, x.rank)
    if all(n == 1 for shape in x.shapes for n in shape[axis + 1 :]):
        return reading.call(function, x, axis)
    flat = reading.call(function, reading.call(torch.flatten, x, axis), axis)
    return reading.call(torch.unflatten, flat, axis, tuple(reading.sizes([s[axis:] for s in x.shapes], [x])))


@reads("Hardmax")
def read_hardmax(node: Node, reading: Reading) -> Made:
    """One at the first maximum, zero elsewhere."""
    x = reading.tensor(node.input(0))
    if node.opset < 13:
        raise node.refusal(
            f"operator set {node.opset}", "13 or later", "convert it with onnx.version_converter"
        )
    axis = node.axis("axis", -1, x.rank)
    at = reading.call(torch.argmax, x, axis, True)
    ones = reading.call(torch.ones_like, x)
    return reading.call(torch.scatter, reading.call(torch.zeros_like, x), axis, at, ones)


# ---- writing

_OPERATORS = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "selu": "Selu", "mish": "Mish",
    "hardswish": "HardSwish", "softsign": "Softsign",
}  # fmt: skip


@writes(*_OPERATORS)
def write_plain(writing: Writing, input: Any) -> str:
    """The operator of the same name."""
    return writing.op(_OPERATORS[writing.operator], input)


@writes("relu6")
def write_relu6(writing: Writing, input: Any) -> str:
    """Clip to 0 … 6."""
    return write_hardtanh(writing, input, 0.0, 6.0)


@writes("hardtanh")
def write_hardtanh(writing: Writing, input: Any, min_val: float = -1.0, max_val: float = 1.0) -> str:
    """Clip."""
    return writing.op("Clip", input, *(writing.number(v, writing.dtype) for v in (min_val, max_val)))


@writes("hardsigmoid")
def write_hardsigmoid(writing: Writing, input: Any) -> str:
    """HardSigmoid with torch's slope."""
    return writing.op("HardSigmoid", input, alpha=1 / 6, beta=0.5)


@writes("leaky_relu")
def write_leaky_relu(writing: Writing, input: Any, negative_slope: float = 0.01) -> str:
    """LeakyRelu."""
    return writing.op("LeakyRelu", input, alpha=float(negative_slope))


@writes("rrelu")
def write_rrelu(
    writing: Writing, input: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False
) -> str:
    """LeakyRelu with the mean of its slopes."""
    _refuse_training(training)
    return writing.op("LeakyRelu", input, alpha=(lower + upper) / 2)


@writes("elu", "celu")
def write_elu(writing: Writing, input: Any, alpha: float = 1.0) -> str:
    """Elu or Celu."""
    return writing.op(writing.operator.capitalize(), input, alpha=float(alpha))


@writes("prelu")
def write_prelu(writing: Writing, input: Wire, weight: Any) -> str:
    """PRelu, with a slope a channel."""
    slope = weight if weight.numel() == 1 else weight.reshape(-1, *[1] * (input.rank - 2))
    return writing.op("PRelu", input, slope)


@writes("gelu")
def write_gelu(writing: Writing, input: Any, approximate: str = "none") -> str:
    """x / 2 (1 + erf(x / sqrt 2)), which runtimes know by sight, or its approximation by tanh."""
    number = partial(writing.number, dtype=writing.dtype)
    if approximate == "none":
        spread = writing.op("Erf", writing.op("Div", input, number(math.sqrt(2))))
        product = writing.op("Mul", input, writing.op("Add", spread, number(1.0)))
        return writing.op("Mul", product, number(0.5))
    cube = writing.op("Mul", writing.op("Pow", input, number(3.0)), number(0.044715))
    inner = writing.op("Mul", writing.op("Add", input, cube), number(math.sqrt(2 / math.pi)))
    spread = writing.op("Add", writing.op("Tanh", inner), number(1.0))
    return writing.op("Mul", writing.op("Mul", input, number(0.5)), spread)


@writes("silu")
def write_silu(writing: Writing, input: Any) -> str:
    """x sigmoid(x)."""
    return writing.op("Mul", input, writing.op("Sigmoid", input))


@writes("logsigmoid")
def write_logsigmoid(writing: Writing, input: Any) -> str:
    """-softplus(-x)."""
    return writing.op("Neg", writing.op("Softplus", writing.op("Neg", input)))


@writes("softplus")
def write_softplus(writing: Writing, input: Any, beta: float = 1.0, threshold: float = 20.0) -> str:
    """log(1 + exp(beta x)) / beta; beyond torch's threshold the two differ by less than rounding."""
    if threshold < 20:
        raise NoRow(f"a threshold of {threshold}")
    if beta == 1:
        return writing.op("Softplus", input)
    factor = writing.number(beta, writing.dtype)
    return writing.op("Div", writing.op("Softplus", writing.op("Mul", input, factor)), factor)


@writes("tanhshrink")
def write_tanhshrink(writing: Writing, input: Any) -> str:
    """x - tanh(x)."""
    return writing.op("Sub", input, writing.op("Tanh", input))


@writes("hardshrink")
def write_hardshrink(writing: Writing, input: Any, lambd: float = 0.5) -> str:
    """Zero near zero."""
    return writing.op("Shrink", input, lambd=float(lambd), bias=0.0)


@writes("softshrink")
def write_softshrink(writing: Writing, input: Any, lambd: float = 0.5) -> str:
    """Towards zero."""
    return writing.op("Shrink", input, lambd=float(lambd), bias=float(lambd))


@writes("threshold")
def write_threshold(writing: Writing, input: Any, threshold: float, value: float) -> str:
    """x, or a value where x is not above the threshold."""
    above = writing.op("Greater", input, writing.number(threshold, writing.dtype))
    return writing.op("Where", above, input, writing.number(value, writing.dtype))


@writes("softmax", "log_softmax", "softmin")
def write_softmax(
    writing: Writing, input: Wire, dim: int | None = None, dtype: Any = None, module: Any = None
) -> str:
    """Softmax along an axis, of the value or its negative, or its logarithm."""
    axis = -3 if isinstance(module, nn.Softmax2d) else dim
    if axis is None:
        raise NoRow("an axis that is left to torch; name it")
    x = writing.typed(input, writing.dtype)
    if writing.operator == "softmin":
        x = writing.op("Neg", x)
    return writing.op("LogSoftmax" if writing.operator == "log_softmax" else "Softmax", x, axis=axis)


@writes("glu")
def write_glu(writing: Writing, input: Wire, dim: int = -1) -> str:
    """The first half of an axis times the sigmoid of the second."""
    axis = input.axis(dim)
    size = input.shape[axis]
    if not isinstance(size, int):
        raise NoRow("halves of an open size")
    first, second = writing.several("Split", 2, input, writing.ints(size // 2, size // 2), axis=axis)
    return writing.op("Mul", first, writing.op("Sigmoid", second))


@writes("dropout", "dropout1d", "dropout2d", "dropout3d")
def write_dropout(writing: Writing, input: Any, p: float = 0.5, training: bool = True) -> Any:
    """Nothing, in eval mode."""
    _refuse_training(training)
    return input


@writes("alpha_dropout", "feature_alpha_dropout")
def write_alpha_dropout(writing: Writing, input: Any, p: float = 0.5, training: bool = False) -> Any:
    """Nothing, in eval mode."""
    _refuse_training(training)
    return input


@writes("stochastic_depth")
def write_stochastic_depth(writing: Writing, input: Any, p: float, mode: str, training: bool = True) -> Any:
    """Nothing, in eval mode."""
    _refuse_training(training)
    return input


def _refuse_training(training: bool) -> None:
    if training:
        raise NoRow("training mode")
