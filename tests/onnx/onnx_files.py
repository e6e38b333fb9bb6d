"""ONNX files of a few nodes, and what ONNX's own reference says to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplemented_

from graphcomp.ir import Program, output_tensors
from graphcomp.onnx.reading.file import OnnxSource
from graphcomp.onnx.reading.ports import BATCHES, Case, examples, inputs_of
from graphcomp.onnx.reading.reader import Attempt, build

Array = NDArray[Any]
OPEN = "N"


def make(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str | None]],
    constants: Mapping[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 18,
    kinds: Mapping[str, int] | None = None,
    output_shape: Sequence[Any] | None = None,
) -> ModelProto:
    """A model; a size that is a word is open."""
    kinds = kinds or {}
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "graph",
            [
                onnx.helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s)
                for n, s in inputs.items()
            ],
            [
                onnx.helper.make_empty_tensor_value_info(o)
                if o not in kinds and output_shape is None
                else onnx.helper.make_tensor_value_info(o, kinds.get(o, TensorProto.FLOAT), output_shape)
                for o in outputs
            ],
            [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in (constants or {}).items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=10,
    )


def typed(model: ModelProto) -> ModelProto:
    """With the types of outputs that a file must have."""
    return onnx.shape_inference.infer_shapes(model)


def save(model: ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(typed(model), path)
    return path


def read_unchecked(model: ModelProto, shapes: Mapping[str, Sequence[int]] | None = None) -> Program:
    """The program of a model with an open batch, before it is compared with anything."""
    source = OnnxSource(Path("model.onnx"), model, model.opset_import[0].version)
    inputs = inputs_of(model)
    sizes = examples(inputs, shapes)
    cases = tuple(Case(b, sizes) for b in BATCHES)
    return build(source, inputs, Attempt(cases, None, True, False), None)


def reference(model: ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """What ONNX's reference computes; the whole model, so that operators have the version that it names."""
    return [np.asarray(y) for y in ReferenceEvaluator(model).run(None, dict(feeds))]


def truth(model: ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """What ONNX Runtime computes, unoptimised; the reference, which has several operators wrong, where it has
    not got one."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            typed(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except (NotImplemented_, Fail):
        return reference(model, feeds)
    return [np.asarray(y) for y in session.run(None, dict(feeds))]


def run(program: Program, feeds: Mapping[str, Array]) -> list[Array]:
    """What the program computes; float64 goes in as float32."""
    given = [torch.from_numpy(np.ascontiguousarray(x)) for x in feeds.values()]
    given = [x.float() if x.is_floating_point() else x for x in given]
    with torch.no_grad():
        return [t.numpy() for t in output_tensors(program(*given))]
