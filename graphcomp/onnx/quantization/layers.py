"""The layers of an ONNX file whose weights become 8 bit numbers."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from graphcomp.errors import ExportError
from graphcomp.runtime import HEAVY

Weights = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or product with constant weights.

    Attributes:
        name: of its node; unique in the file.
        op: Conv, Gemm or MatMul.
        x, y: the tensors that it reads and makes.
        weight: name of the initialiser.
        axis: of the weight's output channels.
        values: the weight, as in the file.
        bias: name of the bias' initialiser; None without one.
        bias_values: (output channels,), None without one.
        groups: of a convolution, else 1.
    """

    name: str
    op: str
    x: str
    y: str
    weight: str
    axis: int
    values: Weights
    bias: str | None
    bias_values: Weights | None = None
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved alone: that kernel adds no pairs of products."""
        return self.op == "Conv" and self.values.shape[1] == 1 and self.values.shape[0] == self.groups

    @property
    def channels_last(self) -> bool:
        """Whether the channels of `x` are its last axis; else they are the second."""
        return self.op != "Conv"

    def taps(self, values: Weights | None = None) -> Weights:
        """The weight as (output channels, taps), taps in the order in which kernels add them: (kh, kw, c)."""
        values = self.values if values is None else values
        if self.op == "Conv":
            return np.moveaxis(values, 1, -1).reshape(len(values), -1)
        return values if self.axis == 0 else values.T

    def weight_of(self, taps: Weights) -> Weights:
        """The inverse of `taps`."""
        if self.op == "Conv":
            kernel = self.values.shape[2:]
            return np.moveaxis(taps.reshape(len(taps), *kernel, -1), -1, 1)
        return taps if self.axis == 0 else taps.T


def find_layers(model: ModelProto) -> tuple[list[Layer], dict[str, str]]:
    """The layers that can be quantised; and those that stay in float, node name → why.

    Raises ExportError where two nodes share a name, or a batch normalisation follows a convolution.
    """
    _check_names(model.graph.node)
    _check_folded(model)
    stored = {i.name: i for i in model.graph.initializer}
    layers, left = [], {}
    for node in model.graph.node:
        if node.op_type not in HEAVY:
            continue
        if node.op_type == "MatMul" and not any(name in stored for name in node.input):
            continue  # of two activations, which have no weights
        if why := _obstacle(node, {name: len(stored[name].dims) for name in node.input if name in stored}):
            left[node.name] = why
            continue
        values = numpy_helper.to_array(stored[node.input[1]])
        if values.dtype != np.float32:
            left[node.name] = f"its weight is {values.dtype}"
            continue
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        transposed = bool(_attribute(node, "transB", 0))
        axis = 0 if node.op_type == "Conv" or transposed else 1
        layers.append(
            Layer(
                name=node.name,
                op=node.op_type,
                x=node.input[0],
                y=node.output[0],
                weight=node.input[1],
                axis=axis,
                values=values,
                bias=bias,
                bias_values=None if bias is None else numpy_helper.to_array(stored[bias]),
                groups=int(_attribute(node, "group", 1)),
            )
        )
    return layers, left


def _obstacle(node: NodeProto, ranks: dict[str, int]) -> str | None:
    """Why a heavy node with these initialisers cannot be quantised."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return f"the runtime has no 8 bit {node.op_type} for CPUs"
    if len(node.input) < 2 or node.input[1] not in ranks:
        return "its weight is computed in the file"
    if node.input[0] in ranks:
        return "it reads a constant"
    if node.op_type != "Conv" and ranks[node.input[1]] != 2:
        return "its weight is no matrix"
    if node.op_type == "Gemm" and (
        _attribute(node, "transA", 0)
        or _attribute(node, "alpha", 1.0) != 1
        or _attribute(node, "beta", 1.0) != 1
    ):
        return "it transposes or scales what it multiplies"
    if len(node.input) > 2 and node.input[2] and ranks.get(node.input[2]) != 1:
        return "its bias is no constant vector"
    return None


def _attribute(node: NodeProto, name: str, default: float) -> float:
    for attribute in node.attribute:
        if attribute.name == name:
            return float(helper.get_attribute_value(attribute))
    return default


def _check_names(nodes: Iterable[NodeProto]) -> None:
    seen: set[str] = set()
    for node in nodes:
        if node.op_type in HEAVY and (not node.name or node.name in seen):
            raise ExportError(
                f"{node.op_type} that makes {node.output[0]!r}: found the name {node.name!r}, expected one "
                f"of its "
                "own; read the file with read_onnx and export it"
            )
        seen.add(node.name)


def _check_folded(model: ModelProto) -> None:
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        before = makers.get(node.input[0]) if node.input else None
        if node.op_type == "BatchNormalization" and before is not None and before.op_type == "Conv":
            raise ExportError(
                f"{node.name or node.output[0]}: found a batch normalisation behind the convolution "
                f"{before.name!r}, "
                "expected it folded into its weights; run the pass fold-bn before exporting"
            )
