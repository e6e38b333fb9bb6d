"""What is fitted: every layer that yields rows of the original, with what its outputs are compared with.

    [factor ->] layer -> [normalisation] -> [+ what was computed before] -> [ReLU]

A layer that is called several times is fitted to all of its calls together.

The target is the original's value behind the normalisation or, before an addition whose other operand the
small network has computed already, the original's sum less that operand: so a layer also makes up for what
the other branch lost (METHODS 9.5). A ReLU behind it says where only the sign matters.

A factor in front, whose outputs are no channels of the original, is fitted together with the layer that mixes
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from graphcomp.ir import DctLayer, Program
from graphcomp.measure import groups_of, is_linear, is_mixing
from graphcomp.passes.refit.around import (
    are_alike,
    behind,
    bounds_of,
    calls_of,
    norms_of,
    sum_with,
    tied_layers,
)
from graphcomp.passes.refit.lineage import Origin
from graphcomp.records import LeftAlone

OTHER_SIZE = "its output has another size than in the original"


@dataclass(frozen=True, eq=False)
class Unit:
    """A layer to fit.

    Attributes:
        layer, node: its path and its first call in the small program.
        origin: which rows of the original its outputs are.
        norm: path of the normalisation that alone reads it.
        seen: name of the original's node that holds the target.
        other: node of the small program that is added to it; None if nothing is, or not yet computed.
        low, high: what the activation behind it cuts off.
        is_last: whether its channels are the last dimension, not the second.
        factor: path and call of a layer in front that is fitted with it.
        later: of a layer that is called more than once: what its other calls are compared with, in order.
    """

    layer: str
    node: fx.Node
    origin: Origin
    norm: str | None
    seen: str
    other: fx.Node | None
    low: float
    high: float
    is_last: bool
    factor: tuple[str, fx.Node] | None = None
    later: tuple["Unit", ...] = ()

    @property
    def calls(self) -> tuple["Unit", ...]:
        """This one and the later ones."""
        return self, *self.later

    @property
    def due(self) -> str:
        """Name of the node before which it is fitted."""
        return self.node.name if self.factor is None else self.factor[1].name

    @property
    def source(self) -> str:
        """The layer that reads what is fitted on."""
        return self.layer if self.factor is None else self.factor[0]


def find_units(
    program: Program, original: Program, origins: Mapping[str, Origin]
) -> tuple[list[Unit], list[LeftAlone]]:
    """All layers that can be fitted, in the order of the graph, and why the other mixing layers cannot."""
    units, left = list[Unit](), list[LeftAlone]()
    calls, sources = calls_of(program), calls_of(original)
    tied = tied_layers(program)
    for layer, nodes in calls.items():
        if not is_mixing(program.layer(layer)):
            continue
        origin = origins.get(layer)
        source = sources.get(origin.layer, []) if origin else []
        found: Unit | str
        if origin is None:
            found = "its outputs are no channels of the original"
        elif len(source) != len(nodes):
            found = "it is called another number of times than in the original"
        elif layer in tied:
            found = "its weight is used elsewhere too"
        elif any(len(node.args) != 1 or node.kwargs for node in nodes):
            found = "it is told how large its output is to be"
        else:
            factor = _factor(program, nodes[0], calls, tied, origins) if len(nodes) == 1 else None
            found = _together(
                [_unit(program, original, *pair, origin, factor) for pair in zip(nodes, source, strict=True)]
            )
        if isinstance(found, Unit):
            units.append(found)
        else:
            left.append(LeftAlone(where=layer, reason=found))
    fitted = {unit.factor[0] for unit in units if unit.factor is not None}
    return units, [k for k in left if k.where not in fitted]


def _together(calls: Sequence[Unit | str]) -> Unit | str:
    """The unit of all calls of a layer; why there is none if one of them cannot be part of it."""
    units = []
    for call in calls:
        if isinstance(call, str):
            return call
        units.append(call)
    if len(units) > 1 and any(unit.norm is not None for unit in units):
        return "it is called more than once, in front of normalisations of their own: fold them first"
    return replace(units[0], later=tuple(units[1:]))


def _factor(
    program: Program,
    node: fx.Node,
    calls: Mapping[str, Sequence[fx.Node]],
    tied: set[str],
    origins: Mapping[str, Origin],
) -> tuple[str, fx.Node] | None:
    """The layer in front of one that only mixes its channels, where nothing else knows that one's outputs."""
    before, last = node.args[0], program.layer(str(node.target))
    if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
        return None
    path, first = str(before.target), program.layer(str(before.target))
    if path in origins or path in tied or len(calls[path]) > 1 or getattr(first, "bias", None) is not None:
        return None
    is_pair = type(first) is type(last) and is_mixing(last) and not isinstance(last, DctLayer)
    return (path, before) if is_pair and groups_of(first) == 1 and _is_pointwise(last) else None


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a layer mixes channels and looks at nothing beside them."""
    if is_linear(module):
        return True
    layer: Any = module
    sizes = {*layer.kernel_size, *layer.stride, layer.groups}
    return sizes == {1} and not isinstance(layer.padding, str) and set(layer.padding) == {0}


def _unit(
    program: Program,
    original: Program,
    node: fx.Node,
    source: fx.Node,
    origin: Origin,
    factor: tuple[str, fx.Node] | None,
) -> Unit | str:
    """The unit, or why there is none."""
    due = node if factor is None else factor[1]
    out, norm = behind(program, node)
    seen, theirs = source, behind(original, source)
    if norm is not None and theirs[1] is None:
        return "a normalisation reads it, and none in the original"
    if norm is not None:
        seen = theirs[0]
    elif any(path not in program.called_modules() for path in norms_of(original, source)):
        return "its normalisation was folded, and cannot be in the original"
    other = None
    added = sum_with(program, out)
    their_sum = sum_with(original, seen)
    if added is not None and their_sum is not None and added[0].name == their_sum[0].name:
        own = are_alike(program, added, out)
        if added[1] < due and own and are_alike(original, their_sum, seen):
            out, other, seen = added[0], added[1], their_sum[0]
    a, b = program.shape(out), original.shape(seen)
    is_last = is_linear(program.layer(str(node.target)))
    dim = -1 if is_last else 1
    if a is None or b is None or len(a) != len(b):
        return OTHER_SIZE
    if [n for i, n in enumerate(a) if i != dim % len(a)] != [n for i, n in enumerate(b) if i != dim % len(b)]:
        return OTHER_SIZE
    low, high = bounds_of(program, out)
    return Unit(str(node.target), node, origin, norm, seen.name, other, low, high, is_last, factor)
