"""The rule for recurrent layers: a hidden unit is a row of every gate, and a column that all units read.

A unit's gates and cell depend on the input and on what all units were before. So it goes as any channel
does: whoever reads it reads zero, the units beside it among them. Both directions of a layer have one width,
and lose the same.
"""

from typing import Any, cast

from torch import Tensor, fx

from graphcomp.channels.labels import along, compact, varying
from graphcomp.channels.layers import is_beside
from graphcomp.channels.opaque import opaque, operand
from graphcomp.channels.tracker import Tracker
from graphcomp.ir import RecurrentLayer


def recurrent(tracker: Tracker, node: fx.Node) -> Any:
    """Reads features, mints units; yields all outputs, and the last states."""
    module = cast(RecurrentLayer, tracker.program.layer(cast(str, node.target)))
    labels = operand(tracker, node)
    if is_beside(labels, 2):
        return opaque(tracker, node)
    features = tracker.vector(node, labels, 2)
    directions = [_direction(tracker, node, module, end, features) for end in module.ends]
    units = directions[0]
    for other in directions[1:]:
        tracker.couple(node, units, other)
    for state in (*node.args[1:], *node.kwargs.values()):
        if isinstance(state, fx.Node):
            _begin(tracker, node, tracker.labels(state), units)
    outputs, *states = cast(tuple[Tensor, ...], tracker.program.values[node])
    every = units.repeat(len(directions))
    return (along(every, 2, outputs.shape), *(along(units, 2, s.shape) for s in states))


def _direction(tracker: Tracker, node: fx.Node, module: RecurrentLayer, end: str, features: Tensor) -> Tensor:
    weight, recurrence, *_ = rows = [f"{node.target}.{name}{end}" for name in module.names]
    known = tracker.known_rows(weight, 0)
    units = tracker.mint(module.hidden_size) if known is None else known[: module.hidden_size]
    tracker.site(node, "in", [(weight, 1)], features)
    tracker.site(node, "out", [(name, 0) for name in rows], units.repeat(module.gates))
    tracker.site(node, "in", [(recurrence, 1)], units)
    return units


def _begin(tracker: Tracker, node: fx.Node, labels: Tensor, units: Tensor) -> None:
    """A state that is given has the units' channels, or they stay."""
    if 2 in varying(labels) and bool(compact(labels).all()):
        tracker.couple(node, tracker.vector(node, labels, 2), units)
    else:
        tracker.pin(node, units, "begin with a state that has no channels to go with them")
