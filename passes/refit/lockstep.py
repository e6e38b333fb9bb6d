"""Fitting: the original once, then the small network node by node over all samples, each layer as it is due.

A layer is fitted on what the small network, fitted so far, feeds it. So all samples wait at the same node:
what is alive there is held in memory, and beyond a budget in files that are mapped into it.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx

from graphcomp.base import Progress, distributed
from graphcomp.data import Split
from graphcomp.ir import Program, editable, evaluating
from graphcomp.measure import Positions, calibrate, layer_row, outputs_at
from graphcomp.passes.refit.chunks import Chunk, draw
from graphcomp.passes.refit.comparison import Rows
from graphcomp.passes.refit.layer import Choice, fit_layer
from graphcomp.passes.refit.shelf import Shelf
from graphcomp.passes.refit.units import Unit
from graphcomp.records import FittedLayer


@dataclass(frozen=True)
class Limits:
    """What a fit may look at.

    Attributes:
        positions: of every map of every sample.
        ridge: None: chosen by held-out samples.
        seed: of positions and order.
        memory: bytes of activations to hold before files are used.
        bias_only: fits no weights.
    """

    positions: int
    ridge: float | None
    seed: int
    memory: int
    bias_only: bool = False


@torch.no_grad()
def fit(
    program: Program,
    original: Program,
    units: Sequence[Unit],
    split: Split,
    limits: Limits,
    progress: Progress,
    known: Mapping[str, Mapping[str, Tensor]],
    done: Callable[[FittedLayer, Mapping[str, Tensor]], None],
) -> Program:
    """Fit all units in the order of the graph; collective.

    Args:
        program, original: the small network and what its layers are to compute; left as they are.
        units: see `find_units`.
        split: the samples to look at, all of them.
        limits: see there.
        progress: told of every layer.
        known: tensors by layer that were fitted before an interruption, to take instead.
        done: told of every layer that was fitted, with all tensors that changed, by name.
    """
    device = distributed.device()
    module = editable(program).to(device)
    nodes = list(module.graph.nodes)
    due = {unit.due: unit for unit in units}
    with tempfile.TemporaryDirectory(prefix="graphcomp-refit-") as folder, evaluating(module):
        shelf = Shelf(Path(folder), limits.memory)
        drawn = draw(original, split, limits.seed)
        chunks = [Chunk(module, x.to(device), first, held) for x, first, held in drawn]
        places = Positions(limits.positions, limits.seed)
        missing = [unit for unit in units if unit.layer not in known]
        if missing:
            _watch(original, program, missing, chunks, places, shelf, progress)
        work = [1 + (row.macs if (row := layer_row(program, n)) else 0) for n in program.graph.nodes]
        for number, node in enumerate(nodes):
            unit = due.get(node.name)
            if unit is not None:
                share = sum(work[:number]) / sum(work)
                progress(f"fit {unit.layer}", 0.3 + 0.7 * share)
                if unit.layer in known:
                    _put(module, known[unit.layer])
                else:
                    choice = Choice(limits.ridge, limits.bias_only, limits.memory)
                    rows = _rows(program, module, unit, chunks, places, shelf)
                    record, changed = fit_layer(module, unit, rows, choice)
                    done(record, changed)
                    for later in rows[len(chunks) :]:
                        shelf.release(later.x)
                for chunk in chunks:
                    for call in unit.calls:
                        shelf.release(chunk.targets.pop(call.node.name, None))
            for chunk in chunks:
                chunk.step(node)
                shelf.settle(chunk, node)
    return replace(program, module=module.cpu())


def _put(module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in tensors.items():
        own[name].copy_(value)


# ---------------------------------------------------------------------- what the original computes


def _watch(
    original: Program,
    program: Program,
    units: Sequence[Unit],
    chunks: Sequence[Chunk],
    drawn: Positions,
    shelf: Shelf,
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
            at = _places(program, unit, chunk, drawn)
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
    calibrate.watch(original, (chunk.x.clone() for chunk in chunks), watchers, next_chunk)


def _places(program: Program, unit: Unit, chunk: Chunk, drawn: Positions) -> Tensor:
    """Which positions of a unit's output are looked at, `[n, P]`; n are maps: a sample may be several."""
    shape, samples = program.shape(unit.node) or (), len(program.example_inputs[0])
    if unit.is_last:
        plane, maps = math.prod(shape[:-1]) // samples, 1
    else:
        plane, maps = math.prod(shape[2:]), shape[0] // samples
    return drawn.of(plane, chunk.first * maps, chunk.count * maps).to(chunk.x.device)


def _rows(
    program: Program,
    module: fx.GraphModule,
    unit: Unit,
    chunks: Sequence[Chunk],
    drawn: Positions,
    shelf: Shelf,
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
            at = _places(program, call, chunk, drawn)
            read, *added = (seen.get(nodes[call.node.name], chunk.env)[nodes[n.name]] for n in _values(call))
            base = outputs_at(layer, added[0], at) if added else None
            x = read if call is unit else shelf.keep(read)
            rows.append(Rows(reader, call, x, at, chunk.targets[call.node.name], base, chunk.is_held_out))
    return [row for rows in found for row in rows]


def _values(call: Unit) -> list[fx.Node]:
    """What a call reads, and what is added to what it yields."""
    first = call.node if call.factor is None else call.factor[1]
    return [cast(fx.Node, first.args[0]), *([] if call.other is None else [call.other])]
