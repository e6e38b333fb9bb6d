"""A machine whose every operator takes a known time: what tests of latency targets measure with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

LAUNCH, ROW, COLUMN, BLOCK_PAIR = 0.02, 0.003, 0.005, 0.01
"""ms of an operator: at all, by block of inputs, by block of outputs, by pair and unit of work."""


def staircase(into: int, out: int, block: int, work: float, launch: float = LAUNCH) -> float:
    """ms of a convolution or matrix product with `work` kernel elements times output positions."""
    x, y = math.ceil(into / block), math.ceil(out / block)
    return launch + ROW * x + COLUMN * y + BLOCK_PAIR * x * y * work


class Machine:
    """A timer that computes what it would measure: the staircase of every convolution and matrix product.

    Args:
        block: channels that are computed together.
        slower: what whole networks (more than one input channel) take more than the sum of their operators.
        launch: ms of an operator whatever its widths.
        odd, odd_whole: times longer that operators of single kernels, and those of whole networks, take where
            the number of input channels is no multiple of 4 and more than 4.
    """

    def __init__(
        self,
        block: int = 8,
        slower: float = 1.0,
        launch: float = LAUNCH,
        odd: float = 1.0,
        odd_whole: float | None = None,
    ) -> None:
        self.block, self.slower, self.launch = block, slower, launch
        self.odd, self.odd_whole = odd, odd if odd_whole is None else odd_whole
        self.asked = 0

    def __call__(self, models: Sequence[bytes], feeds: Mapping[str, NDArray[Any]]) -> list[float]:
        self.asked += len(models)
        return [self._time(onnx.load_from_string(m)) for m in models]

    def _time(self, model: onnx.ModelProto) -> float:
        graph = onnx.shape_inference.infer_shapes(model).graph
        shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*graph.value_info, *graph.output)
        }
        weights = {w.name: list(w.dims) for w in graph.initializer}
        is_whole = graph.name != "microbench"
        total, odd = 0.0, self.odd_whole if is_whole else self.odd
        for node in graph.node:
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                out, into, *size = weights[node.input[1]]
                if node.op_type == "MatMul" or (node.op_type == "Gemm" and not _transposed(node)):
                    out, into = into, out
                plane = shapes[node.output[0]][2:] if node.op_type == "Conv" else []
                time = staircase(into, out, self.block, math.prod(size) * math.prod(plane), self.launch)
                total += time * (odd if into > 4 and into % 4 else 1.0)
        return total * (self.slower if is_whole else 1.0)


def _transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i for a in node.attribute)
