"""The content of `program.json`, as plain data: what `ir.saved.storage` writes and reads."""

from typing import Any, Literal

from pydantic import Field

from graphcomp.ir.interface import Interface
from graphcomp.records import Record

CONTAINER = "Module"
"""Kind of a module that the graph does not call: it only holds others."""


class NodeRecord(Record):
    """One fx node; nodes, tuples, slices, … within `args` are objects of one key (`{"node": "relu"}`)."""

    name: str
    op: Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
    target: str
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    made_by: str | None = Field(default=None, description="the pass that made the node or changed it last")


class ModuleRecord(Record):
    """One module that the graph calls, or a container on the way to one (class `Module`)."""

    kind: str = Field(
        description="name of a public class of torch.nn or of a layer of graphcomp.ir.coefficients"
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="for the constructor")
    attributes: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by submodule: plain attributes that the constructor sets otherwise"
    )


class TensorRecord(Record):
    """One parameter or buffer."""

    kind: Literal["parameter", "buffer"]
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False
    persistent: bool = True
    same_as: str | None = Field(default=None, description="the name that this tied tensor is stored under")
    order: tuple[int, ...] | None = Field(
        default=None, description="dimensions from outermost to innermost in memory, if not 0, 1, 2, …"
    )


class ProgramRecord(Record):
    """The content of `program.json`."""

    format: Literal[1] = 1
    graphcomp: str
    torch: str
    name: str = Field(description="class name of the traced network")
    training: bool
    inputs: int
    nodes: list[NodeRecord]
    modules: dict[str, ModuleRecord]
    tensors: dict[str, TensorRecord]
    history: list[dict[str, Any]]
    interface: Interface = Field(default_factory=Interface)
