"""Channels in front of a depthwise convolution get all steps of their tensor.

A tensor in 8 bits has one scale, since fused kernels take no more: a channel that peaks at a tenth of the
largest has a tenth of the steps. A depthwise convolution reads every channel alone. So a channel is made
larger by the layer that makes it, and as much smaller where it is read; on either side 8 bit weights have a
scale a channel, and their bytes stay what they were. A Relu between passes that on. A Clip cuts a channel now
at its own peak on the samples, which is what a scale a channel would do there.

After M. Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019;
there factors come from weights, and of all layers.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from graphcomp.errors import ExportError
from graphcomp.onnx.quantization.layers import Layer, find_layers
from graphcomp.onnx.quantization.sessions import Feeds, plain_session
from graphcomp.onnx.subgraphs import count_reads, makers_of

Factors = Mapping[str, NDArray[np.float64]]
"""(channels,) of every tensor that is spread, by its name."""

MOST = 64.0
"""A channel that hardly says anything on the samples is left some room."""


def find_factors(model: ModelProto, layers: Sequence[Layer], batches: Sequence[Feeds]) -> Factors:
    """What channels are multiplied by for all of them to peak where the largest does.

    Args:
        model: float.
        layers: of this model; tensors between two of them are spread.
        batches: to see peaks on.
    """
    names = list(_pairs(model, layers))
    if not names:
        return {}
    run, peaks = plain_session(model, names), dict[str, NDArray[np.float64]]()
    for feeds in batches:
        for name, values in run(feeds).items():
            peak = np.abs(values.astype(np.float64)).max(axis=(0, *range(2, values.ndim)))
            peaks[name] = np.maximum(peak, peaks.get(name, peak))
    return {name: _factors(peak) for name, peak in peaks.items()}


def _factors(peaks: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for channels that are always 0."""
    return np.where(peaks > 0, np.minimum(peaks.max() / np.where(peaks > 0, peaks, 1.0), MOST), 1.0)


def spread(model: ModelProto, layers: Sequence[Layer], factors: Factors) -> tuple[ModelProto, list[Layer]]:
    """The model with these factors in its weights, and the same layers of it; `model` stays as it is.

    Raises ExportError if the factors are those of another model.
    """
    if not factors:
        return model, list(layers)
    model = copy.deepcopy(model)
    stored = {i.name: i for i in model.graph.initializer}

    def multiply(name: str, factor: NDArray[np.float64]) -> None:
        values = numpy_helper.to_array(stored[name])
        changed = values * factor.reshape(-1, *[1] * (values.ndim - 1))
        stored[name].CopyFrom(numpy_helper.from_array(changed.astype(values.dtype), name))

    pairs = _pairs(model, layers)
    for name, factor in factors.items():
        maker, layer = pairs.get(name, (None, None))
        fits = maker is not None and factor.shape == (len(maker.values),)
        if layer is None or maker is None or not fits or not (np.isfinite(factor) & (factor > 0)).all():
            raise ExportError(
                f"{name}: found no depthwise convolution for its {factor.size} factors, expected a plan made "
                "for this file; quantise anew"
            )
        multiply(maker.weight, factor)
        if maker.bias is not None:
            multiply(maker.bias, factor)
        multiply(layer.weight, 1 / factor)
    taken = {layer.name for layer in layers}
    return model, [layer for layer in find_layers(model)[0] if layer.name in taken]


def _pairs(model: ModelProto, layers: Sequence[Layer]) -> dict[str, tuple[Layer, Layer]]:
    """By what a depthwise layer reads: the convolution whose channels these are, and the layer.

    Where nothing else reads their weights, or a value from one to the other.
    """
    makers, readers = makers_of(model), count_reads(model)
    readers.update(output.name for output in model.graph.output)
    convolutions = {layer.y: layer for layer in layers if layer.op == "Conv"}
    found: dict[str, tuple[Layer, Layer]] = {}
    for layer in layers:
        values, node = [layer.x], makers.get(layer.x)
        if not layer.depthwise or node is None:
            continue
        if _passes(model, node):
            values.append(node.input[0])
        maker = convolutions.get(values[-1])
        if maker is None:
            continue
        numbers = (layer.weight, maker.weight, *filter(None, [maker.bias]))
        if all(readers[name] <= 1 for name in (*values, *numbers)):
            found[layer.x] = maker, layer
    return found


def _passes(model: ModelProto, node: NodeProto) -> bool:
    """Whether channels that are multiplied before it are multiplied behind it, up to where they are cut."""
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or len(node.input) < 2 or not node.input[1]:
        return False
    low = next((i for i in model.graph.initializer if i.name == node.input[1]), None)
    return low is not None and float(numpy_helper.to_array(low)) == 0
