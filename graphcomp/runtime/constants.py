"""Arithmetic on constants in a file, which shape inference does not follow far enough."""

import math
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto
from onnx.reference import ReferenceEvaluator

SMALL = 1024
"""Elements up to which a constant is arithmetic on shapes; larger ones are weights."""

_OPERATORS = frozenset(
    {"Constant", "ConstantOfShape", "Shape", "Concat", "Slice", "Gather", "Reshape", "Transpose", "Squeeze"}
    | {"Unsqueeze", "Cast", "Identity", "Add", "Sub", "Mul", "Div", "Neg", "Floor", "Ceil"}
)
"""What exporters compute sizes of padding, slices and reshapes with; none makes a small constant large but
ConstantOfShape, whose result is counted beforehand."""


def fold_small_constants(model: ModelProto, varying: Iterable[NodeProto]) -> None:
    """Replace nodes that compute small constants from small constants by their numbers, in place.

    What ONNX's reference cannot compute is left as it is, and so is a result that is not small: whoever needs
    its shape says that it is missing.
    """
    graph, moving = model.graph, {name for node in varying for name in node.output}
    known = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if _is_small(t)}
    kept: list[NodeProto] = []
    for node in graph.node:
        results = None
        if node.op_type in _OPERATORS and node.output[0] not in moving and known.keys() >= set(node.input):
            results = _results(model, node, {name: known[name] for name in node.input})
        if results is None:
            kept.append(node)
            continue
        known |= results
        graph.initializer.extend(onnx.numpy_helper.from_array(x, name) for name, x in results.items())
    if len(kept) < len(graph.node):
        copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)


def bound_constants(model: ModelProto) -> None:
    """Write what is left of ConstantOfShape as Expand, in place: the same shapes, and no numbers.

    Shape inference would make a constant of any size that a file asks for, and end the process.
    """
    for index, node in enumerate(model.graph.node):
        if node.op_type == "ConstantOfShape" and node.domain in ("", "ai.onnx"):
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            kind = np.float32 if value is None else onnx.numpy_helper.to_array(value).dtype
            name = f"graphcomp_constant_{index}"
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, kind), name))
            shape = node.input[0]
            node.op_type = "Expand"
            del node.attribute[:], node.input[:]
            node.input.extend((name, shape))


def _is_small(tensor: onnx.TensorProto) -> bool:
    held = bool(tensor.raw_data) or math.prod(tensor.dims) == 0 or tensor.ByteSize() > len(tensor.name) + 8
    return math.prod(tensor.dims) <= SMALL and held


def _results(
    model: ModelProto, node: NodeProto, given: dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"]
) -> dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"] | None:
    if node.op_type == "ConstantOfShape" and math.prod(given[node.input[0]].tolist()) > SMALL:
        return None
    alone = onnx.helper.make_model(
        GraphProto(
            name="constant",
            node=[node],
            initializer=[onnx.numpy_helper.from_array(x, name) for name, x in given.items()],
            output=[onnx.helper.make_empty_tensor_value_info(name) for name in node.output],
        ),
        opset_imports=model.opset_import,
    )
    try:
        found = ReferenceEvaluator(alone).run(None, {})
    # The reference raises whatever its operators do.
    except Exception:
        return None
    arrays = {name: np.asarray(x) for name, x in zip(node.output, found, strict=True)}
    return arrays if all(x.size <= SMALL and x.dtype != object for x in arrays.values()) else None
