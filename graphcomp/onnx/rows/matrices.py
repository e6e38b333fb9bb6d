"""Rows of products of matrices."""

import operator
from typing import Any

import numpy as np
import torch
from torch import nn

from graphcomp.onnx.rows.layers import fill, shared
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made, Value
from graphcomp.onnx.rows.wires import NoRow, Wire, constant
from graphcomp.onnx.rows.writing import Writing

# ---- reading


@reads("MatMul")
def read_mat_mul(node: Node, reading: Reading) -> Made:
    """A Linear layer where the second matrix is known, else a product."""
    a, b = node.input(0), node.input(1)
    if isinstance(a, Made) and isinstance(b, Known) and b.is_constant and b.array.ndim == 2:
        into, out = b.array.shape
        module = nn.Linear(into, out, bias=False, device="meta")
        fill(module, weight=Known((b.array.T,)))
        return reading.layer(node, module, a, key=shared("matmul", b, None))
    return reading.call(torch.matmul, reading.tensor(a), reading.tensor(b))


@reads("Gemm")
def read_gemm(node: Node, reading: Reading) -> Made:
    """A Linear layer, alpha and beta in its weights, where the matrix is known; else products and sums."""
    x, matrix, added = reading.tensor(node.input(0)), node.input(1), node.optional(2)
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    if node.integer("transA", 0):
        x = reading.call(torch.transpose, x, 0, 1)
    turned = bool(node.integer("transB", 0))
    if not (isinstance(matrix, Known) and matrix.is_constant):
        product = _product(reading, x, reading.tensor(matrix), turned, alpha)
        return product if added is None else _sum(reading, product, added, beta)
    array = matrix.array if turned else matrix.array.T
    bias = _bias(added, array.shape[0])
    module = nn.Linear(array.shape[1], array.shape[0], bias=bias is not None, device="meta")
    vector = (
        None
        if bias is None
        else Known((np.broadcast_to(bias.array.reshape(-1), array.shape[:1]) * _f(beta, bias),))
    )
    fill(module, weight=Known((array * _f(alpha, matrix),)), bias=vector)
    key = shared("gemm", matrix, bias, alpha, beta, turned)
    result = reading.layer(node, module, x, key=key)
    return result if added is None or bias is not None else _sum(reading, result, added, beta)


def _f(number: float, beside: Known) -> np.generic:
    """A factor in the type of what it multiplies."""
    return beside.array.dtype.type(number)  # type: ignore[no-any-return]


def _bias(added: Value | None, width: int) -> Known | None:
    """What is added, if it is the same for every row."""
    if not isinstance(added, Known) or not added.is_constant:
        return None
    shape = (1,) * (2 - added.array.ndim) + added.array.shape
    return added if len(shape) == 2 and shape[0] == 1 and shape[1] in (1, width) else None


def _product(reading: Reading, x: Made, matrix: Made, turned: bool, alpha: float) -> Made:
    if turned:
        matrix = reading.call(torch.transpose, matrix, 0, 1)
    product = reading.call(torch.matmul, x, matrix)
    return product if alpha == 1.0 else reading.call(operator.mul, product, alpha)


def _sum(reading: Reading, product: Made, added: Value, beta: float) -> Made:
    term = reading.operand(added, product)
    if beta != 1.0:
        term = reading.call(operator.mul, term, beta) if isinstance(term, Made) else term * beta
    return reading.call(operator.add, product, term)


# ---- writing


@writes("linear")
def write_linear(writing: Writing, input: Wire, weight: Any, bias: Any = None) -> str:
    """Gemm for matrices, which holds weights as torch does; MatMul, with a weight on its side, for others."""
    if input.rank == 2:
        turned = constant(weight) and not weight.is_contiguous() and weight.t().is_contiguous()
        return writing.op("Gemm", input, weight.t() if turned else weight, bias, transB=int(not turned))
    product = writing.op("MatMul", input, writing.turned(weight))
    return product if bias is None else writing.op("Add", product, bias)


@writes("matmul", "mm", "bmm", "mv")
def write_matmul(writing: Writing, input: Any, other: Any) -> str:
    """A product of matrices."""
    return writing.op("MatMul", writing.typed(input, writing.dtype), writing.typed(other, writing.dtype))


@writes("addmm", "baddbmm")
def write_addmm(writing: Writing, input: Any, mat1: Any, mat2: Any, beta: float = 1, alpha: float = 1) -> str:
    """beta input + alpha mat1 mat2."""
    product = writing.op("MatMul", mat1, mat2)
    if alpha != 1:
        product = writing.op("Mul", product, writing.number(alpha, writing.dtype))
    added = writing.name(input)
    if beta != 1:
        added = writing.op("Mul", added, writing.number(beta, writing.dtype))
    return writing.op("Add", product, added)


@writes("einsum")
def write_einsum(writing: Writing, equation: str, *operands: Any) -> str:
    """MatMul where it is one of the last two axes, else Einsum."""
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        raise NoRow("an equation in numbers")
    equation = equation.replace(" ", "")
    terms = _as_matmul(equation) if len(operands) == 2 else None
    if terms is not None and isinstance(operands[1], Wire):
        return writing.op("MatMul", operands[0], _swapped(writing, operands[1]) if terms else operands[1])
    letters = dict.fromkeys(c for c in equation if c.isalpha())
    small = dict(zip(letters, "abcdefghijklmnopqrstuvwxyz", strict=False))
    return writing.op("Einsum", *operands, equation="".join(small.get(c, c) for c in equation))


def _as_matmul(equation: str) -> bool | None:
    """Whether the second operand is to be transposed for a MatMul to compute it; None if it is none."""
    if "." in equation or "->" not in equation:
        return None
    (a, b), out = equation.split("->")[0].split(","), equation.split("->")[1]
    batch = a[:-2]
    if not len(set(a)) == len(a) == len(b) == len(out) >= 2 or b[:-2] != batch or out[:-2] != batch:
        return None
    row, inner = a[-2], a[-1]
    if out[-2] != row or out[-1] in a:
        return None
    column = out[-1]
    return {inner + column: False, column + inner: True}.get(b[-2:])


def _swapped(writing: Writing, x: Wire) -> str:
    axes = list(range(x.rank))
    return writing.op("Transpose", x, perm=[*axes[:-2], axes[-1], axes[-2]])
