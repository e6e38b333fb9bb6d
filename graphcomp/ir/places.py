"""Arguments that a native function cannot do without stand in their places, whichever way they were written.

`torch.flip(x, dims=(2,))` and `x.transpose(dim0=1, dim1=2)` become `torch.flip(x, (2,))` and
`x.transpose(1, 2)`, so that every table of operators knows one form of them.
"""

import inspect
from functools import cache

import torch
from torch import fx


def put_in_places(graph: fx.Graph) -> None:
    """Move arguments by name to their places, in place, as far as torch's schema says they must be given.

    Functions of Python (most of torch.nn.functional) stay as they are: their rules know their names.
    """
    for node in graph.nodes:
        is_call = node.op in ("call_function", "call_method")
        if is_call and node.kwargs and not inspect.isfunction(node.target):
            moved = _in_front(_name(node), len(node.args), tuple(node.kwargs))
            node.args = (*node.args, *(node.kwargs[key] for key in moved))
            node.kwargs = {key: value for key, value in node.kwargs.items() if key not in moved}


def _name(node: fx.Node) -> str:
    """As its author wrote it: an alias has names of its own for its arguments."""
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))


@cache
def _in_front(name: str, given: int, named: tuple[str, ...]) -> tuple[str, ...]:
    """Of the arguments by name those that come next, in order, of the overload that has all of them."""
    for overload in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        arguments = [a for a in overload.arguments if not a.is_out]
        places = [a for a in arguments if not a.kwarg_only]
        needed = [a.name for a in places[given:] if not a.has_default_value()]
        if needed and {*needed} <= {*named} <= {a.name for a in arguments[given:]}:
            return tuple(needed) if needed == [a.name for a in places[given : given + len(needed)]] else ()
    return ()
