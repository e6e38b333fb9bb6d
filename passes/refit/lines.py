"""Layers in a line: each is read by nothing but the next, so what they yield is nobody else's business."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from graphcomp.ir import DctLayer, Program
from graphcomp.measure import is_mixing, matrix_shape
from graphcomp.passes.refit.around import calls_of, tied_layers
from graphcomp.passes.refit.units import Unit

REACH = 1
"""Layers in front of a fitted one (and of its factor), depthwise ones aside, that are improved with it."""


ELEMENTS = 1 << 26
"""Of all activations of a line together that are held for gradients, at most: 256 MiB."""

TIMES = 3
"""So often they are held with their gradients; a quarter of the memory is for that."""

PLAIN = "call_module", "call_function", "call_method"


@dataclass(frozen=True, eq=False)
class Line:
    """A fitted layer, and what alone leads to it.

    Attributes:
        unit: the last layer.
        layers: paths of all that may be improved, in order; that of the unit is the last.
        nodes: from the call of the first one up to what is compared, the normalisation behind it included.
        entry: what the first one reads.
        factors: factor in front -> its layer.
        at_once: samples whose activations are held together for gradients.
        bytes_at_once: that these take.
    """

    unit: Unit
    layers: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    entry: fx.Node
    factors: Mapping[str, str]
    at_once: int
    bytes_at_once: int

    def fitted_with(self, layer: str) -> str:
        """The layer with which one was fitted: a factor in front with its own."""
        return self.factors.get(layer, layer)


def find_lines(program: Program, units: Sequence[Unit], memory: int) -> dict[str, Line]:
    """By layer, the lines that end there: of at least two fitted layers, and no part of a longer line."""
    elements = min(ELEMENTS, memory // 4 // (4 * TIMES))
    calls, tied = calls_of(program), tied_layers(program)
    factors = {u.source: u.layer for u in units if u.factor is not None}
    may = {n for u in units if not u.later for n in (u.layer, u.source)}
    may -= tied | {n for n in may if len(calls[n]) > 1 or isinstance(program.layer(n), DctLayer)}
    found = {}
    for unit in units:
        if unit.layer in may and (line := _line(program, unit, may, factors, elements)) is not None:
            found[unit.layer] = line
    inner = {line.layers[:n] for line in found.values() for n in range(1, len(line.layers))}
    return {layer: line for layer, line in found.items() if line.layers not in inner}


def _line(
    program: Program, unit: Unit, may: set[str], factors: Mapping[str, str], elements: int
) -> Line | None:
    nodes = [unit.node]
    if unit.norm is not None:
        nodes += [user for user in unit.node.users if user.target == unit.norm]
    layers, first, dense = [unit.layer], 0, 0
    while (node := _only_input(program, nodes[0])) is not None:
        nodes.insert(0, node)
        first += 1
        if node.op != "call_module" or not is_mixing(program.layer(str(node.target))):
            continue
        groups, outputs, _ = matrix_shape(program.layer(str(node.target)))
        dense += (groups == 1 or outputs > 1) and node.target != unit.source
        if str(node.target) not in may or dense > REACH:
            break
        layers.insert(0, str(node.target))
        first = 0
    nodes, entry = nodes[first:], nodes[first].args[0]
    if not {*layers} - {unit.layer, unit.source} or not isinstance(entry, fx.Node):
        return None
    held = sum(math.prod(program.shape(node) or ()) for node in nodes) // len(program.example_inputs[0])
    at_once = max(1, elements // max(1, held))
    return Line(unit, tuple(layers), tuple(nodes), entry, factors, at_once, 4 * TIMES * held * at_once)


def _only_input(program: Program, node: fx.Node) -> fx.Node | None:
    """What alone a node reads, if nothing else reads that."""
    read = node.all_input_nodes
    if len(read) != 1 or len(read[0].users) != 1 or read[0].op not in PLAIN:
        return None
    return read[0] if program.shape(read[0]) is not None else None
