"""Numbers that modules hold and their code counts channels by: `x.split(self.width, 1)`, `c != self.width`.

The layers of a smaller program do not say them. What does is the program itself: its calls have other
literals, and its values other shapes, than those of the network at the same places. So a number that a module
holds is the one that took its place in a call of that module's own code, or else in a shape there. Whether
that was meant is not known here: who asks compares what comes out.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from graphcomp.ir.program import OWNER_KEY, Program


def renumber(before: Program, program: Program, result: nn.Module) -> bool:
    """Set the numbers that modules of a network hold to those of a smaller program; whether any is another.

    Args:
        before: the trace of the network as it was.
        program: made from it.
        result: the network with the program's layers.
    """
    changes = _changes(before, program)
    layers = program.called_modules()
    changed = False
    for path, module in result.named_modules():
        if path not in changes or path in layers:
            continue
        for name, value in vars(module).items():
            new = _renumbered(value, changes[path])
            if new != value:
                setattr(module, name, new)
                changed = True
    return changed


def _changes(before: Program, program: Program) -> dict[str, dict[int, int]]:
    """Module -> what its numbers have become; literals are better evidence than shapes."""
    now = {node.name: node for node in program.graph.nodes}
    pairs = [(node, now[node.name]) for node in before.graph.nodes if node.name in now]
    found: dict[str, dict[int, int]] = {}
    for numbers in (_literals, _sizes):
        for old, new in pairs:
            a, b = list(numbers(before, old)), list(numbers(program, new))
            if len(a) != len(b):
                continue
            owner = _owner(old)
            for x, y in zip(a, b, strict=True):
                if x != y:
                    found.setdefault(owner, {}).setdefault(x, y)
    return found


def _owner(node: fx.Node) -> str:
    """The module whose code makes the call."""
    owner = str(node.meta.get(OWNER_KEY, ""))
    return owner.rpartition(".")[0] if node.op == "call_module" else owner


def _literals(_: Program, node: fx.Node) -> Iterator[int]:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return (x for x in found if type(x) is int)


def _sizes(program: Program, node: fx.Node) -> Iterator[int]:
    """Of what a call is given and yields."""
    for value in (*(program.values[n] for n in node.all_input_nodes), program.values[node]):
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Tensor):
                yield from part.shape


def _renumbered(value: Any, changes: dict[int, int]) -> Any:
    if type(value) is int:
        return changes.get(value, value)
    if type(value) in (tuple, list):
        return type(value)(_renumbered(x, changes) for x in value)
    return value
