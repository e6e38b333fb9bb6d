"""Files of operator sets before 7, most of which ONNX Runtime has no kernels for, become files of set 7.

By ONNX's own converter. What a file computes is then compared with ONNX Runtime on what it became, which is
said among the remarks.
"""

import onnx
from onnx import ModelProto, ValueInfoProto, version_converter

from graphcomp.errors import LoadError, first_line

OLDEST = 7
"""The first operator set that ONNX Runtime promises to run."""

_STANDS_FOR_OPEN = (9973, 9967, 9949, 9941)
"""The converter asks how shapes broadcast, and takes numbers only; none that a weight has."""


def modernise(name: str, model: ModelProto, opset: int) -> str:
    """Make a model one of operator set 7, in place.

    Args:
        name: of the file, for messages.
        model: of an older one, with its data.
        opset: that it has.

    Returns:
        A remark.

    Raises:
        LoadError: if it is not valid, or has an operator that the converter does not know.
    """
    try:
        onnx.checker.check_model(model)  # the converter ends the process on some graphs that are not valid
        closed = ModelProto.FromString(model.SerializeToString())
        del closed.graph.value_info[:]
        for value in (*closed.graph.input, *closed.graph.output):
            _close(value)
        converted = version_converter.convert_version(closed, OLDEST)
    # Both are C++ and raise whatever they find wrong.
    except Exception as error:
        raise LoadError.at(
            name,
            f"operator set {opset}, and {first_line(error)!r:.200}",
            f"one of {OLDEST} or more, or a file that onnx.version_converter takes there",
            "export the network again",
        ) from error
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:], model.opset_import[:]
    model.graph.node.extend(converted.graph.node)
    model.graph.initializer.extend(converted.graph.initializer)
    model.opset_import.extend(converted.opset_import)
    return f"operators of set {opset} were converted to {OLDEST}, by ONNX's own converter"


def _close(value: ValueInfoProto) -> None:
    """Give sizes that are open numbers, in place."""
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        if not dim.HasField("dim_value"):
            dim.dim_value = _STANDS_FOR_OPEN[axis % len(_STANDS_FOR_OPEN)]
