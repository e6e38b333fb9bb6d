"""What layers read and what they are to yield, chunk by chunk, at sampled positions."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, fx

from graphcomp.base import Progress, distributed
from graphcomp.ir import Program, editable
from graphcomp.measure import Positions, calibrate, outputs_at
from graphcomp.passes.refit.chunks import Chunk
from graphcomp.passes.refit.comparison import Rows
from graphcomp.passes.refit.shelf import Waiting
from graphcomp.passes.refit.units import Unit


def watch(
    original: Program,
    program: Program,
    units: Sequence[Unit],
    chunks: Sequence[Chunk],
    drawn: Positions,
    shelf: Waiting,
    progress: Progress,
) -> None:
    """Run the original over all samples, and give every chunk its targets at the sampled positions."""
    device = distributed.device()
    if device.type != "cpu":
        original = replace(original, module=editable(original).to(device))
    number = 0

    def keep(wanted: Sequence[Unit], output: Tensor) -> None:
        chunk = chunks[number]
        for unit in wanted:
            module = program.layer(unit.layer)
            at = places_of(program, unit, chunk, drawn)
            rows = torch.from_numpy(unit.origin.rows).to(device)
            chunk.targets[unit.node.name] = shelf.keep(outputs_at(module, output, at)[:, rows])

    def next_chunk(seen: int) -> None:
        nonlocal number
        number += 1
        progress(f"original: {number} of {len(chunks)} batches", 0.3 * number / len(chunks))

    by_node: dict[str, list[Unit]] = {}
    for call in (call for unit in units for call in unit.calls):
        by_node.setdefault(call.seen, []).append(call)
    watchers = {node: partial(keep, wanted) for node, wanted in by_node.items()}
    inputs = (tuple(x.clone() for x in chunk.inputs) for chunk in chunks)  # a network may change its own
    calibrate.watch(original, inputs, watchers, next_chunk)


def places_of(program: Program, unit: Unit, chunk: Chunk, drawn: Positions) -> Tensor:
    """Which positions of a unit's output are looked at, `[n, P]`; n are maps: a sample may be several."""
    plane, maps = _maps_of(program, unit)
    return drawn.of(plane, chunk.first * maps, chunk.count * maps).to(distributed.device())


def rows_in(program: Program, unit: Unit, samples: int, positions: int) -> int:
    """How many rows a unit's call has of so many samples."""
    plane, maps = _maps_of(program, unit)
    return samples * maps * min(plane, positions)


def _maps_of(program: Program, unit: Unit) -> tuple[int, int]:
    """Positions of a map of a unit's output, and maps a sample."""
    shape, samples = program.shape(unit.node) or (), len(program.example_inputs[0])
    if unit.is_last:
        return math.prod(shape[:-1]) // samples, 1
    return math.prod(shape[2:]), shape[0] // samples


def rows_of(
    program: Program,
    module: fx.GraphModule,
    unit: Unit,
    chunks: Sequence[Chunk],
    drawn: Positions,
    shelf: Waiting,
) -> list[Rows]:
    """What a layer reads and what it is to yield, chunk by chunk, when asked; call by call.

    What later calls read is what the network yields there with the weights that it has now.
    """
    layer, reader = module.get_submodule(unit.layer), module.get_submodule(unit.source)
    nodes = {node.name: node for node in module.graph.nodes}
    behind = list(nodes.values())[list(nodes).index(unit.due) :]
    found: list[list[Rows]] = [[] for _ in unit.calls]
    for chunk in chunks:
        wanted = {nodes[c.node.name]: [nodes[n.name] for n in _values(c)] for c in unit.later}
        seen = chunk.ahead(behind, wanted) if wanted else {}
        for rows, call in zip(found, unit.calls, strict=True):
            at = places_of(program, call, chunk, drawn)
            read, *added = (seen.get(nodes[call.node.name], chunk.env)[nodes[n.name]] for n in _values(call))
            base = shelf.keep(outputs_at(layer, added[0], at)) if added else None
            x = read if call is unit else shelf.keep(read)
            rows.append(Rows(reader, call, x, at, chunk.targets[call.node.name], base, chunk.is_held_out))
    return [row for rows in found for row in rows]


def _values(call: Unit) -> list[fx.Node]:
    """What a call reads, and what is added to what it yields."""
    first = call.node if call.factor is None else call.factor[1]
    return [cast(fx.Node, first.args[0]), *([] if call.other is None else [call.other])]
