"""A float model, ranges and scales become a QDQ model: ONNX Runtime's quantizer, told everything."""

import base64
import copy
import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from graphcomp.errors import ExportError, first_line
from graphcomp.onnx.quantization import grids
from graphcomp.onnx.quantization.compensation import Steps, compensated
from graphcomp.onnx.quantization.grids import Grid
from graphcomp.onnx.quantization.layers import Layer
from graphcomp.onnx.quantization.ranges import Share
from graphcomp.onnx.quantization.sessions import Feeds
from graphcomp.onnx.quantization.shield import keep_in_float, leave_outputs
from graphcomp.onnx.quantization.spreading import Factors
from graphcomp.onnx.subgraphs import count_reads, reads
from graphcomp.records import Kernels, Plan, QuantizedChoice

# The runtime widens scales at which a bias leaves int32; half of its range leaves room for the products.
_BIAS_LIMIT = 2.0**30
_MOST_CHANNELS = 1 << 20
_MOST_WEIGHTS = 1 << 28
GPU_TYPES = ["Add", "Conv", "Gemm", "MatMul"]
"""Whose inputs TensorRT is given in 8 bits: layers, and additions, which it fuses into the layer before."""
_FACTORS, _STEPS = "factors of ", "steps of "  # in front of a tensor's name in a plan


@dataclass(frozen=True, eq=False)
class Choice:
    """All that is decided about a quantised model: with it the file is written again, without data.

    Attributes:
        grid: of the weights.
        percentile: what of the activations `ranges` hold.
        ranges: low and high of every float tensor, by its name; of one with infinities these, and what
            makes or reads it is in float.
        means: float64 (channels,) of every tensor that a layer reads, by its name.
        layers: names of nodes with 8 bit weights.
        in_float: names of the others that multiply.
        factors: of channels, by tensor, that are in the weights of the model that this was chosen for.
        steps: how far weights are from the nearest multiples, see `compensation`.
        kernels: whose terms the file is written in.
    """

    grid: Grid
    percentile: Share
    ranges: Mapping[str, tuple[float, float]]
    means: Mapping[str, NDArray[np.float64]]
    layers: tuple[str, ...]
    in_float: tuple[str, ...] = ()
    factors: Factors = field(default_factory=dict)
    steps: Steps = field(default_factory=dict)
    kernels: Kernels = "cpu"

    def plan(self) -> tuple[dict[str, Any], dict[str, str]]:
        """As `decisions` and `bulk` of a plan."""
        record = QuantizedChoice(
            grid=self.grid,
            percentile=self.percentile,
            layers=list(self.layers),
            in_float=list(self.in_float),
            ranges=dict(sorted(self.ranges.items())),
            spread=sorted(self.factors),
            compensated=sorted(self.steps),
            kernels=self.kernels,
        )
        bulk = {name: _packed(mean.astype("<f8")) for name, mean in sorted(self.means.items())}
        bulk |= {_FACTORS + n: _packed(factors.astype("<f8")) for n, factors in sorted(self.factors.items())}
        bulk |= {_STEPS + name: _packed(steps) for name, steps in sorted(self.steps.items())}
        return record.model_dump(mode="json"), bulk

    @classmethod
    def of(cls, plan: Plan) -> "Choice":
        """What `plan()` gave; ExportError if it is something else."""
        try:
            found = QuantizedChoice.model_validate(plan.decisions)
            bulk = dict(plan.bulk)
            steps = {n: _unpacked(bulk.pop(_STEPS + n), "i1", _MOST_WEIGHTS) for n in found.compensated}
            factors = {n: _unpacked(bulk.pop(_FACTORS + n), "<f8", _MOST_CHANNELS) for n in found.spread}
            means = {name: _unpacked(text, "<f8", _MOST_CHANNELS) for name, text in bulk.items()}
        except (KeyError, ValueError, zlib.error) as error:
            raise ExportError(
                f"plan {plan.name!r}: found decisions that are none of 8 bits ({first_line(error)}), "
                "expected those of plans/NN-quantize.json; quantise anew"
            ) from error
        layers, others = tuple(found.layers), tuple(found.in_float)
        return cls(
            found.grid, found.percentile, found.ranges, means, layers, others, factors, steps, found.kernels
        )


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes())).decode()


def _unpacked(text: str, kind: str, most: int) -> NDArray[Any]:
    """ValueError for more numbers than there can be."""
    most_bytes = most * np.dtype(kind).itemsize
    data = zlib.decompressobj().decompress(base64.b64decode(text), most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"more than {most} numbers")
    return np.frombuffer(data, kind)


def write_qdq(
    model: ModelProto, layers: Sequence[Layer], choice: Choice, only: str | None = None
) -> ModelProto:
    """The model with u8 asymmetric activations, s8 symmetric weights by output channel, and int32 biases.

    Args:
        model: in float32; left as it is.
        layers: of this model.
        choice: what to do.
        only: the one node that is quantised, whatever the choice leaves in float; None: all others.

    Raises:
        ExportError: if the choice is one for another model.
    """
    taken = [x for x in layers if (x.name in choice.layers if only is None else x.name == only)]
    _check_fits(taken, choice)
    scales = scales_of(taken, choice.ranges, choice.grid)
    weights = rounded_weights(model, taken, choice, scales)
    model = copy.deepcopy(model)
    correct_biases(model, taken, scales, weights, choice.means)
    _put(model, taken, scales, weights)
    return _quantize(model, choice, taken, scales, only)


def compensate(
    model: ModelProto, layers: Sequence[Layer], choice: Choice, batches: Sequence[Feeds]
) -> Choice:
    """The choice with weights that are rounded for these samples."""
    taken = [layer for layer in layers if layer.name in choice.layers]
    scales = scales_of(taken, choice.ranges, choice.grid)
    return replace(choice, steps=compensated(model, taken, scales, choice.grid, batches))


def rounded_weights(
    model: ModelProto, layers: Sequence[Layer], choice: Choice, scales: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.int8]]:
    """Multiples (output channels, taps) of these scales that the weights of these layers become, by name.

    The nearest ones where something else reads the weight, which must not see what these layers make up for.

    Raises:
        ExportError: if the choice is one for another model.
    """
    own = _read_by_these(model, layers)
    found: dict[str, NDArray[np.int8]] = {}
    for layer in layers:
        nearest = grids.quantised(layer.taps(), scales[layer.weight])
        steps = choice.steps.get(layer.weight)
        if steps is not None and layer.weight in own:
            fits = steps.size == nearest.size
            moved = nearest.astype(np.int16) + steps.reshape(nearest.shape) if fits else None
            if moved is None or (np.abs(moved) > grids.LARGEST[choice.grid] + 1).any():
                raise ExportError(
                    f"{layer.name}: found {steps.size} steps for its {nearest.size} weights, or some that "
                    "lead beyond 8 bits, expected a plan made for this file; quantise anew"
                )
            nearest = moved.astype(np.int8)
        found[layer.weight] = nearest
    return found


def _read_by_these(model: ModelProto, layers: Sequence[Layer]) -> set[str]:
    """Weights of layers that nothing else reads."""
    read, readers = count_reads(model), Counter(layer.weight for layer in layers)
    return {name for name, count in readers.items() if read[name] == count}


def _put(
    model: ModelProto,
    layers: Sequence[Layer],
    scales: Mapping[str, NDArray[np.float32]],
    weights: Mapping[str, NDArray[np.int8]],
) -> None:
    """These multiples in the place of weights, in place: ONNX Runtime's quantizer rounds to the nearest.

    Only where nothing else reads them.
    """
    own, stored = _read_by_these(model, layers), {i.name: i for i in model.graph.initializer}
    for layer in layers:
        if layer.weight in own:
            values = weights[layer.weight].astype(np.float32) * scales[layer.weight][:, None]
            new = np.ascontiguousarray(layer.weight_of(values))
            stored[layer.weight].CopyFrom(numpy_helper.from_array(new, layer.weight))


def _check_fits(layers: Sequence[Layer], choice: Choice) -> None:
    for layer in layers:
        mean, ends = choice.means.get(layer.x), choice.ranges.get(layer.x)
        channels = layer.values.shape[1] * layer.groups if layer.op == "Conv" else layer.taps().shape[1]
        if mean is None or mean.shape != (channels,) or ends is None or not all(map(math.isfinite, ends)):
            raise ExportError(
                f"{layer.name}: found no range of {layer.x!r} or no mean of its {channels} channels, "
                "expected a plan made for this file; quantise anew"
            )


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


def saturating(model: ModelProto, layers: Sequence[Layer], choice: Choice) -> list[str]:
    """Those of the chosen layers whose sums can leave int16 on x86 without VNNI, whatever runs here."""
    taken = [layer for layer in layers if layer.name in choice.layers and not layer.depthwise]
    weights = rounded_weights(model, taken, choice, scales_of(taken, choice.ranges, choice.grid))
    return [layer.name for layer in taken if grids.saturates(weights[layer.weight]).any()]


def correct_biases(
    model: ModelProto,
    layers: Sequence[Layer],
    scales: Mapping[str, NDArray[np.float32]],
    weights: Mapping[str, NDArray[np.int8]],
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
        rounded = weights[layer.weight].astype(np.float32) * scale[:, None]
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
    _forget_unused(model)


def _forget_unused(model: ModelProto) -> None:
    """Stored values that nothing reads, in place: runtimes warn of each."""
    used = {name for node in model.graph.node for name in reads(node)}
    used |= {o.name for o in model.graph.output} | {i.name for i in model.graph.input}
    kept = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _quantize(
    model: ModelProto,
    choice: Choice,
    layers: Sequence[Layer],
    scales: Mapping[str, NDArray[np.float32]],
    only: str | None,
) -> ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in choice.ranges.items()
        if math.isfinite(high - low)
    }
    boundless = choice.ranges.keys() - data.keys()
    in_float = {n.name for n in model.graph.node if not boundless.isdisjoint([*n.input, *n.output])}
    gpu = choice.kernels == "tensorrt"
    types = GPU_TYPES if gpu else sorted({*QLinearOpsRegistry, *QDQRegistry})
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
            activation_qType=QuantType.QInt8 if gpu else QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, data),
            nodes_to_quantize=[] if only is None else [only],
            nodes_to_exclude=[*choice.in_float, *sorted(in_float)] if only is None else [],
            op_types_to_quantize=types,
            extra_options={
                "TensorQuantOverrides": overrides,
                "ActivationSymmetric": gpu,
                "WeightSymmetric": True,
                # TensorRT rounds weights itself, has float biases, and fuses up to what the next layer reads.
                "AddQDQPairToWeight": gpu,
                "QuantizeBias": not gpu,
                # Alone, a layer's output is rounded by nobody: what reads it is in float.
                "OpTypesToExcludeOutputQuantization": types
                if gpu
                else ([] if only is None else sorted({x.op for x in layers})),
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()  # it appends what it adds
    made = quantizer.model.model
    assert isinstance(made, ModelProto)
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    if not gpu:
        leave_outputs(made)
        keep_in_float(made, {layer.name for layer in layers})
    _forget_unused(made)
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
