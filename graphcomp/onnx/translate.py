"""From a program to an ONNX model: torch.export of its graph, every node tagged, and the exporter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

from graphcomp.base import muted
from graphcomp.errors import ExportError, first_line
from graphcomp.ir import Program, copy_graph, fresh_inputs
from graphcomp.onnx.origins import TAG, Origin, node_tags, origin_of, place_of, tags_of
from graphcomp.onnx.sizes import OpenAxes, is_open

# Captured with fake tensors, so it costs nothing; unlike 1 or 2, no literal of a network equals it by chance.
_CAPTURE_BATCH = 7
UNBAKE = "use x.shape[0] or -1 in its views, or export with dynamic=() and batches=(1,)"
UNBAKE_SIZE = (
    "take sizes from x.shape, pool to a fixed size before linear layers, or leave height and width out of "
    "dynamic"
)


@dataclass(frozen=True)
class Translated:
    """What the exporter made of a network, and the fx node that each of its nodes comes from, by name."""

    content: bytes
    tags: Mapping[str, str]

    def model(self) -> ModelProto:
        """A copy to work on."""
        return onnx.load_model_from_string(self.content)

    def origins(self, program: Program) -> dict[str, Origin | None]:
        """For a program of the same graph, whose passes may have other names."""
        nodes = {node.name: node for node in program.graph.nodes}
        return {name: origin_of(nodes[tag]) for name, tag in self.tags.items()}


def capture(
    program: Program,
    axes: OpenAxes,
    batch: int,
    network: fx.GraphModule | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> ExportedProgram:
    """torch.export of the program with every node tagged by its fx name.

    Args:
        program: its example inputs say how large what is not open is.
        axes: of any size.
        batch: where the first axis is not open.
        network, weights: may stand for the program's own module and take `weights` as further inputs.
    """
    inputs = fresh_inputs(program, _CAPTURE_BATCH if is_open(axes, batch=True) else batch, 0)
    inputs = tuple(x.to(example.dtype) for x, example in zip(inputs, program.example_inputs, strict=True))
    given = tuple((weights or {}).values())
    shapes = (*({axis: _dim(axis) for axis in own} or None for own in axes), *(None for _ in given))
    with muted():
        try:
            tagged = _tagged(network or program.module)
            return torch.export.export(
                tagged, (*inputs, *given), dynamic_shapes=shapes if any(shapes) else None, strict=False
            )
        # torch.export passes on whatever its many layers raise; there is no common base.
        except Exception as error:
            raise _capture_error(program, error) from error


def _dim(axis: int) -> Any:
    """The batch is any number; other sizes may be bound to each other, or to multiples of something."""
    return Dim("batch") if axis == 0 else Dim.DYNAMIC


def _tagged(network: fx.GraphModule) -> fx.GraphModule:
    """The same modules under a copy of the graph whose nodes carry their names through torch.export."""
    graph = copy_graph(network.graph)
    for node in graph.nodes:
        node.meta = {"custom": {TAG: node.name}}
    return fx.GraphModule(network, graph)


def _capture_error(program: Program, error: Exception) -> ExportError:
    place = place_of(error, program)
    if re.search(r"[Cc]onstraints violated|specialized it to be a constant", str(error)):
        beside = re.search(r"(?:size\(\)|shape)\[[1-9]", str(error))
        what, advice = ("size", UNBAKE_SIZE) if beside else ("batch size", UNBAKE)
        return ExportError(
            f"{place}: found a {what} baked into the graph ({first_line(error)}), expected any {what}; "
            f"{advice}"
        )
    return ExportError(
        f"{place}: torch.export found '{first_line(error)}', expected a graph that it can follow; replace "
        "this operation, or try dynamic=()"
    )


def translate(
    program: Program,
    exported: ExportedProgram,
    opset: int,
    inputs: list[str],
    outputs: list[str],
    axes: OpenAxes,
) -> Translated:
    """The ONNX model, with unique names, and the fx node of each of its nodes by name."""
    names = dict.fromkeys(name for own in axes for name in own.values())
    called = {name: f"size{i}" for i, name in enumerate(names)}
    shapes = [{axis: called[name] for axis, name in own.items()} or None for own in axes]
    shapes += [None] * (len(inputs) - len(axes))  # weights
    with muted() as noise:
        try:
            result = torch.onnx.export(
                exported,
                dynamo=True,
                # Only names the open dimensions: `exported` has the shapes already.
                dynamic_shapes=tuple(shapes) if any(shapes) else None,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
        # Conversion runs one Python function an operator, which may raise anything.
        except Exception as error:
            cause = error.__cause__.__cause__ if error.__cause__ else None
            raise ExportError(
                f"{place_of(error, program, tags_of(exported))}: the ONNX exporter found "
                f"'{first_line(cause or error.__cause__ or error)}', expected operators that ONNX has; "
                "replace this operation"
            ) from error
        result = cast(ONNXProgram, result)
        tags = node_tags(result)
        model = result.model_proto
    _check_translation(model, opset, outputs, noise.getvalue())
    _name_sizes(model, called)
    return Translated(model.SerializeToString(), tags)


def _name_sizes(model: ModelProto, called: Mapping[str, str]) -> None:
    """Call open sizes what the program's interface does; the exporter takes only words of Python."""
    names = {word: name for name, word in called.items()}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\bsize\d+\b", lambda m: names.get(m[0], m[0]), dim.dim_param)


def _check_translation(model: ModelProto, opset: int, outputs: list[str], noise: str) -> None:
    # The exporter writes another version than it was asked for without raising.
    found = next(o.version for o in model.opset_import if not o.domain)
    if found != opset:
        said = f" (the exporter said: {noise.strip().splitlines()[-1].strip()})" if noise.strip() else ""
        raise ExportError(
            f"opset: found {found} in the exported model, expected {opset}{said}; ask for {found}"
        )
    names = [o.name for o in model.graph.output]
    if names != outputs:
        raise ExportError(
            f"outputs: found {names} in the exported model, expected {outputs}; the network must not change "
            "its inputs or buffers in place"
        )
