"""An ONNX file becomes a program of plain layers, equal to what ONNX Runtime computes from it.

Every value of the file is either known, numbers that are evaluated for several batch sizes, or a node of the
program with its shapes at these. So arithmetic on shapes and prepared weights disappear, whatever they look
like, and what is left goes through one row an operator (`onnx.rows`). A number that is not the same at all
batch sizes *is* the batch. Last, the program is compared with the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto

from graphcomp.errors import LoadError
from graphcomp.ir import Program, graph_module
from graphcomp.onnx.interface import HISTORY_PROP, read_history
from graphcomp.onnx.origins import Origin, origin_of
from graphcomp.onnx.reading.comparison import compare
from graphcomp.onnx.reading.eight_bits import read_in_float
from graphcomp.onnx.reading.file import OnnxSource, open_file
from graphcomp.onnx.reading.given import fix_inputs, turn_inputs
from graphcomp.onnx.reading.ports import (
    BATCHES,
    ODD_STEPS,
    TYPES,
    Case,
    Input,
    example_inputs,
    examples,
    inputs_of,
    interface_of,
    opened,
    placeholder_name,
)
from graphcomp.onnx.reading.tidy import tidy
from graphcomp.onnx.reading.walk import Walk
from graphcomp.onnx.rows import ORIGIN_KEY, Made, Reading


def read_onnx(
    path: str | Path,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    rounding: bool = True,
) -> Program:
    """Read the ONNX file `path` as a program.

    Floating point numbers of every width become float32. A file that was written for one sample is read for
    any number of them where two samples together yield what each yields alone; else it stays at one. Axes
    that the file leaves open stay open where the program follows them. `Program.interface` has what the file
    says of itself, and `remarks` of how it was read.

    Args:
        path: of the file; external data must lie in its folder.
        input_shapes: sizes of examples by input, the batch with them (which is ignored), for axes that the
            file leaves open; "" names the only input.
        inputs: values of inputs that are settled once and for all, by name: what has no batch (a sampling
            rate, a threshold) is no input of a program.
        rounding: False: of a file in 8 bits (QDQ) the float network that it stands for, without what it
            rounds between layers, and compared with the file without that. True: such a file is refused.

    Raises:
        LoadError: naming the node, input or output, if the file is not valid, has operators that are not
            read, or if the program does not compute what ONNX Runtime computes from it.
    """
    source = open_file(Path(path))
    remarks = [*source.remarks, *fix_inputs(source.model, inputs or {})]
    orders = turn_inputs(source.model)
    remarks += [f"input {n!r:.120} has its samples along axis {o[0]} in the file, here in front"
                for n, o in orders.items()]  # fmt: skip
    source = replace(source, remarks=(*remarks, *read_in_float(source, rounding=rounding)))
    ports = inputs_of(source.model)
    sizes = examples(ports, _turned(input_shapes or {}, orders))
    fixed = _fixed_batch(ports)
    larger = opened(ports, sizes)
    odd = Case(fixed or 1, {**sizes, **opened(ports, sizes, ODD_STEPS)})
    first: LoadError | None = None
    for attempt in _attempts(sizes, larger, odd, fixed):
        try:
            program = build(source, ports, attempt, first)
            rounded = compare(
                program,
                source,
                ports,
                fixed,
                [c for c in attempt.cases if c.sizes != attempt.cases[0].sizes],
                odd if attempt.others and odd not in attempt.cases else None,
            )
        except LoadError as error:
            first = first or error
        else:
            told = {n: tuple(v) if isinstance(v, list) else v for n, v in (inputs or {}).items()}
            said = {"remarks": (*program.interface.remarks, *rounded), "arguments": told}
            return replace(program, interface=program.interface.model_copy(update=said))
    assert first is not None
    raise first


def _turned(
    shapes: Mapping[str, Sequence[int]], orders: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """Shapes as the file has them, with the axes of inputs that were turned as they are now."""
    found: dict[str, Sequence[int]] = {}
    for name, shape in shapes.items():
        order = orders.get(name, ())
        found[name] = [shape[d] for d in order] if len(order) == len(shape) else shape
    return found


def origins_in(
    path: str | Path, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Origin]:
    """What an export of the program that `read_onnx` makes of a file says of the file's nodes.

    So a file of another exporter has names in common with what was made from it.

    Args:
        path, input_shapes: see `read_onnx`.

    Returns:
        The first output of a node -> its layer's call, or the last node of the program that was made for it;
        nothing for nodes that are none in the program (numbers, transposes that undo each other).

    Raises:
        LoadError: see `read_onnx`.
    """
    nodes = [n for n in read_onnx(path, input_shapes).graph.nodes if ORIGIN_KEY in n.meta]
    nodes.sort(key=lambda n: n.op == "call_module")  # layers win
    return {n.meta[ORIGIN_KEY]: origin_of(n) for n in nodes}


@dataclass(frozen=True)
class Attempt:
    """What the program is to leave open.

    Attributes:
        cases: the first is that of the examples.
        freed: see `Reading`.
        batch, others: whether the batch, and the other open axes, stay open.
    """

    cases: tuple[Case, ...]
    freed: int | None
    batch: bool
    others: bool


def _fixed_batch(inputs: Sequence[Input]) -> int | None:
    """The first size of inputs, where the file fixes it; None where it is open."""
    found = {i.sizes[0] for i in inputs if i.sizes[0] is not None}
    if len(found) > 1:
        raise LoadError.at(
            "inputs",
            f"first sizes {sorted(found)}",
            "one for all: the batch",
            "export it with the batch in front",
        )
    return found.pop() if found else None


def _attempts(
    sizes: Mapping[tuple[str, int], int], larger: Mapping[tuple[str, int], int], odd: Case, fixed: int | None
) -> list[Attempt]:
    """From the most that may be open to the least: any sizes, those that networks take, and the example's."""
    many = tuple(Case(b, sizes) for b in sorted({*BATCHES, fixed or 1}))
    wide = Case(fixed or 1, {**sizes, **larger})
    others: list[tuple[Case, ...]] = [(wide, odd), (wide,)] if larger else []
    found = [Attempt((*many, *more), fixed, True, True) for more in others]
    found.append(Attempt(many, fixed, True, False))
    if fixed in (None, 1):
        one = Case(1, sizes)
        found += [Attempt((one, *more), None, False, True) for more in others]
        found.append(Attempt((one,), None, False, False))
    return found


def build(source: OnnxSource, inputs: Sequence[Input], attempt: Attempt, failed: LoadError | None) -> Program:
    """The program of a file, not yet compared with it.

    Args:
        source: of the file.
        inputs: of the file.
        attempt: what the program is to leave open.
        failed: why it is not to leave open more, for its remarks.

    Raises:
        LoadError: naming the node that cannot be read so.
    """
    reading = Reading([c.batch for c in attempt.cases], attempt.freed)
    made: dict[str, Made] = {}
    for index, i in enumerate(inputs):
        values = [torch.empty(i.shape(c), dtype=TYPES[i.kind], device="meta") for c in attempt.cases]
        made[i.name] = reading.placeholder(placeholder_name(i.name, index), values)
    outputs = [
        reading.tensor(v, "output") for v in Walk(source.model.graph, source.opset, reading, made).run()
    ]
    nodes = [o.node for o in outputs]
    reading.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
    tidy(reading)
    reading.graph.lint()
    module = graph_module(reading.root, reading.graph, "OnnxNetwork").eval()
    example = example_inputs(inputs, attempt.cases[0])
    open_axes = _open_axes(source, inputs, outputs, attempt)
    remarks = [*_remarks(source, attempt, failed), *reading.remarks]
    interface = interface_of(source.model, inputs, source.opset, open_axes, remarks)
    props = {p.key: p.value for p in source.model.metadata_props}
    history = read_history(props[HISTORY_PROP]) if HISTORY_PROP in props else ()
    return Program(module, tuple(x[:1] for x in example), history, interface)


def _open_axes(
    source: OnnxSource, inputs: Sequence[Input], outputs: Sequence[Made], attempt: Attempt
) -> dict[str, dict[int, str]]:
    """The axes that stay open, by input and output, with the names that the file has for them."""
    symbols: dict[Any, str] = {}
    found: dict[str, dict[int, str]] = {}
    for i in inputs:
        axes = {0: i.symbols[0] or "batch"} if attempt.batch else {}
        if attempt.others:
            axes |= {d: i.symbols[d] or f"size_{d}" for d, n in enumerate(i.sizes) if d and n is None}
        found[i.name] = axes
        shapes = [i.shape(c) for c in attempt.cases]
        symbols |= {tuple(s[d] for s in shapes): name for d, name in axes.items()}
    for info, made in zip(source.model.graph.output, outputs, strict=True):
        named = [d.dim_param for d in info.type.tensor_type.shape.dim]
        axes = {}
        for axis in range(made.rank):
            column = tuple(s[axis] for s in made.shapes)
            if len(set(column)) > 1:
                own = named[axis] if axis < len(named) else ""
                axes[axis] = symbols.get(column) or own or f"{info.name}_{axis}"
        found[info.name] = axes
    return found


def _remarks(source: OnnxSource, attempt: Attempt, failed: LoadError | None) -> list[str]:
    """What has to be said of how the file was read."""
    kinds = {t.data_type for t in source.model.graph.initializer} | {
        v.type.tensor_type.elem_type for v in source.model.graph.input
    }
    names = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "float64"}
    remarks = list(source.remarks)
    remarks += [f"{name} numbers were read as float32" for kind, name in names.items() if kind in kinds]
    if attempt.freed is not None:
        remarks.append(f"the file takes {attempt.freed} sample(s) at a time; the program takes any number")
    if not attempt.batch:
        remarks.append(f"the program takes one sample at a time ({failed})")
    elif failed is not None:
        remarks.append(f"the program takes inputs of the example's size only ({failed})")
    return remarks
