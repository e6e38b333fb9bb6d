"""Shapes that inference does not find, seen by running the file once on zeros."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from graphcomp.errors import BenchError, first_line
from graphcomp.ir import Shape
from graphcomp.runtime.providers import import_runtime


def seen_shapes(model: ModelProto, feeds: Mapping[str, tuple[str, Shape]], place: str) -> dict[str, Shape]:
    """The shape of every value that nodes of the file itself compute.

    Args:
        model: with its weights inside.
        feeds: ONNX's name of the type, and the shape, of every input.
        place: for messages.

    Raises:
        BenchError: if ONNX Runtime does not run it.
    """
    shown = ModelProto.FromString(model.SerializeToString())
    known = {value.name for value in shown.graph.output}
    made = [name for node in shown.graph.node for name in node.output if name and name not in known]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in made)
    zeros = {
        name: np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind)))
        for name, (kind, shape) in feeds.items()
    }
    ort = import_runtime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        found = zip(names, session.run(names, zeros), strict=True)
    # The runtime has many errors of its own, none with a base but Exception.
    except Exception as error:
        raise BenchError(
            f"{place}: shape inference does not find all shapes, and ONNX Runtime found "
            f"'{first_line(error)}' when it ran the file to see them, expected one that runs; export with "
            "fixed sizes"
        ) from error
    return {name: tuple(np.shape(value)) for name, value in found if not isinstance(value, list)}
