"""Inputs that no program has: numbers that are given once and for all, and samples that are not in front.

Both are settled in the file's model, before it is read, so that what it is compared with is the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, ValueInfoProto, helper, numpy_helper

from graphcomp.errors import LoadError
from graphcomp.onnx.subgraphs import rename_reads, required_inputs

Dims = list[int | str]
"""Sizes of an input, a symbol ("" without one) for those that are open."""


def fix_inputs(model: ModelProto, values: Mapping[str, Any]) -> list[str]:
    """Make constants of inputs, in place.

    Args:
        model: of the file.
        values: by input: numbers in its shape, or one for all of it.

    Returns:
        Remarks.

    Raises:
        LoadError: naming what is no input, or does not fit it.
    """
    inputs = {value.name: value for value in required_inputs(model)}
    for name, value in values.items():
        if name not in inputs:
            raise LoadError.at(
                "--input", f"{name!r:.120}", f"one of {', '.join(inputs):.300}", "correct the name"
            )
        model.graph.initializer.append(numpy_helper.from_array(_array(inputs[name], value), name))
        model.graph.input.remove(inputs[name])
    return [f"input {name!r:.120} is {value} once and for all" for name, value in values.items()]


def _array(value: ValueInfoProto, given: Any) -> np.ndarray[Any, Any]:
    kind, dims = value.type.tensor_type.elem_type, _dims(value)
    closed = [n for n in dims if isinstance(n, int)]
    expected = "a number" if not dims else f"numbers in the shape {dims}, or one for all of them"
    try:
        array = np.asarray(given)
        if array.dtype.kind not in "biuf" or len(closed) < len(dims):
            raise ValueError
        cast = array.astype(helper.tensor_dtype_to_np_dtype(kind))
        if cast.dtype.kind in "biu" and not np.array_equal(cast, array):
            raise ValueError
        return np.array(np.broadcast_to(cast, closed))
    except (ValueError, KeyError, OverflowError) as error:
        raise LoadError.at(
            f"--input {value.name!s:.120}", f"{given!r:.120}", expected, "correct the value"
        ) from error


def turn_inputs(model: ModelProto) -> dict[str, list[int]]:
    """Put the batch in front of inputs that have it in another place (states of recurrent layers), in place.

    It is where the size of the first axis of the other inputs stands: one symbol, the only open size, or
    the same number. Two samples together are compared with each alone, so a wrong guess is refused.

    Returns:
        By input that was turned, the axis of the file that each of its axes now was.
    """
    found: dict[str, list[int]] = {}
    inputs = {value.name: _dims(value) for value in required_inputs(model)}
    for name, axis in _misplaced(inputs).items():
        order = [axis, *(d for d in range(len(inputs[name])) if d != axis)]
        _turn(model, name, order)
        found[name] = order
    return found


def _misplaced(inputs: Mapping[str, Dims]) -> dict[str, int]:
    fronts = [dims[0] for dims in inputs.values() if dims]
    opened = [front for front in fronts if isinstance(front, str)]
    wanted = opened[0] if opened else fronts[0] if fronts else ""
    found: dict[str, int] = {}
    for name, dims in inputs.items():
        if dims and isinstance(dims[0], int) and dims[0] != wanted:
            places = [axis for axis, size in enumerate(dims) if axis and size == wanted]
            if len(places) == 1:
                found[name] = places[0]
    return found


def _turn(model: ModelProto, name: str, order: Sequence[int]) -> None:
    taken = {o for node in model.graph.node for o in node.output} | {i.name for i in model.graph.input}
    inside = f"{name}/as in the file"
    while inside in taken:
        inside += "_"
    for node in model.graph.node:
        rename_reads(node, {name: inside})
    back = [list(order).index(axis) for axis in range(len(order))]
    model.graph.node.insert(0, helper.make_node("Transpose", [name], [inside], perm=back))
    (value,) = (v for v in model.graph.input if v.name == name)
    shape = value.type.tensor_type.shape
    dims = [onnx.TensorShapeProto.Dimension.FromString(shape.dim[d].SerializeToString()) for d in order]
    del shape.dim[:]
    shape.dim.extend(dims)


def _dims(value: ValueInfoProto) -> Dims:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param for d in dims]
