"""A program as a graph of networkx, for whoever wants to draw, search or store it with other tools."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import fx, nn

from graphcomp.ir.program import PASS_KEY, Program
from graphcomp.ir.text import describe, op_name

if TYPE_CHECKING:
    import networkx as nx

_CHANNELS = ("out_channels", "out_features", "num_features", "embed_dim")
"""What layers call the number of channels that they make."""


def to_networkx(program: Program) -> "nx.MultiDiGraph":
    """The graph for networkx: a node for each of the program's, an edge for each operand of each.

    Attributes are str and int, as every writer of networkx takes them; what does not apply is left out.

    Graph: `model`, class name of the network.

    Nodes, by their names and in the order in which they run:
        op: what fx calls it: placeholder, get_attr, call_module, call_function, call_method, output.
        operator: the name of the operator, whichever way it is called (`ir.operators`).
        text: what it computes, as the printed program shows it.
        target: module path, or name of the tensor, input, function or method.
        shape: at batch 1, as in 1x64x56x56; only where it yields one tensor.
        channels: that a layer makes: its output channels or features.
        params: elements of the module's parameters, or of the one that it is. Nodes of one module each
            have all of them.
        made_by: the pass that made the node or changed it last.
    Edges, from who computes a value to who takes it:
        operand: where it takes it: "1" for the second argument, "0.1" for the second value of a list in
            the first, "weight" for a named argument. `x + x` has two edges, "0" and "1".

    Multiply-accumulates are known to `graphcomp.measure`: `with_macs(program)` is this graph with them.
    """
    import networkx as nx  # takes a third of a second

    graph = nx.MultiDiGraph(model=type(program.module).__name__)
    for node in program.graph.nodes:
        graph.add_node(node.name, **_attributes(program, node))
        for source, operand in operands(node):
            graph.add_edge(source.name, node.name, operand=operand)
    return graph


def operands(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """Every use that a node makes of another, and where: `(x, "0"), (x, "1")` for `x + x`."""
    for i, arg in enumerate(node.args):
        yield from _within(arg, str(i))
    for name, arg in node.kwargs.items():
        yield from _within(arg, name)


def _within(value: Any, place: str) -> Iterator[tuple[fx.Node, str]]:
    if isinstance(value, fx.Node):
        yield value, place
        return
    inner: Any = ()
    if isinstance(value, tuple | list):
        inner = enumerate(value)
    elif isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, slice):
        inner = (("start", value.start), ("stop", value.stop), ("step", value.step))
    for key, item in inner:
        yield from _within(item, f"{place}.{key}")


def _attributes(program: Program, node: fx.Node) -> dict[str, str | int]:
    target, shape = node.target, program.shape(node)
    found: dict[str, str | int] = {
        "op": node.op,
        "operator": op_name(program, node),
        "text": describe(program, node),
        "target": target if isinstance(target, str) else node._pretty_print_target(target),
        "made_by": str(node.meta.get(PASS_KEY, "")),
    }
    if shape is not None:
        found["shape"] = "x".join(map(str, shape))
    if node.op == "call_module":
        module = program.layer(cast(str, target))
        found["params"] = sum(p.numel() for p in module.parameters())
        sizes = (getattr(module, name, None) for name in _CHANNELS)
        size = next((size for size in sizes if isinstance(size, int)), None)
        if size is not None:
            found["channels"] = size
    elif node.op == "get_attr":
        tensor = program.tensors[cast(str, target)]
        found["params"] = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
    return found
