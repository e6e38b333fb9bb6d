"""Rows of element-wise functions of one tensor."""

import operator
from collections.abc import Callable
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
from graphcomp.onnx.rows.writing import Call, Writing

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

_OPERATORS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


@writes(*_OPERATORS)
def write_plain(call: Call, writing: Writing) -> str:
    """The operator of the same name."""
    return writing.add(_OPERATORS[call.operator], [writing.value(call.given["input"])])
