"""Files in 8 bits (QDQ): stored weights become the numbers that they are dequantised to.

What is rounded to bytes and back between layers is another matter: a program has nothing for it, so such a
file is read only by those who ask for the float network that it stands for. Operators on the bytes themselves
are left as they are, and refused by name like any other without a row.
"""

import operator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from graphcomp.errors import LoadError
from graphcomp.onnx.reading.file import OnnxSource, array_of
from graphcomp.onnx.rows import Array
from graphcomp.onnx.subgraphs import makers_of, reads, rename_reads

WEIGHTS = "stored weights of 8 bits were read as float32"
ROUNDING = "the file rounds between layers, which is left out"
_SUFFIX = "_DequantizeLinear_Output"
_NOT_NEGATIVE = frozenset(
    {"Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax", "MaxPool", "AveragePool", "GlobalAveragePool"}
    | {"GlobalMaxPool", "Concat", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad"}
)
"""Operators behind which bytes that begin at 0 say nothing of a Relu."""


def with_float_weights(model: ModelProto) -> bool:
    """Replace what is dequantised from initialisers by its numbers, in place; whether there was any.

    Raises:
        LoadError: naming a node whose scale or zero point does not fit, or that scales by blocks.
    """
    stored = {i.name: i for i in model.graph.initializer}
    taken = stored.keys() | {output for node in model.graph.node for output in node.output}
    renamed: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or not set(filter(None, node.input)) <= stored.keys():
            kept.append(node)
            continue
        name = node.output[0].removesuffix(_SUFFIX)  # as the float file called it, which names its layer
        name = node.output[0] if name in taken else name
        renamed[node.output[0]] = name
        taken.add(name)
        arrays = [array_of(stored[each]) if each else None for each in node.input]
        model.graph.initializer.append(numpy_helper.from_array(_dequantised(node, arrays), name))
    _rewrite(model, kept, renamed)
    return bool(renamed)


def without_rounding(model: ModelProto) -> bool:
    """Take out what is quantised and at once dequantised, in place; whether there was any.

    Quantizers take out a Relu where the bytes begin at 0, which cut negative numbers off: it comes back.
    """
    makers = makers_of(model)
    stored = {i.name: i for i in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    same: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        before = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if before is None or before.op_type != "QuantizeLinear":
            kept.append(node)
            continue
        maker = makers.get(before.input[0])
        if maker is not None and maker.op_type not in _NOT_NEGATIVE and _begins_at_zero(before, stored):
            kept.append(helper.make_node("Relu", [before.input[0]], [node.output[0]], node.name))
        elif node.output[0] in outputs:  # whose name stays
            kept.append(helper.make_node("Identity", [before.input[0]], [node.output[0]], node.name))
        else:
            same[node.output[0]] = before.input[0]
    found = len(kept) < len(model.graph.node) or any(
        a is not b for a, b in zip(kept, model.graph.node, strict=True)
    )
    _rewrite(model, kept, same)
    read = {name for node in model.graph.node for name in reads(node)} | outputs
    idle = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.output[0] not in read]
    for node in idle:
        model.graph.node.remove(node)
    return found


def _begins_at_zero(quantise: NodeProto, stored: dict[str, TensorProto]) -> bool:
    """Whether the least byte stands for 0."""
    name = quantise.input[2] if len(quantise.input) > 2 else ""
    if name not in stored:
        return not name  # u8 with the zero point 0, or none that is known
    zero = array_of(stored[name])
    return zero.dtype.kind in "iu" and bool((zero == np.iinfo(zero.dtype).min).all())


def read_in_float(source: OnnxSource, *, rounding: bool) -> tuple[str, ...]:
    """Make the model of a source one of float weights, in place, and without `rounding` if that is False.

    Returns remarks on what was done.
    """
    remarks = [WEIGHTS] if with_float_weights(source.model) else []
    if not rounding and without_rounding(source.model):
        remarks.append(ROUNDING)
    return tuple(remarks)


def _rewrite(model: ModelProto, nodes: list[NodeProto], renamed: dict[str, str]) -> None:
    """The graph with these nodes, which read tensors by their new names; chains of names are followed."""
    if len(nodes) == len(model.graph.node) and all(map(operator.is_, nodes, model.graph.node)):
        return
    last = dict(renamed)
    for old in renamed:
        seen = {old}
        while (name := last[old]) in renamed and name not in seen:
            seen.add(name)
            last[old] = renamed[name]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    for node in copies:
        rename_reads(node, last)
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _dequantised(node: NodeProto, arrays: list[Array | None]) -> Array:
    """(x - zero point) scale, in float32."""
    place = f"DequantizeLinear {node.name!r:.120}"
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, scale, zero = [*arrays, None][:3] if len(arrays) > 1 else (None, None, None)
    if x is None or scale is None or attributes.get("block_size", 0):
        raise LoadError.at(place, "blocks, or no scale", "a scale a tensor or channel", "export it so")
    axis = int(attributes.get("axis", 1))
    size = x.shape[axis] if -x.ndim <= axis < x.ndim else -1
    for one in (scale, zero):
        if one is not None and one.size != 1 and one.shape != (size,):
            raise LoadError.at(
                place,
                f"scales {one.shape} for {x.shape}",
                "a scale a tensor or channel",
                "it is not valid ONNX",
            )

    def spread(one: Array) -> Array:
        shape = [1] * x.ndim
        if one.size != 1:
            shape[axis] = -1
        return one.astype(np.float32).reshape(shape)

    shifted = x.astype(np.float32) - (0 if zero is None else spread(zero))
    return np.asarray(shifted * spread(scale), np.float32)
