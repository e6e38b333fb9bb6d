"""What a network's file says of itself to those who run it, beside what it computes.

None of this changes what a program computes, so no pass reads it, every pass keeps it, and programs that
differ in nothing else are the same (`is_same`).
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Tensor

from graphcomp.records import Record

Name = Annotated[str, Field(min_length=1, max_length=1 << 10)]
Text = Annotated[str, Field(max_length=1 << 20)]
"""Tables of characters and of classes are stored as metadata: thousands of lines."""

MOST_PORTS, MOST_ENTRIES, MOST_AXES = 1 << 10, 1 << 12, 8


Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Word = Annotated[str, Field(strict=True, max_length=1 << 20)]
Plain = Flag | Whole | Number | Word | None
Value = Plain | tuple[Plain, ...]
Arguments = dict[Name, Value]
"""What forward is called with beside tensors."""


class Port(Record):
    """One input or output."""

    name: Name = Field(description="as the file has it, e.g. `images`")
    doc: Text = Field(default="", description="its doc string")
    axes: Annotated[dict[Annotated[int, Field(ge=0)], Name], Field(max_length=MOST_AXES)] = Field(
        default_factory=dict,
        description="the axes of any size, and what the file calls their sizes: {0: 'batch', 2: 'height'}",
    )


class Interface(Record):
    """What a file says of itself; of a program that was traced, nothing.

    Names and open axes are data: nothing looks them up, and they are written as they were read.
    """

    inputs: Annotated[tuple[Port, ...], Field(max_length=MOST_PORTS)] = Field(
        default=(), description="in the order of the example inputs; empty: named by convention, batch open"
    )
    outputs: Annotated[tuple[Port, ...], Field(max_length=MOST_PORTS)] = Field(
        default=(), description="in the order of the output's tensors; empty: named by convention"
    )
    metadata: Annotated[dict[Name, Text], Field(max_length=MOST_ENTRIES)] = Field(
        default_factory=dict, description="the file's metadata_props: class names, character tables, ..."
    )
    doc: Text = Field(default="", description="doc string of the file")
    graph_doc: Text = Field(default="", description="doc string of its graph")
    opset: Annotated[int, Field(ge=1, le=1 << 10)] | None = Field(
        default=None, description="version of the default operator set in the file; null: there was no file"
    )
    producer: Annotated[str, Field(max_length=1 << 10)] = Field(
        default="", description="what wrote the file, e.g. `pytorch 1.13.1`"
    )
    remarks: Annotated[tuple[Text, ...], Field(max_length=MOST_PORTS)] = Field(
        default=(), description="what has to be said of how the file was read, a line each"
    )

    specialised: Annotated[tuple[Text, ...], Field(max_length=MOST_ENTRIES)] = Field(
        default=(),
        description="places in the network's code where height or width decided what it does: it is for "
        "those of the example inputs only; empty: for any",
    )
    arguments: Annotated[Arguments, Field(max_length=MOST_ENTRIES)] = Field(
        default_factory=dict,
        description="values of forward's arguments that the network was traced with beside its inputs",
    )
    start: Name | None = Field(
        default=None, description="module whose call the program begins with, of a part of a network (trace)"
    )
    until: Name | None = Field(
        default=None, description="module that the program ends with, of a part of a network (trace)"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for ports in (self.inputs, self.outputs):
            if (twice := _first_twice(port.name for port in ports)) is not None:
                raise ValueError(f"found two ports called {twice!r:.100}, expected names that differ")
        return self

    @property
    def one_at_a_time(self) -> bool:
        """Whether the network takes one sample at a time: its file is for one, and would mix several."""
        return bool(self.inputs) and not any(0 in port.axes for port in self.inputs)

    def misfit(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str | None:
        """What in it cannot belong to a network of these inputs and outputs, as `place: found, expected`."""
        for what, ports, tensors in (("inputs", self.inputs, inputs), ("outputs", self.outputs, outputs)):
            if ports and len(ports) != len(tensors):
                return f"{what}: found {len(ports)} ports, expected {len(tensors)}, one a tensor, or none"
            for index, (port, tensor) in enumerate(zip(ports, tensors, strict=False)):
                beyond = [axis for axis in port.axes if axis >= tensor.dim()]
                if beyond:
                    return f"{what}.{index}: found axis {beyond[0]}, expected one of {tensor.dim()}"
        return None


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
