"""A simulated removal in the network that a program was traced from: its code, the simulation's numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graphcomp.ir import MODULE_NAMES, Program, function_name, named_tensors


class NotInModule(Exception):  # noqa: N818 - an answer
    """The module's own code has no place for what a simulation does."""


@contextmanager
def simulated_in(model: nn.Module, program: Program, masked: Program) -> Iterator[None]:
    """Weights of a simulation in the module, for good, and its masks in front of the module's calls, within.

    Args:
        model: the network.
        program: traced from it, without changes.
        masked: the simulation of a removal from the program.

    Raises:
        NotInModule: the module computes a weight that the program holds folded, or does not make the calls
            that masks stand in front of; the latter is only known at the end.
    """
    _fill(model, program, masked)
    known = {n.name for n in program.graph.nodes}
    calls = _Calls(program)
    for node in masked.graph.nodes:
        if node.name in known or node.op != "call_function":
            continue
        mask = _Mask(node.target, masked.tensors[str(node.args[1].target)], node.args[2:])
        calls.add(*_reader(node, known), mask)
    with calls:
        yield
    calls.check()


def _fill(model: nn.Module, program: Program, masked: Program) -> None:
    own = named_tensors(model)
    for name, new in masked.tensors.items():
        old, found = program.tensors.get(name), own.get(_own_name(name, own))
        if old is not None and not torch.equal(old, new):
            if found is None or found.shape != old.shape or not torch.equal(found, old):
                raise NotInModule(f"{name} is computed, or of an opened layer")
            found.copy_(new)
        elif old is None and name.endswith(".bias"):  # that there was not
            _module(model, name.removesuffix(".bias")).register_parameter("bias", nn.Parameter(new))


def _own_name(name: str, own: Mapping[str, Tensor]) -> str:
    """The module's name of a tensor: layers that were made of functions are one level further down."""
    parts = name.split(".")
    return name if name in own else ".".join([*parts[:-2], *parts[-1:]])


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(path.rpartition(".")[0])


class _Mask:
    """What stands in front of a call while some channels count for nothing."""

    def __init__(self, function: Callable[..., Tensor], held: Tensor, args: Sequence[Any]) -> None:
        self.function, self.held, self.args = function, held, args

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, self.held, *self.args)


def _reader(node: fx.Node, known: set[str]) -> tuple[fx.Node, int]:
    """The call that a mask, or a chain of them, stands in front of, and which of its operands it is."""
    while True:
        (reader,) = node.users
        if reader.name in known:
            break
        node = reader
    places = [i for i, a in enumerate(reader.args) if a is node]
    if len(places) != 1:
        raise NotInModule(f"masks in front of {reader.name}")
    return reader, places[0]


class _Calls(TorchFunctionMode):
    """Puts masks in front of functions, known by their names and by how many of the same came before.

    Layers of torch call functions, too: in a graph both count.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.names = {n.name: _name(program, n) for n in program.graph.nodes}
        self.masks: dict[tuple[str, int], list[tuple[int, _Mask]]] = {}
        self.seen: dict[str, int] = {}

    def add(self, reader: fx.Node, position: int, mask: _Mask) -> None:
        """In front of an operand of a call in the graph."""
        name = self.names[reader.name]
        same = [n for n, called in self.names.items() if called == name]
        self.masks.setdefault((name, same.index(reader.name)), []).append((position, mask))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count, and mask what has masks."""
        name = _called(func)
        at = self.seen.setdefault(name, 0)
        self.seen[name] += 1
        given = list(args)
        for position, mask in self.masks.get((name, at), []):
            given[position] = mask(given[position])
        return func(*given, **(kwargs or {}))

    def check(self) -> None:
        """Raise NotInModule if the module calls other functions than the graph."""
        for name in {name for name, _ in self.masks}:
            count, found = list(self.names.values()).count(name), self.seen.get(name, 0)
            if found != count:
                raise NotInModule(f"calls {name} {found} times, the graph {count} times")


def _name(program: Program, node: fx.Node) -> str:
    if node.op == "call_module":
        return MODULE_NAMES.get(type(program.modules[str(node.target)]), "")
    return _called(node.target) if node.op in ("call_function", "call_method") else ""


def _called(function: Any) -> str:
    """`x @ y` is a method where it is called, and a function in graphs."""
    name = getattr(function, "__name__", function)
    return function_name(name.strip("_") if name.startswith("__") else function)
