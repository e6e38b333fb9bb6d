"""A program as an ONNX model before anything is checked: by our own rows, or by torch's exporter.

The rows (`onnx.rows`, `onnx.writing`) write every call of a program as it is, under its own name. A call
without a row sends the whole program through torch's exporter, which takes a hundred times as long; the draft
says which call that was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import ModelProto, version_converter

from graphcomp.base import muted
from graphcomp.errors import first_line
from graphcomp.ir import Program
from graphcomp.onnx.origins import Origin, origin_of
from graphcomp.onnx.rows import NoRow
from graphcomp.onnx.sizes import OpenAxes
from graphcomp.onnx.translate import Translated
from graphcomp.onnx.writing import OPSET, write


@dataclass(frozen=True)
class Draft:
    """A model, and where its nodes come from.

    Attributes:
        model: to work on.
        tags: the program's node that each of its nodes is made for, by name.
        values: what the program's nodes yield is called, by their names; empty if torch's exporter made it.
        fallback: why torch's exporter made it; None if our rows did.
    """

    model: ModelProto = field(repr=False)
    tags: Mapping[str, str] = field(repr=False)
    values: Mapping[str, str] = field(repr=False)
    fallback: str | None = None

    def origins(self, program: Program) -> dict[str, Origin | None]:
        """For a program of the same graph, whose passes may have other names."""
        nodes = {node.name: node for node in program.graph.nodes}
        return {name: origin_of(nodes[tag]) for name, tag in self.tags.items()}


def draft(
    program: Program,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    axes: OpenAxes,
    batch: int,
    exporter: Callable[[], Translated],
) -> Draft:
    """The model of a program.

    Args:
        program: in eval mode.
        inputs, outputs: what they are called.
        opset: version of the default operator set.
        axes: for every input those that are left open.
        batch: where the first axis is not open.
        exporter: makes the model where a row is missing.
    """
    try:
        written = write(program, inputs, outputs, axes, batch)
        if opset == OPSET:
            return Draft(written.model, written.tags, written.values)
        return Draft(*_converted(written.model, written.tags, opset), written.values)
    except NoRow as reason:
        translated = exporter()
        return Draft(translated.model(), translated.tags, {}, str(reason))


def _converted(
    model: ModelProto, tags: Mapping[str, str], opset: int
) -> tuple[ModelProto, Mapping[str, str]]:
    """The model in another version, with its tags; what the conversion adds belongs to who reads it."""
    with muted():
        try:
            new = version_converter.convert_version(model, opset)
        # The converter is C++, whose errors have no common base here.
        except Exception as error:
            raise NoRow(f"opset {opset}: {first_line(error)}") from error
    readers = {name: node for node in new.graph.node for name in node.input}
    found = dict[str, str]()
    for index, node in reversed(list(enumerate(new.graph.node))):
        if not node.name or node.name in found:
            node.name = f"opset/{index}"
        reader = next((readers[name] for name in node.output if name in readers), None)
        inherited = found.get(reader.name, "") if reader is not None else ""
        found[node.name] = tags.get(node.name, inherited or list(tags.values())[-1])
    return new, found
