"""Nodes whose inputs are all known are computed when the file is read, by ONNX's own reference.

Whatever they are: arithmetic on shapes, weights that are prepared. What the reference has wrong, or has not
got, ONNX Runtime computes. How large a result will be is inferred before it is computed, so that a file
cannot ask for more memory than a network takes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

from graphcomp.errors import BenchError, LoadError, first_line
from graphcomp.onnx.rows import Array, Known
from graphcomp.runtime import open_session, run_errors

MOST_ELEMENTS = 1 << 27
"""Of one result, as the largest layers of networks have (VGG's first linear one 1.03e8); those that a node
only copies may be as large as their input."""

_SMALL = 1 << 10
"""Elements of an input whose numbers are told to the shape inference."""

_TINY = 1 << 8

RANDOM = frozenset(
    """RandomNormal RandomUniform RandomNormalLike RandomUniformLike Multinomial Bernoulli""".split()
)
"""Operators that draw numbers."""

_REFUSED = RANDOM | {"Loop", "Scan", "If", "SequenceMap"}
_BOUNDED_BY_INPUT = {"NonZero", "Unique", "Compress", "Squeeze", "Dropout", "Einsum"}


def evaluate(node: NodeProto, opset: int, inputs: Sequence[Known | None], cases: int) -> list[Known]:
    """The outputs of a node in every case.

    Raises:
        LoadError: naming the node, if it may not or cannot be computed.
    """
    place = f"{node.op_type} {node.name!r:.120}"
    if node.op_type in _REFUSED:
        raise LoadError.at(place, "a node that is no function of its inputs", "others", ADVICE)
    every = 1 if all(v is None or v.is_constant for v in inputs) else cases
    results = [
        _run(place, node, opset, [None if v is None else v.values[case] for v in inputs])
        for case in range(every)
    ]
    return [
        Known(tuple(r[i] for r in results) if every > 1 else (results[0][i],) * cases)
        for i in range(len(results[0]))
    ]


ADVICE = "export the network again, with constant folding"


def _run(place: str, node: NodeProto, opset: int, inputs: Sequence[Array | None]) -> list[Array]:
    names = [f"i{k}" if x is not None else "" for k, x in enumerate(inputs)]
    feeds = {name: x for name, x in zip(names, inputs, strict=True) if x is not None}
    clean = NodeProto()
    clean.CopyFrom(node)
    outputs = [f"o{k}" for k in range(len(node.output))]
    del clean.input[:], clean.output[:]
    clean.input.extend(names)
    clean.output.extend(outputs)
    try:
        _check_size(place, clean, opset, feeds)
        graph = onnx.helper.make_graph(
            [clean],
            "node",
            [_told(name, x) for name, x in feeds.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    except LoadError:
        raise
    # The inference is C++, and what cannot be told has a type that it does not have.
    except Exception as error:
        raise _refusal(place, error) from error
    found = None if _is_mistaken(node, opset) else _by_reference(model, feeds)
    if found is None:
        try:
            found = open_session(_readable(model), "cpu", 1).session.run(None, feeds)
        except BenchError as error:
            raise _refusal(place, error) from error
        except run_errors() as error:
            raise _refusal(place, error) from error
    arrays = [np.asarray(x) for x in found]
    if any(x.dtype == object for x in arrays):
        raise LoadError.at(place, "a result that is no tensor", "tensors", ADVICE)
    return arrays


def _refusal(place: str, error: BaseException) -> LoadError:
    return LoadError.at(
        place, f"{first_line(error)!r:.200}", "constants that it can be computed from", ADVICE
    )


def _is_mistaken(node: NodeProto, opset: int) -> bool:
    """Whether ONNX 1.x's reference computes something else than the operator's definition says."""
    return (
        opset < 13
        and node.op_type in ("Softmax", "LogSoftmax", "Hardmax")  # along one axis, where it is all behind it
        or node.op_type == "LpNormalization"  # with p=1: by the sum, not by that of sizes
    )


def _by_reference(model: ModelProto, feeds: dict[str, Array]) -> Any:
    """None where it cannot: it is Python and raises whatever its operators do."""
    try:
        with np.errstate(all="ignore"):
            return ReferenceEvaluator(model).run(None, feeds)
    except Exception:
        return None


def _readable(model: ModelProto) -> bytes:
    """In the oldest form that has its operators: a runtime may be older than this version of onnx."""
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    content: bytes = model.SerializeToString()
    return content


def _told(name: str, x: Array) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)


def _check_size(place: str, node: NodeProto, opset: int, feeds: dict[str, Array]) -> None:
    """Refuse results that are too large, by shape inference."""
    held = max((x.size for x in feeds.values()), default=0)
    if sum(x.size for x in feeds.values()) * len(node.input) <= _TINY and node.op_type in _TAME:
        return
    told = [
        onnx.numpy_helper.from_array(np.asarray(x, order="C"), n)
        for n, x in feeds.items()
        if x.size <= _SMALL
    ]
    graph = onnx.helper.make_graph(
        [node],
        "node",
        [_told(n, x) for n, x in feeds.items()],
        [onnx.helper.make_empty_tensor_value_info(n) for n in node.output],
        told,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    inferred = onnx.shape_inference.infer_shapes(model)  # not with data: it would build what it infers
    for output in inferred.graph.output:
        shape = output.type.tensor_type.shape
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in shape.dim]
        known = output.type.tensor_type.HasField("shape") and None not in sizes
        if not known and node.op_type in _BOUNDED_BY_INPUT:
            elements = 1
            for x in feeds.values():
                elements *= max(x.size, 1)
        elif not known:
            raise LoadError.at(place, "a result of unknown size", "one that follows from shapes", ADVICE)
        else:
            elements = 1
            for n in sizes:
                elements *= n or 0
        if elements > max(MOST_ELEMENTS, held):
            raise LoadError.at(
                place, f"a constant of {elements} numbers", f"at most {MOST_ELEMENTS}", "this is no network"
            )


_TAME = {
    "Add", "Sub", "Mul", "Div", "Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Equal", "Where",
    "Transpose", "Floor", "Shape", "Identity", "Reshape", "Not", "And", "Sqrt", "Neg", "ReduceProd",
}  # fmt: skip
"""Operators whose results are no larger than the product of their inputs: small inputs need no inference."""


def constant_of(node: NodeProto) -> Array:
    """What a Constant node holds."""
    from graphcomp.onnx.reading.file import array_of

    if len(node.attribute) != 1:
        raise LoadError.at(f"Constant {node.name!r:.120}", "other than one value", "one", "it is not valid")
    (attribute,) = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return array_of(value)
    types = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    if attribute.name not in types:
        raise LoadError.at(
            f"Constant {node.name!r:.120}",
            f"{attribute.name!r:.60}",
            "numbers",
            "sparse ones and text are not read",
        )
    return np.array(value, types[attribute.name])
