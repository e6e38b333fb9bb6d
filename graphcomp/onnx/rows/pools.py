"""Rows of pooling."""

import torch.nn.functional as F

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.values import Made
from graphcomp.onnx.rows.windows import padded, pads_of
from graphcomp.onnx.rows.writing import Call, Writing

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_GLOBAL_AVERAGES = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

# ---- reading


@reads("GlobalAveragePool")
def read_global_average_pool(node: Node, reading: Reading) -> Made:
    """An average over all of a plane."""
    x = reading.tensor(node.input(0))
    if x.rank - 2 not in _GLOBAL_AVERAGES:
        raise node.refusal(f"{x.rank} axes", "3 to 5", "torch has no such pooling")
    return reading.call(_GLOBAL_AVERAGES[x.rank - 2], x, 1 if x.rank == 3 else (1,) * (x.rank - 2))


@reads("MaxPool")
def read_max_pool(node: Node, reading: Reading) -> Made:
    """A maximum over windows."""
    x = reading.tensor(node.input(0))
    kernel = node.integers("kernel_shape") or ()
    rank = len(kernel)
    if rank not in _MAX_POOLS or x.rank != rank + 2:
        raise node.refusal(f"{rank} spatial axes", "1, 2 or 3", "torch has no such pooling")
    strides = node.integers("strides", (1,) * rank) or ()
    dilations = node.integers("dilations", (1,) * rank) or ()
    before, after = pads_of(node, x, kernel, strides, dilations)
    node.only("ceil_mode", 0, 0)
    node.ignore("storage_order")  # of the indices, which are a second output
    padding = before if before == after else [0] * rank
    if before != after:
        x = padded(reading, x, before, after, float("-inf"))
    return reading.call(_MAX_POOLS[rank], x, kernel, strides, tuple(padding), dilations)


# ---- writing


@writes("max_pool1d", "max_pool2d", "max_pool3d")
def write_max_pool(call: Call, writing: Writing) -> str:
    """MaxPool with its pads on both sides."""
    given = call.given
    return writing.add(
        "MaxPool",
        [writing.value(given["input"])],
        kernel_shape=list(given["kernel_size"]),
        strides=list(given["stride"]),
        pads=[*given["padding"], *given["padding"]],
        dilations=list(given["dilation"]),
        ceil_mode=int(given["ceil_mode"]),
    )
