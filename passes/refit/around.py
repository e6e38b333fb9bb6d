"""What is around a layer's calls in a graph: norms, additions, activations, other uses of its weight."""

import math
from collections import Counter

from torch import fx, nn

from graphcomp.ir import Program, op_name

BatchNorm = nn.modules.batchnorm._BatchNorm
BOUNDS = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, math.inf),
    "hardsigmoid": (-3.0, 3.0),
}
"""Beyond which values activations yield the same, whatever they are given."""


def calls_of(program: Program) -> dict[str, list[fx.Node]]:
    """Layer -> its calls, by the order of the first."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(node)
    return found


def behind(program: Program, node: fx.Node) -> tuple[fx.Node, str | None]:
    """The normalisation that alone reads a layer, and its path; else the layer's node."""
    (user,) = node.users if len(node.users) == 1 else (None,)
    if user is not None and user.op == "call_module":
        norm = program.layer(str(user.target))
        calls = sum(n.op == "call_module" and n.target == user.target for n in program.graph.nodes)
        if isinstance(norm, BatchNorm) and norm.running_mean is not None and calls == 1:
            return user, str(user.target)
    return node, None


def norms_of(program: Program, node: fx.Node) -> list[str]:
    """Normalisations that read a value, whatever else does."""
    calls = [str(user.target) for user in node.users if user.op == "call_module"]
    return [path for path in calls if isinstance(program.layer(path), BatchNorm)]


def sum_with(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The addition that alone reads a value, and its other operand."""
    (user,) = node.users if len(node.users) == 1 else (None,)
    if user is None or op_name(program, user) != "add" or len(user.args) != 2 or user.kwargs:
        return None
    others = [arg for arg in user.args if arg is not node]
    return (user, others[0]) if len(others) == 1 and isinstance(others[0], fx.Node) else None


def are_alike(program: Program, added: tuple[fx.Node, fx.Node], node: fx.Node) -> bool:
    """Whether a sum, its other operand and a value are of one shape."""
    shapes = {program.shape(n) for n in (*added, node)}
    return len(shapes) == 1 and None not in shapes


def bounds_of(program: Program, node: fx.Node) -> tuple[float, float]:
    """What the activations that alone read a value cut off, if they are of one kind."""
    kinds = {op_name(program, user) for user in node.users}
    return BOUNDS.get(kinds.pop(), (-math.inf, math.inf)) if len(kinds) == 1 else (-math.inf, math.inf)


def tied_layers(program: Program) -> set[str]:
    """Layers whose tensors have another name, or are read by a node directly."""
    count = Counter(id(t) for t in program.tensors.values())
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    found = set()
    for path, module in program.called_modules().items():
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if any(count[id(program.tensors[n])] > 1 or n in read for n in names):
            found.add(path)
    return found
