"""What networks keep beside what they return: in hooks, attributes and constants that no trace sees."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import TraceError, some_of
from graphcomp.ir.arguments import call_with
from graphcomp.ir.concrete import BATCHES
from graphcomp.ir.hooks import is_hooked
from graphcomp.ir.interface import Arguments
from graphcomp.ir.program import evaluating, is_foreign, named_tensors

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


_OTHER_BATCH = sum(BATCHES) + 1
"""A batch size that no decision is asked at."""


def forgot(model: nn.Module, inputs: tuple[Tensor, ...], arguments: Arguments) -> bool:
    """Call a network with another batch size, so that what it knows of its last call
    (`if x.shape != self.shape`) is of none of those that decisions are asked at; whether anything is.

    Args:
        inputs: of one sample.
        arguments: of forward, beside them.
    """
    return bool(_kept(model, tuple(x.expand(_OTHER_BATCH, *x.shape[1:]) for x in inputs), arguments))


def _kept(model: nn.Module, inputs: tuple[Tensor, ...], arguments: Arguments) -> set[str]:
    """Call a network; dotted names of attributes that are others than before."""
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    args, kwargs = call_with(model.forward, inputs, arguments)
    with evaluating(model), torch.no_grad():
        model(*args, **kwargs)
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if before[path].get(name) is not value
    }


def require_constants(
    model: nn.Module, names: Iterable[str], inputs: tuple[Tensor, ...], arguments: Arguments
) -> None:
    """Raise TraceError for tensors, by the attributes that hold them, that every call replaces.

    torch.export takes what it finds there for constants.
    """
    held = [name for name in names if name]
    if not held:
        return
    with left_as_it_is(model):
        again = sorted(_kept(model, inputs, arguments).intersection(held))
    if again:
        raise _kept_from_before(again[0], model)


def require_values_of_now(model: nn.Module, graph: fx.Graph) -> None:
    """Raise TraceError, naming the node, for what an earlier call or another trace has left behind."""
    for node in graph.nodes:
        strange = any(source.graph is not graph for source in node.all_input_nodes)
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            strange = not isinstance(getattr(model.get_submodule(owner), leaf, None), Tensor)
        if strange:
            raise _kept_from_before(node.name, model)


def _kept_from_before(name: str, model: nn.Module) -> TraceError:
    return TraceError(
        f"{name}: found a value that {type(model).__name__} keeps from one call to the next, expected "
        "outputs that follow from the inputs; return it and pass it as an input, or keep what hooks see "
        "where a copy of the network finds it"
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
