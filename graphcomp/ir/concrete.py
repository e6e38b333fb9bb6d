"""What the nodes of a graph in the making yield, as far as shapes say it.

Python asks a traced network for numbers: `if x.shape[-2] < 7`, `range(x.size(1))`, `int(h * 0.5)`. The answer
comes from the example inputs: the node that is asked for is run on tensors without numbers, at several batch
sizes. Only what Python asks for is run, so a network without such questions costs nothing. An answer that
differs between batch sizes is none; one that would differ at other heights and widths is remembered: the
network is *specialised* to the example's.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.lifting import tensor_at
from graphcomp.ir.meta import filled_with_zero
from graphcomp.ir.operators import RESHAPES_IN_PLACE
from graphcomp.ir.program import Program, map_leaves, with_tensors

BATCHES = (1, 2, 3)
"""Batch sizes at which an answer must be the same."""
_LARGER = 32
"""Pixels by which heights and widths are changed to see whether an answer follows from them."""


class Unknown(Exception):  # noqa: N818 - a signal inside this room, not an error
    """No number can be given; the message says why."""


class FollowsBatch(Unknown):
    """It is another one at other batch sizes."""


class Values:
    """Values of nodes, found when they are asked for.

    Args:
        root: holds the modules and tensors that the nodes name.
        inputs: example inputs, in the order of the placeholders.

    Attributes:
        running: while a node is run: calls of modules are then no calls of the network's.
    """

    def __init__(self, root: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._root = root
        self._inputs = inputs
        self.running = False
        self._runs: dict[tuple[int, bool], dict[fx.Node, Any]] = {}
        self._modules: dict[str, nn.Module] = {}

    def fresh(self) -> "Values":
        """Of the same network, and nothing known."""
        return Values(self._root, self._inputs)

    @property
    def device(self) -> torch.device:
        """Where the example inputs are."""
        return self._inputs[0].device if self._inputs else torch.device("cpu")

    def of(self, node: fx.Node, batch: int = 1, grown: bool = False) -> Any:
        """What a node yields for example inputs of this batch size, or for larger ones.

        Tensors that depend on an input are meta tensors; what depends on constants and sizes alone has
        numbers. Raises Unknown.
        """
        known = self._runs.setdefault((batch, grown), {})
        waiting = [node]
        while waiting:  # not recursive: networks are deeper than Python's stack
            last = waiting[-1]
            missing = [n for n in last.all_input_nodes if n not in known]
            if last in known or missing:
                waiting = waiting[:-1] if last in known else [*waiting, *missing]
                continue
            known[last] = self._run(last, known, batch, grown)
            waiting.pop()
        return known[node]

    def number(self, node: fx.Node) -> tuple[Any, bool]:
        """What a node yields that is no activation, and whether other heights and widths would change it.

        Raises Unknown: it depends on the batch size or on values of tensors.
        """
        return self._answer(node, _plain, "it")

    def length(self, node: fx.Node) -> tuple[int, bool]:
        """How many items iterating over a node yields, and whether that depends on heights and widths.

        Raises Unknown: as `number`.
        """
        return self._answer(node, _count, "its length")

    def _answer(self, node: fx.Node, read: Callable[[Any], Any], what: str) -> tuple[Any, bool]:
        found = [read(self.of(node, batch)) for batch in BATCHES]
        if any(type(x) is not type(found[0]) or x != found[0] for x in found[1:]):
            said = ", ".join(f"{x} at {batch}" for x, batch in zip(found, BATCHES, strict=True))
            raise FollowsBatch(f"{what} depends on the batch size ({said})")
        try:
            return found[0], bool(read(self.of(node, grown=True)) != found[0])
        except Unknown:
            return found[0], True

    def _run(self, node: fx.Node, known: Mapping[fx.Node, Any], batch: int, grown: bool) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "placeholder":
            return self._input(node, batch, grown)
        given = list(_tensors((args, kwargs)))
        if any(t.is_meta for t in given) or node.op == "call_module":
            args, kwargs = map_leaves((args, kwargs), _on_meta)
        if node.op in ("call_function", "call_method"):
            args, kwargs = filled_with_zero(node, args, kwargs)
        self.running = True
        try:
            with torch.no_grad():
                return self._call(node, args, kwargs)
        # Whatever an operator raises on tensors without numbers.
        except Exception as error:
            raise Unknown(f"{node.name} ({node.target}): {error}") from error
        finally:
            self.running = False

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "get_attr":
            return tensor_at(self._root, cast(str, node.target))
        if node.op == "call_module":
            target = cast(str, node.target)
            if target not in self._modules:
                module = self._root.get_submodule(target)
                self._modules[target] = with_tensors(module, lambda t: t.to("meta")).eval()
            return self._modules[target](*args, **kwargs)
        if node.op == "call_method":
            name = cast(str, node.target)
            if name in RESHAPES_IN_PLACE:
                args = (args[0].view(args[0].shape), *args[1:])  # the operand keeps its shape
            return getattr(args[0], name)(*args[1:], **kwargs)
        if node.target is getattr and isinstance(args[0], Tensor):
            if args[1] == "device":
                return self.device
            if args[1] in ("is_meta", "is_cuda"):  # what a tensor without numbers would answer wrongly
                return self.device.type == args[1].removeprefix("is_")
        return cast(Callable[..., Any], node.target)(*args, **kwargs)

    def _input(self, node: fx.Node, batch: int, grown: bool) -> Any:
        before = [n for n in node.graph.nodes if n.op == "placeholder"]
        at = before.index(node)
        if at >= len(self._inputs):
            if not node.args:
                raise Unknown(f"{node.target}: found no example input for it")
            return node.args[0]
        example = self._inputs[at]
        shape = [n + _LARGER * grown if d > 1 else n for d, n in enumerate(example.shape)]
        if shape:
            shape[0] = batch
        return torch.empty(shape, dtype=example.dtype, device="meta")


def values_of(program: Program) -> Values:
    """Those of a program's nodes, which all who ask share."""
    known = program.findings.setdefault(__name__, {})
    if not known:
        known["values"] = Values(program.module, program.example_inputs)
    return cast(Values, known["values"])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return value.to("meta") if isinstance(value, Tensor) else value


def _plain(value: Any) -> Any:
    """A number, also out of a tensor that holds one."""
    if isinstance(value, Tensor):
        if value.is_meta or value.numel() != 1:
            raise Unknown("it is a tensor, whose values only a run knows")
        return value.item()
    return value


def _count(value: Any) -> int:
    if isinstance(value, Tensor) and not value.ndim:
        raise Unknown("it is a tensor without axes")
    return len(value)
