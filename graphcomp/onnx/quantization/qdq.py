"""A float model, ranges and scales become a QDQ model: ONNX Runtime's quantizer, told everything."""

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from graphcomp.onnx.quantization import grids
from graphcomp.onnx.quantization.grids import Grid
from graphcomp.onnx.quantization.layers import Layer
from graphcomp.onnx.quantization.ranges import Statistics

# The runtime widens scales at which a bias leaves int32; half of its range leaves room for the products.
_BIAS_LIMIT = 2.0**30


@dataclass(frozen=True)
class Choice:
    """All that is decided about a quantised model.

    Attributes:
        percentile: of the activations that their ranges hold; None: all.
        grid: of the weights.
        correct_bias: whether biases take what rounding the weights does to means.
        in_float: names of nodes that are not quantised.
    """

    percentile: float | None
    grid: Grid
    correct_bias: bool = True
    in_float: tuple[str, ...] = ()


def write_qdq(
    model: ModelProto, layers: Sequence[Layer], statistics: Statistics, choice: Choice
) -> ModelProto:
    """The model with u8 asymmetric activations, s8 symmetric weights by output channel, and int32 biases.

    Args:
        model: in float32; left as it is.
        layers, statistics: of this model.
        choice: what to do.
    """
    ranges = statistics.ranges(choice.percentile)
    taken = [layer for layer in layers if layer.name not in choice.in_float]
    weights = scales_of(taken, ranges, choice.grid)
    model = copy.deepcopy(model)
    if choice.correct_bias:
        correct_biases(model, taken, weights, statistics.means)
    return _quantize(model, ranges, taken, weights, choice.in_float)


def scales_of(
    layers: Sequence[Layer], ranges: Mapping[str, tuple[float, float]], grid: Grid
) -> dict[str, NDArray[np.float32]]:
    """One scale an output channel of every weight, by its name; a shared weight has those of all its
    layers."""
    found: dict[str, NDArray[np.float32]] = {}
    for layer in layers:
        low, high = ranges[layer.x]
        step = (max(high, 0.0) - min(low, 0.0)) / 255 or 1.0
        bias = np.zeros(layer.values.shape[layer.axis])
        if layer.bias_values is not None:
            bias = np.abs(layer.bias_values.astype(np.float64))
        kind: Grid = "plain" if grid == "pairs" and layer.depthwise else grid
        one = grids.scales(layer.taps(), kind, bias / step / _BIAS_LIMIT)
        found[layer.weight] = np.maximum(one, found.get(layer.weight, one))
    return found


def correct_biases(
    model: ModelProto,
    layers: Sequence[Layer],
    scales: Mapping[str, NDArray[np.float32]],
    means: Mapping[str, NDArray[np.float64]],
) -> None:
    """Give every convolution and Gemm a bias of its own that undoes what rounding does to its means.

    MatMul has no bias: what is added behind it is another node's.
    """
    nodes = {node.name: node for node in model.graph.node}
    taken = {i.name for i in model.graph.initializer} | {o for n in model.graph.node for o in n.output}
    for layer in layers:
        if layer.op == "MatMul":
            continue
        scale = scales[layer.weight]
        taps = layer.taps()
        rounded = grids.quantised(taps, scale).astype(np.float32) * scale[:, None]
        inner = layer.values.shape[1] if layer.op == "Conv" else taps.shape[1]
        lost = (taps - rounded).reshape(len(taps), -1, inner)
        before = 0.0 if layer.bias_values is None else layer.bias_values.astype(np.float64)
        after = (before + grids.shift(lost, means[layer.x], layer.groups)).astype(np.float32)
        name = f"{layer.name}.corrected_bias"
        while name in taken:
            name += "_"
        taken.add(name)
        model.graph.initializer.append(numpy_helper.from_array(after, name))
        node = nodes[layer.name]
        del node.input[2:]
        node.input.append(name)
    used = {name for node in model.graph.node for name in node.input}
    used |= {o.name for o in model.graph.output} | {i.name for i in model.graph.input}
    kept = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _quantize(
    model: ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    layers: Sequence[Layer],
    scales: Mapping[str, NDArray[np.float32]],
    in_float: Collection[str],
) -> ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    overrides: dict[str, list[dict[str, Any]]] = {
        layer.weight: [
            {"axis": layer.axis, "quant_type": QuantType.QInt8, "scale": scale, "zero_point": np.int8(0)}
            for scale in scales[layer.weight]
        ]
        for layer in layers
    }
    with _silent():
        quantizer = QDQQuantizer(
            save_and_reload_model_with_shape_infer(model),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, data),
            nodes_to_quantize=[],
            nodes_to_exclude=list(in_float),
            op_types_to_quantize=sorted({*QLinearOpsRegistry, *QDQRegistry}),
            extra_options={
                "TensorQuantOverrides": overrides,
                "ActivationSymmetric": False,
                "WeightSymmetric": True,
            },
        )
        quantizer.quantize_model()
    made = quantizer.model.model
    assert isinstance(made, ModelProto)
    return made


@contextmanager
def _silent() -> Iterator[None]:
    """The quantizer logs through the root logger, which is the application's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
