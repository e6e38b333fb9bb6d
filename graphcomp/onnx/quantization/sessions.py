"""What a model computes on the way: its tensors, by a session that fuses nothing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from graphcomp.errors import BenchError
from graphcomp.runtime import run_errors

Feeds = Mapping[str, NDArray[Any]]


def float_tensors(model: ModelProto) -> list[str]:
    """Names of all float32 tensors that the model reads or its nodes make, initialisers not among them."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    stored = {i.name for i in inferred.initializer}
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    names = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT} - stored
    made = {name for node in model.graph.node for name in node.output} | {i.name for i in model.graph.input}
    return sorted(names & made)


def observed(model: ModelProto, batches: Iterable[Feeds]) -> Iterator[dict[str, NDArray[Any]]]:
    """All float tensors of the model, batch by batch, its inputs among them."""
    names = float_tensors(model)
    inputs = {i.name for i in model.graph.input}
    run = plain_session(model, [name for name in names if name not in inputs])
    for feeds in batches:
        yield {name: feeds[name] for name in names if name in inputs} | run(feeds)


class plain_session:  # noqa: N801  # called like a function
    """A session that computes every node as it is written."""

    def __init__(self, model: ModelProto, outputs: Sequence[str]) -> None:
        import onnxruntime as ort

        watched = ModelProto()
        watched.CopyFrom(model)
        del watched.graph.output[:]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        settings = ort.SessionOptions()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        self._names = list(outputs)
        try:
            self._session = ort.InferenceSession(
                watched.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
        except run_errors() as error:
            raise BenchError(
                f"model: onnxruntime {ort.__version__} cannot load it with its inner tensors as outputs "
                f"({error}); "
                "export it again"
            ) from error

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
        """The outputs, by name."""
        return dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))
