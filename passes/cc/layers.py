"""Which layers are looked at only if they are asked for: the ends of a network, and those that take hours."""

from collections.abc import Iterable
from itertools import chain

from graphcomp.ir import Program
from graphcomp.measure import layer_row
from graphcomp.passes.cc.gcro import curve_cost
from graphcomp.passes.cc.units import WeightShape

LARGEST = 1e13
"""Multiplications, some minutes, that the curve of a layer may take unless it is asked for by `include`."""


def network_ends(program: Program) -> dict[str, str]:
    """The layers without a layer in front of them or behind them, and why they stay (METHODS 1.5)."""
    import networkx as nx  # takes a third of a second

    nodes = list(program.graph.nodes)
    names = {node: row.name for node in nodes if (row := layer_row(program, node)) is not None}
    flow = nx.DiGraph((source, node) for node in nodes for source in node.all_input_nodes)
    behind, ahead = (
        set(chain.from_iterable(nx.bfs_layers(way, {n for layer in names for n in way[layer]})))
        for way in (flow, flow.reverse(copy=False))
    )
    ends = {name: "the first layer, which reads the input" for n, name in names.items() if n not in behind}
    ends |= {name: "the last layer, which makes the output" for n, name in names.items() if n not in ahead}
    return ends


def too_large(program: Program, names: Iterable[str]) -> dict[str, str]:
    """The layers whose analysis would take hours, as those of an ImageNet VGG's head, and why they stay."""
    shapes = {name: WeightShape.of(program.tensors[f"{name}.weight"]) for name in names}
    return {
        name: f"{shape.channels:,} channels and {shape.directions:,} directions would take hours to analyse; "
        "use low-rank for it, or include it by name"
        for name, shape in shapes.items()
        if curve_cost(shape) > LARGEST
    }
