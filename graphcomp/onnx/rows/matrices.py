"""Rows of products of matrices."""

import torch
from torch import nn

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Known, Made
from graphcomp.onnx.rows.writing import Call, Writing

# ---- reading


@reads("Gemm")
def read_gemm(node: Node, reading: Reading) -> Made:
    """A Linear layer: alpha and beta go into its weights."""
    x = reading.tensor(node.input(0))
    weight, bias = node.known(1, "a matrix"), node.known(2, "a bias")
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    assert weight is not None
    if node.integer("transA", 0):
        x = reading.call(torch.transpose, x, 0, 1)
    matrix = weight.array if node.integer("transB", 0) else weight.array.T
    if bias is not None and bias.array.size != matrix.shape[0]:
        raise node.refusal(f"C of shape {bias.array.shape}", f"({matrix.shape[0]},)", "add it afterwards")
    with torch.device("meta"):
        module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    key = shared("gemm", weight, bias, alpha, beta, node.integer("transB", 0))
    vector = None if bias is None else Known((bias.array.reshape(-1) * beta,))
    fill(module, weight=Known((matrix * alpha,)), bias=vector)
    return reading.layer(node, module, x, key=key)


# ---- writing


@writes("linear")
def write_linear(call: Call, writing: Writing) -> str:
    """Gemm, which holds weights as torch does, for matrices."""
    names = [writing.value(call.given[name]) for name in ("input", "weight", "bias")]
    return writing.add("Gemm", names, transB=1)
