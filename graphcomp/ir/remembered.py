"""What networks keep beside what they return: in hooks, attributes and constants that no trace sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, fx, nn

from graphcomp.errors import TraceError, some_of
from graphcomp.ir.hooks import is_hooked
from graphcomp.ir.program import is_foreign, named_tensors

_CONTAINERS = (dict, list, set)


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Modules that remember what they computed get back what they held: a trace computes no tensors."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    held = [(v, copy(v)) for _, known in before for v in known.values() if type(v) in _CONTAINERS]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in held:
            _refill(container, content)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def require_values_of_now(model: nn.Module, graph: fx.Graph) -> None:
    """Raise TraceError, naming the node, for what an earlier call or another trace has left behind."""
    for node in graph.nodes:
        strange = any(source.graph is not graph for source in node.all_input_nodes)
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            strange = not isinstance(getattr(model.get_submodule(owner), leaf, None), Tensor)
        if strange:
            raise TraceError(
                f"{node.name}: found a value that {type(model).__name__} keeps from one call to the next, "
                "expected outputs that follow from the inputs; return it and pass it as an input, or keep "
                "what hooks see where a copy of the network finds it"
            )


def doubts(model: nn.Module, graph: fx.Graph) -> str:
    """Why a trace may be another network than the model: "" if nothing speaks for that."""
    hooked = [path for path, module in model.named_modules() if is_hooked(module)]
    if hooked:
        return f"{some_of(hooked)} has hooks, and what they keep for later may be of an earlier call"
    foreign = [n.name for n in graph.nodes if is_foreign(n.target)]
    if foreign:
        return f"{some_of(foreign)} calls functions wrapped by torch.fx.wrap"
    own = named_tensors(model)
    constants = [n.name for n in graph.nodes if n.op == "get_attr" and n.target not in own]
    if constants:
        return f"{some_of(constants)} is a tensor that no module holds, and may be of an earlier call"
    return ""
