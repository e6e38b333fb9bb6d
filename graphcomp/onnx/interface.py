"""What a file says of itself to those who run it: names, open axes, metadata, doc strings, history.

A program that was read from a file has all of it from there (`ir.Interface`); one that was traced is named by
convention: one input is `input`, several have the names of forward's arguments; one output is `output`, those
in tuples get `_0`, `_1`, …, those in dicts their keys.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnx import ModelProto
from torch import Tensor

from graphcomp import ir
from graphcomp.base import nests_at_most
from graphcomp.errors import ExportError, LoadError, first_line
from graphcomp.ir import Program, output_tensors

HISTORY_PROP = "graphcomp.history"
"""Key of the file's metadata: the plans of the passes that made it, as JSON, oldest first."""

_MOST_HISTORY, _MOST_DEPTH = 1 << 20, 256
_SHORT = "name", "summary", "fitted"
"""Of plans, what is written of them even where they are too long."""


def input_names(program: Program) -> list[str]:
    """A name for every example input."""
    _require_fit(program)
    return ir.input_names(program)


def output_names(program: Program) -> list[str]:
    """A name for every tensor of the output, in the order of `output_tensors`; none is an input's."""
    wanted = [port.name for port in program.interface.outputs] or list(_names_in(program.output, ""))
    taken, names = set(input_names(program)), list[str]()
    for name in wanted:
        while name in taken:
            name += "_output"
        taken.add(name)
        names.append(name)
    if not names:
        raise ExportError(
            f"output: found {type(program.output).__name__} without a tensor, expected at least one tensor"
        )
    return names


def _require_fit(program: Program) -> None:
    flaw = program.interface.misfit(program.example_inputs, output_tensors(program.output))
    if flaw is not None:
        raise ExportError(f"interface.{flaw}; give the program an interface of its own, or an empty one")


def _names_in(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield prefix or "output"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _names_in(item, f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _names_in(item, f"{prefix or 'output'}_{index}")
    elif value is not None:
        raise ExportError(
            f"{prefix or 'output'}: found {type(value).__name__}, expected tensors, or tuples, lists and "
            "dicts of them; return only tensors from forward"
        )


def describe(model: ModelProto, program: Program) -> None:
    """Write what the program knows of its file into another file of it, and the history of its passes."""
    told = program.interface
    model.doc_string, model.graph.doc_string = told.doc, told.graph_doc
    for ports, values in ((told.inputs, model.graph.input), (told.outputs, model.graph.output)):
        for port, value in zip(ports, values, strict=False):
            value.doc_string = port.doc
    del model.metadata_props[:]
    history = {HISTORY_PROP: _history_text(program.history)} if program.history else {}
    for key, text in (told.metadata | history).items():
        model.metadata_props.add(key=key, value=text)


def _history_text(history: Sequence[dict[str, Any]]) -> str:
    """The plans without what no verb reads; of plans that are too long only what is short (`_SHORT`)."""
    plans = [{k: v for k, v in plan.items() if k not in ("evidence", "kept")} for plan in history]
    text = json.dumps(plans, separators=(",", ":"))
    if len(text) <= _MOST_HISTORY:
        return text
    return json.dumps([{k: plan[k] for k in _SHORT if k in plan} for plan in plans])


def read_history(text: str) -> tuple[dict[str, Any], ...]:
    """The plans that `describe` wrote into a file, whoever wrote them.

    Raises:
        LoadError: if it is anything else than a list of JSON objects, or too long or too deep for one.
    """
    flaw: object = f"{len(text)} characters"
    if len(text) <= _MOST_HISTORY:
        try:
            plans = json.loads(text)
        except (ValueError, RecursionError) as error:
            flaw = first_line(error)
        else:
            if (
                isinstance(plans, list)
                and all(isinstance(p, dict) for p in plans)
                and nests_at_most(plans, _MOST_DEPTH)
            ):
                return tuple(plans)
            flaw = "something else"
    raise LoadError.at(
        f"metadata {HISTORY_PROP!r}", flaw, "a list of plans", "export the program again, or delete the entry"
    )
