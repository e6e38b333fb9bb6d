"""Weights are stored as float16 with a cast behind each, which the runtime folds when it loads the file.

Half the bytes and the same speed: the arithmetic stays float32, on weights that were rounded to 11 bits.
Vectors stay as they are, being few bytes, and so do tensors that float16 does not hold: beyond its range, or
so small that too little of them is left.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from graphcomp.onnx.subgraphs import reads
from graphcomp.records import HalfWeights

LEAST = 64
"""Elements from which a tensor of two or more dimensions is a weight that pays."""
MOST_LOST = 1e-3
"""Of the norm of a tensor: rounding to 11 bits takes 2.8e-4, and more where numbers are below 6e-5."""


def store_half(model: ModelProto) -> HalfWeights:
    """Replace float32 weights by float16 and a Cast, in place; initialisers keep their names behind it."""
    casts: list[NodeProto] = []
    kept: dict[str, str] = {}
    taken = {i.name for i in model.graph.initializer} | {o for n in model.graph.node for o in n.output}
    outputs = {o.name for o in model.graph.output} | {i.name for i in model.graph.input}
    before = after = 0
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or tensor.name in outputs:
            continue
        full = numpy_helper.to_array(tensor)
        if full.size < LEAST:
            continue
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        if (why := _why_not(full, half)) is not None:
            kept[tensor.name] = why
            continue
        name, stored = tensor.name, f"{tensor.name}.float16"
        while stored in taken:
            stored += "_"
        taken.add(stored)
        model.graph.initializer[index].CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(helper.make_node("Cast", [stored], [name], f"{stored}.cast", to=TensorProto.FLOAT))
        before, after = before + full.nbytes, after + half.nbytes
    nodes = [*casts, *(NodeProto.FromString(n.SerializeToString()) for n in model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return HalfWeights(tensors=len(casts), float32_bytes=before, float16_bytes=after, kept=kept)


def _why_not(full: NDArray[Any], half: NDArray[np.float16]) -> str | None:
    """Why a tensor stays in float32, None if it need not."""
    finite = np.isfinite(full)  # of masks the rest is as it was
    full, half = full[finite], half[finite]
    if not np.isfinite(half).all():
        return f"its largest value, {np.abs(full).max():.3g}, is beyond float16"
    norm = float(np.linalg.norm(full.astype(np.float64).ravel()))
    lost = float(np.linalg.norm((full.astype(np.float64) - half).ravel()))
    if lost > MOST_LOST * norm:
        return f"float16 would lose {lost / norm:.2g} of its norm: its values are too small"
    return None


def with_full_weights(model: ModelProto) -> None:
    """Undo it, in place: what is cast from stored float16 to float32 is stored as float32."""
    stored = {i.name: i for i in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        source = stored.get(node.input[0]) if node.op_type == "Cast" else None
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        if source is None or source.data_type != TensorProto.FLOAT16 or to != TensorProto.FLOAT:
            kept.append(NodeProto.FromString(node.SerializeToString()))
            continue
        full = numpy_helper.to_array(source).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(full, node.output[0]))
    read = {name for node in kept for name in reads(node)} | {o.name for o in model.graph.output}
    tensors = [i for i in model.graph.initializer if i.name in read or i.data_type != TensorProto.FLOAT16]
    copies = [TensorProto.FromString(t.SerializeToString()) for t in tensors]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(copies)
