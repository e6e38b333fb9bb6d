"""Rows of normalisations."""

import torch
from torch import nn

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading, as_tensor
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Made
from graphcomp.onnx.rows.writing import Call, Writing

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


# ---- reading


@reads("BatchNormalization")
def read_batch_normalization(node: Node, reading: Reading) -> Made:
    """A layer by running statistics; one that follows the batch is refused."""
    x = reading.tensor(node.input(0))
    scale, bias, mean, var = (node.known(i, "statistics") for i in range(1, 5))
    node.only("training_mode", 0, 0)
    node.only("spatial", 1, 1)
    if x.rank not in _BATCH_NORMS:
        raise node.refusal(f"{x.rank} axes", "2 to 5", "torch has no such layer")
    assert scale is not None and mean is not None and var is not None
    momentum = 1 - node.number("momentum", 0.9)
    with torch.device("meta"):
        module = _BATCH_NORMS[x.rank](scale.array.size, node.number("epsilon", 1e-5), momentum)
    fill(module, weight=scale, bias=bias)
    module.running_mean, module.running_var = as_tensor(mean.array), as_tensor(var.array)
    module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return reading.layer(node, module, x)


# ---- writing


@writes("batch_norm")
def write_batch_norm(call: Call, writing: Writing) -> str:
    """By running statistics."""
    names = ("input", "weight", "bias", "running_mean", "running_var")
    return writing.add(
        "BatchNormalization", [writing.value(call.given[n]) for n in names], epsilon=call.given["eps"]
    )
