"""A program becomes an ONNX model, operator by operator, by the rows of `onnx.rows`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from graphcomp.ir import Program
from graphcomp.onnx.rows import DTYPES, NoRow, Op, Wire, Writing, identity
from graphcomp.onnx.sizes import OpenAxes
from graphcomp.onnx.writing.driver import Driver
from graphcomp.onnx.writing.folding import fold_norms
from graphcomp.onnx.writing.settings import Settings, settings_of

OPSET = 18
"""What rows are written in."""

_IR_VERSION = 10


@dataclass(frozen=True)
class Written:
    """A model.

    Attributes:
        model: itself.
        tags: the name of the program's node that each of its nodes is written for, by name.
        values: what a node of the program yields is called in the file, by its name.
    """

    model: ModelProto = field(repr=False)
    tags: Mapping[str, str] = field(repr=False)
    values: Mapping[str, str] = field(repr=False)


@torch.no_grad()
def write(
    program: Program, inputs: Sequence[str], outputs: Sequence[str], open_axes: OpenAxes, batch: int = 1
) -> Written:
    """The model of a program in eval mode, at opset 18.

    Args:
        program: is not changed. Weights of its DCT layers become further inputs (`onnx.lowering`).
        inputs, outputs: what they are called in the file.
        open_axes: for every input the axes whose size is left open -> what they are called.
        batch: where the first axis is not open.

    Raises:
        NoRow: naming the node that no row writes, and why.
    """
    settings = settings_of(program, open_axes, batch)
    names = {identity(t): name for name, t in reversed(program.tensors.items())}
    writing = Writing(names, [*inputs, *outputs])
    driver = Driver(program, settings, writing)
    found = _leaves(driver.run(list(inputs)))
    last = next(n.name for n in reversed(program.graph.nodes) if n.op != "output")
    wires, renamed = _named(writing, found, outputs, last)
    fold_norms(writing, set(outputs))
    _drop_unread(writing, set(outputs))
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    given = [
        Wire(name, tuple(values[node] for values in settings.values))
        for name, node in zip(inputs, placeholders, strict=False)
    ]
    return Written(
        _model(program, writing, settings, given, wires),
        {op.name: op.source for op in writing.ops},
        {node: renamed.get(name, name) for node, name in driver.values.items()},
    )


def _leaves(value: Any) -> list[Any]:
    """The tensors of an output, in the order of `output_tensors`."""
    if isinstance(value, Wire | Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [leaf for part in parts for leaf in _leaves(part)]


def _named(
    writing: Writing, found: Sequence[Any], outputs: Sequence[str], last: str
) -> tuple[list[Wire], dict[str, str]]:
    """Outputs under their names; inputs, stored tensors and what has a name go through Identity.

    And the names that others had before.
    """
    renamed: dict[str, str] = {}
    wires = []
    for value, output in zip(found, outputs, strict=True):
        metas = value.metas if isinstance(value, Wire) else (value,)
        wires.append(Wire(output, metas))
        name = value.name if isinstance(value, Wire) else ""
        if name in writing.makers and name not in renamed:
            renamed[name] = output
            continue
        source = renamed.get(name, name) or writing.store(value)
        writing.ops.append(Op("Identity", writing.free(f"{output}/identity"), [source], [output], {}, last))
    for op in writing.ops:
        op.inputs = [renamed.get(name, name) for name in op.inputs]
        op.outputs = [renamed.get(name, name) for name in op.outputs]
    return wires, renamed


def _drop_unread(writing: Writing, outputs: set[str]) -> None:
    """Leave out nodes that nobody reads, and what only they read."""
    readers = Counter(name for op in writing.ops for name in op.inputs)
    kept = []
    for op in reversed(writing.ops):
        if any(readers[name] or name in outputs for name in op.outputs):
            kept.append(op)
        else:
            readers.subtract(op.inputs)
    writing.ops = kept[::-1]
    writing.stored = {name: t for name, t in writing.stored.items() if readers[name] > 0}


def _model(
    program: Program, writing: Writing, settings: Settings, inputs: Sequence[Wire], outputs: Sequence[Wire]
) -> ModelProto:
    graph = helper.make_graph(
        [_node(op) for op in writing.ops],
        type(program.module).__name__,
        [
            *(_value(wire, settings) for wire in inputs),
            *(helper.make_tensor_value_info(n, DTYPES[t], shape) for n, (shape, t) in writing.extra.items()),
        ],
        [_value(wire, settings) for wire in outputs],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="graphcomp")
    for name, tensor in writing.stored.items():  # last and in place: the model above is a copy of its parts
        _store(name, tensor, model.graph.initializer.add())
    return model


def _node(op: Op) -> NodeProto:
    return helper.make_node(op.kind, op.inputs, op.outputs, op.name, **op.attributes)


def _value(wire: Wire, settings: Settings) -> ValueInfoProto:
    """Type and shape; an open size has the name of the axis that it equals, or none."""
    if wire.dtype not in DTYPES:
        raise NoRow(f"{wire.name}: {wire.dtype}, which ONNX does not have")
    shape: list[int | str | None] = [
        sizes[0] if len(set(sizes)) == 1 else settings.open.get(sizes)
        for sizes in zip(*wire.shapes, strict=True)
    ]
    return helper.make_tensor_value_info(wire.name, DTYPES[wire.dtype], shape)


def _store(name: str, tensor: Tensor, place: TensorProto) -> None:
    if tensor.dtype not in DTYPES:
        raise NoRow(f"{name}: {tensor.dtype}, which ONNX does not have")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    place.name, place.data_type = name, DTYPES[tensor.dtype]
    place.dims.extend(tensor.shape)
    place.raw_data = flat.view(torch.uint8).numpy().tobytes()


__all__ = ["OPSET", "Written", "write"]
