"""Rows of products of matrices."""

import operator

import numpy as np
import torch
from torch import nn

from graphcomp.onnx.rows.layers import fill, shared
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made, Value
from graphcomp.onnx.rows.writing import Call, Writing

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
def write_linear(call: Call, writing: Writing) -> str:
    """Gemm, which holds weights as torch does, for matrices."""
    names = [writing.value(call.given[name]) for name in ("input", "weight", "bias")]
    return writing.add("Gemm", names, transB=1)
