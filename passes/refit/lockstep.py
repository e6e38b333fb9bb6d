"""Fitting: the original once, then the small network node by node over all samples, each layer as it is due.

A layer is fitted on what the small network, fitted so far, feeds it. So all samples wait at the same node:
what is alive there is held in memory, and beyond a budget in files that are mapped into it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx

from graphcomp.base import Progress, distributed
from graphcomp.data import Split
from graphcomp.ir import Program, editable, evaluating, moved
from graphcomp.measure import Positions, layer_row, matrix_shape, output_weights
from graphcomp.passes.refit.chunks import Chunk, draw
from graphcomp.passes.refit.comparison import WEAK, Rows, scale_behind
from graphcomp.passes.refit.joint import Together
from graphcomp.passes.refit.layer import EXACT, RIDGES, Choice, fit_layer, obstacle
from graphcomp.passes.refit.line_run import LineRun, Sample
from graphcomp.passes.refit.lines import Line, find_lines
from graphcomp.passes.refit.needs import bytes_to_improve, most_needed
from graphcomp.passes.refit.rows import rows_of, watch
from graphcomp.passes.refit.shelf import Waiting
from graphcomp.passes.refit.units import Unit
from graphcomp.records import FittedLayer

WEIGHED = 64
"""Samples by which outputs are weighed against each other."""

Fitted = tuple[FittedLayer, dict[str, Tensor]]
"""What came of a layer, and the tensors that changed by name."""


@dataclass(frozen=True)
class Limits:
    """What a fit may look at.

    Attributes:
        positions: of every map of every sample.
        ridge: None: chosen by held-out samples.
        seed: of positions and order.
        memory: bytes of activations to hold before files are used.
        bias_only: fits no weights.
        together: whether layers in a line are improved together.
    """

    positions: int
    ridge: float | None
    seed: int
    memory: int
    bias_only: bool = False
    together: bool = True


@torch.no_grad()
def fit(
    program: Program,
    original: Program,
    units: Sequence[Unit],
    split: Split,
    limits: Limits,
    progress: Progress,
    known: Mapping[str, Fitted],
    done: Callable[[FittedLayer, Mapping[str, Tensor]], None],
) -> Program:
    """Fit all units in the order of the graph; collective.

    Args:
        program, original: the small network and what its layers are to compute; left as they are.
        units: see `find_units`.
        split: the samples to look at, all of them.
        limits: see there.
        progress: told of every layer.
        known: layers that were fitted before an interruption, to take instead.
        done: told of every layer that was fitted, with all tensors that changed, by name.
    """
    device = distributed.device()
    module = editable(program).to(device)
    nodes = list(module.graph.nodes)
    due = {unit.due: unit for unit in units}
    lines = find_lines(program, units, limits.memory) if limits.together and not limits.bias_only else {}
    starts = {line.nodes[0].name for line in lines.values()}
    records: dict[str, FittedLayer] = {}
    moves = _moved(original, [unit for unit in units if unit.layer in lines], split, limits)
    with evaluating(module):
        needed = most_needed(program, units, lines, len(split), limits.positions, limits.memory)
        shelf = Waiting(limits.memory - needed)
        chunks = []
        for x, first, number in draw(original, split, limits.seed):
            chunks.append(Chunk(module, moved(x, device), first, number))
            shelf.begin(chunks[-1])
        places = Positions(limits.positions, limits.seed)
        missing = [unit for unit in units if unit.layer not in known]
        if missing:
            watch(original, program, missing, chunks, places, shelf, progress)
        work = [1 + (row.macs if (row := layer_row(program, n)) else 0) for n in program.graph.nodes]
        for number, node in enumerate(nodes):
            unit = due.get(node.name)
            if unit is not None:
                share = sum(work[:number]) / sum(work)
                progress(f"fit {unit.layer}", 0.3 + 0.7 * share)
                line = lines.get(unit.layer)
                if unit.layer in known:
                    records[unit.layer], changed = known[unit.layer]
                    _put(module, changed)
                else:
                    choice = Choice(limits.ridge, limits.bias_only, limits.memory)
                    rows = rows_of(program, module, unit, chunks, places, shelf)
                    records[unit.layer], changed = fit_layer(module, unit, rows, choice)
                    if line is not None:
                        weights = _weights(module, unit, moves)
                        needed = bytes_to_improve(program, line)
                        changed |= _together(
                            module, line, weights, records, rows, chunks, choice, needed, limits.seed
                        )
                    done(records[unit.layer], changed)
                    for one in rows:
                        shelf.release(one.other)
                    for later in rows[len(chunks) :]:
                        shelf.release(later.x)
                if line is not None:
                    _go_again(module, line, node, changed, chunks, shelf)
                for chunk in chunks:
                    for call in unit.calls:
                        shelf.release(chunk.targets.pop(call.node.name, None))
            for chunk in chunks:
                if node.name in starts:
                    chunk.hold(node)
                chunk.step(node)
                shelf.settle(chunk, node)
    return replace(program, module=module.cpu())


def _put(module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in tensors.items():
        own[name].copy_(value)


def _moved(original: Program, ends: Sequence[Unit], split: Split, limits: Limits) -> dict[str, Tensor]:
    """How much each output of layers moves those of the network, squared (METHODS 9.2); by layer.

    Empty for a network that cannot be differentiated as it is written (it changes in place what a gradient
    needs): there all outputs weigh alike.
    """
    layers = [unit.origin.layer for unit in ends]
    try:
        some, seed, memory = split.spread(WEIGHED), limits.seed, limits.memory
        return output_weights(original, some, layers, seed=seed, memory=memory) if layers else {}
    except RuntimeError:
        return {}


def _weights(module: fx.GraphModule, unit: Unit, moves: Mapping[str, Tensor]) -> Tensor | None:
    """Of errors by channel at the end of a line, of mean square 1; None: all alike."""
    if unit.origin.layer not in moves:
        return None
    squares = moves[unit.origin.layer][torch.from_numpy(unit.origin.rows)].to(distributed.device())
    scale = scale_behind(module, unit, len(squares), squares).square()
    of_errors = squares / scale.clamp(min=float(scale.max()) * WEAK**2)
    return (of_errors / of_errors.mean().clamp(min=1e-300)).sqrt()


def _together(
    module: fx.GraphModule,
    line: Line,
    weights: Tensor | None,
    records: dict[str, FittedLayer],
    rows: Sequence[Rows],
    chunks: Sequence[Chunk],
    choice: Choice,
    needed: int,
    seed: int,
) -> dict[str, Tensor]:
    """Improve those layers of a line that can be fitted: all their tensors by name, if that helped.

    Args:
        needed: bytes that this takes.
    """
    last = records[line.unit.layer]
    if needed > choice.memory:
        why = f"improving it with those before it takes {needed / 2**30:.2g} GiB, more than --memory"
        records[last.layer] = last.model_copy(update={"note": last.note or why})
        return {}
    ridges = {}
    for name in line.layers:
        row, shape = records[line.fitted_with(name)], matrix_shape(module.get_submodule(name))
        if obstacle(shape, row.rows, True, needed, choice) is None:
            # where no ridge was good enough for held-out samples the largest is taken
            ridges[name] = row.ridge or (0.0 if row.note is None else RIDGES[-1])
    read = [chunk.held_back(line.nodes[0]) for chunk in chunks]
    samples = [
        Sample(x, row.at, row.target, row.other, row.is_held_out, chunk.is_scout, chunk.first, chunk.count)
        for x, row, chunk in zip(read, rows, chunks, strict=True)
        if x is not None
    ]
    if last.after < EXACT or line.unit.layer not in ridges or len(ridges) < 2 or len(samples) < len(chunks):
        return {}
    joint = Together(module, line, weights, ridges, seed)
    left = joint.improve([piece for sample in samples for piece in sample.pieces(line.at_once)])
    records[last.layer] = last.model_copy(update={"together": list(ridges)[:-1], "left": left})
    return joint.tensors() if left < 1 else {}


def _go_again(
    module: fx.GraphModule,
    line: Line,
    due: fx.Node,
    changed: Mapping[str, Tensor],
    chunks: Sequence[Chunk],
    shelf: Waiting,
) -> None:
    """What waits in front of the last layer of a line, by the weights that those before it have now."""
    before = {*line.layers} - {line.unit.layer, line.unit.source}
    is_changed = any(f"{name}.weight" in changed for name in before)
    run = LineRun(module, line)
    for chunk in chunks:
        x = chunk.held_back(line.nodes[0])
        if is_changed and x is not None:
            waiting = cast(fx.Node, due.args[0])
            chunk.env[waiting] = run.over(x, due.name)
            shelf.settle(chunk, waiting)
        del chunk.held[line.nodes[0].name]
