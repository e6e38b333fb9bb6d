"""What has no rule is opaque: what it touches stays, and is named. And how rules read a node's arguments."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, fx

from graphcomp.channels.tracker import Tracker
from graphcomp.ir import Program, is_hooked, named_tensors, op_name

Rule = Callable[[Tracker, fx.Node], Any]


def pin_value(tracker: Tracker, node: fx.Node, source: fx.Node, reason: str) -> None:
    """All channels of a value stay, and those that its numbers count."""
    value = tracker.values[source]
    tracker.freeze(source)
    for labels in value if isinstance(value, tuple | list) else (value,):
        if isinstance(labels, Tensor):
            tracker.pin(node, labels, reason)
    if source in tracker.second:
        tracker.pin(node, tracker.second[source][1], reason)
    for count in tracker.counts.get(source, ()):
        tracker.pin_count(node, count, "the number of channels is used as a number")


def why_opaque(program: Program, node: fx.Node) -> str:
    """Why a node has no rule, for people."""
    if node.op != "call_module":
        return f"no rule for {op_name(program, node)}"
    layer = program.layer(cast(str, node.target))
    name = type(layer).__name__
    return f"{name} has forward hooks" if is_hooked(layer) else f"no rule for {name}"


COEFFICIENTS = "its weight is stored as coefficients"


def opaque(tracker: Tracker, node: fx.Node, reason: str | None = None) -> Any:
    """No rule: pin what goes in and what comes out."""
    reason = reason or why_opaque(tracker.program, node)
    for source in node.all_input_nodes:
        pin_value(tracker, node, source, reason)
    if node.op == "call_module":  # a layer that is followed may have the same weight
        module = tracker.program.layer(cast(str, node.target))
        tracker.frozen |= {id(t) for t in named_tensors(module).values()}

    def fresh(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return (
                type(value)(map(fresh, value)) if type(value) in (tuple, list) else tuple(map(fresh, value))
            )
        if not isinstance(value, Tensor):
            return value
        labels = tracker.mint(1).reshape([1] * value.ndim).expand(value.shape)
        tracker.pin(node, labels, reason)
        return labels

    return fresh(tracker.program.values[node])


def computed(tracker: Tracker, node: fx.Node) -> Any:
    """Its weight is not there to be cut: pin what goes in and what comes out."""
    return opaque(tracker, node, COEFFICIENTS)


def argument(tracker: Tracker, node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A literal argument, or the number that a node yields."""
    value = node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    def number(a: Any) -> Any:
        return tracker.program.values[a]

    return fx.node.map_arg(value, number)


def operand(tracker: Tracker, node: fx.Node) -> Tensor:
    """Labels of the first operand."""
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    return tracker.labels(cast(fx.Node, source))


def dims_of(value: Any, ndim: int) -> tuple[int, ...]:
    """Dimensions as an operator takes them, counted from the front; all of them for None."""
    if value is None:
        return tuple(range(ndim))
    return tuple(d % ndim for d in ((value,) if isinstance(value, int) else value))


def what(tracker: Tracker, node: fx.Node) -> str:
    """A node by its class or operator, for people."""
    if node.op == "call_module":
        return type(tracker.program.layer(cast(str, node.target))).__name__
    return op_name(tracker.program, node)
