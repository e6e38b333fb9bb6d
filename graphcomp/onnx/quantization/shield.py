"""What stays in float stays in float.

ONNX Runtime (its `WeightBiasQuantization`) rounds the float weights of a convolution or Gemm between bytes to
8 bits by itself, with one scale for all channels, and without a word. It does so where the input is
dequantised with one scale for the tensor. With a scale a channel, all of them equal, the numbers are the
same, and it leaves the layer alone.
"""

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from graphcomp.onnx.subgraphs import count_reads, makers_of

ROUNDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Operators whose weights the runtime would round."""


def leave_outputs(model: ModelProto) -> None:
    """What a Gemm at the end yields is not rounded to bytes on its way out, in place: nobody reads the bytes.

    The runtime's 8 bit Gemm writes float numbers as well as bytes; its convolutions only bytes.
    """
    makers, readers = makers_of(model), count_reads(model)
    gone: list[NodeProto] = []
    for output in model.graph.output:
        last = makers.get(output.name)
        before = (
            makers.get(last.input[0]) if last is not None and last.op_type == "DequantizeLinear" else None
        )
        maker = (
            makers.get(before.input[0]) if before is not None and before.op_type == "QuantizeLinear" else None
        )
        if last is None or before is None or maker is None or readers[output.name]:
            continue
        if maker.op_type != "Gemm":
            continue
        if readers[before.output[0]] == readers[before.input[0]] == 1:
            index = list(maker.output).index(before.input[0])
            maker.output[index] = output.name
            gone += [before, last]
    for node in gone:
        model.graph.node.remove(node)


def keep_in_float(model: ModelProto, quantised: Collection[str]) -> None:
    """Give every layer that is not among the names of `quantised` an input that is dequantised by channel.

    In place. A layer whose number of channels is not known from its weight is not touched by the runtime.
    """
    stored = {i.name: i for i in model.graph.initializer}
    makers = makers_of(model)
    taken = stored.keys() | makers.keys()
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        before = makers.get(node.input[0]) if node.op_type in ROUNDED and node.name not in quantised else None
        weight = stored.get(node.input[1]) if before is not None else None
        if before is not None and before.op_type == "DequantizeLinear" and weight is not None:
            name = f"{node.name or node.output[0]}.input_by_channel"
            while name in taken:
                name += "_"
            nodes.append(_by_channel(model, before, _channels(node, tuple(weight.dims)), name))
            node.input[0] = name
        nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _by_channel(model: ModelProto, dequantise: NodeProto, channels: int, name: str) -> NodeProto:
    """A node that makes the same numbers with a scale and a zero point a channel, behind its initialisers."""
    stored = {i.name: i for i in model.graph.initializer}
    inputs = [dequantise.input[0]]
    for part, each in zip(("scale", "zero_point"), dequantise.input[1:], strict=False):
        value = numpy_helper.to_array(stored[each])
        spread = numpy_helper.from_array(np.repeat(value.reshape(1), channels), f"{name}.{part}")
        model.graph.initializer.append(spread)
        inputs.append(spread.name)
    return helper.make_node("DequantizeLinear", inputs, [name], name, axis=1)


def _channels(node: NodeProto, shape: tuple[int, ...]) -> int:
    """That a layer with a weight of this shape reads."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv":
        return int(shape[1] * attributes.get("group", 1))
    if node.op_type == "ConvTranspose":
        return int(shape[0])
    return int(shape[1 if attributes.get("transB", 0) else 0])
