"""What layers read and what their outputs weigh, of which samples, and why there is nothing of some."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor

from graphcomp.base import part
from graphcomp.data import Split
from graphcomp.ir import Program
from graphcomp.measure import Gram, bytes_to_sum, grams, matrix_shape, output_weights, plane_of
from graphcomp.pipeline import Context, require_data

SAMPLES, POSITIONS = 1000, 64
"""Whose patches are looked at, and at how many places of every map."""

ENOUGH = 4
"""Rows a column below which second moments say too little (T9.1)."""

WEIGHED, MEASURED = 64, 64
"""Samples that output weights are averaged over, and that sensitivities are measured on."""

MATRICES = 2
"""So many matrices of columns x columns are held at once while one is inverted, or made smaller."""

TOO_FEW = "has more columns than samples can tell apart"


@dataclass(frozen=True, eq=False)
class Reading:
    """What layers read, and what their outputs weigh.

    Attributes:
        some: samples, few, that the statistics were taken of.
        held_out: samples that nothing here was taken of.
        grams, weights: see `measure.grams` and `measure.output_weights`.
        unread: why there are none of the other layers, as what is said of one: `TOO_FEW`, or that it has more
            columns than memory has room for.
    """

    some: Split
    held_out: Split
    grams: dict[str, Gram]
    weights: dict[str, Tensor]
    unread: dict[str, str]


def reading(
    program: Program,
    context: Context,
    name: str,
    layers: Sequence[str],
    samples: int = SAMPLES,
    positions: int = POSITIONS,
) -> Reading:
    """Statistics of layers, over so many samples of a pass's calibration data; collective.

    Raises:
        DataError: if there are none.
    """
    fit, held_out = _parts(require_data(name, context).train, samples, context.seed)
    found = {n: _why_unread(program, n, len(fit), positions, context.memory) for n in layers}
    unread = {name: why for name, why in found.items() if why is not None}
    enough = [name for name in found if name not in unread]
    seed, tell = context.seed, part(context.progress, 0, 0.6)
    read = grams(program, fit, enough, positions=positions, seed=seed, memory=context.memory, progress=tell)
    tell = part(context.progress, 0.6, 0.1)
    some = fit.subset(np.arange(min(WEIGHED, len(fit))))
    weights = output_weights(program, some, enough, seed=seed, memory=context.memory, progress=tell)
    return Reading(some, held_out, read, weights, unread)


def _why_unread(program: Program, layer: str, samples: int, positions: int, memory: int) -> str | None:
    groups, outputs, columns = matrix_shape(program.layer(layer))
    if _rows(program, layer, samples, positions) < ENOUGH * columns:
        return TOO_FEW
    needed = max(bytes_to_sum(groups, columns), 2 * bytes_to_follow([(columns, outputs)], columns))
    if needed > memory:
        return f"has more columns than memory has room for: give --memory of {needed / 2**30:.2g} GiB"
    return None


def _rows(program: Program, layer: str, samples: int, positions: int) -> int:
    """Rows that so many samples give of what a layer reads."""
    node = next(n for n in program.graph.nodes if n.op == "call_module" and n.target == layer)
    shape = program.shape(node) or ()
    plane = plane_of(shape, cast(Tensor, program.layer(layer).weight).ndim)
    return samples * min(math.prod(plane), positions)


def _parts(split: Split, samples: int, seed: int) -> tuple[Split, Split]:
    """Samples for statistics and others for measurements, evenly spaced and in random order."""
    some = split.spread(samples + MEASURED)
    order = np.random.default_rng(seed).permutation(len(some))
    held = min(MEASURED, max(1, len(some) // 4))
    return some.subset(order[held:] if len(some) > held else order), some.subset(order[:held])


def bytes_to_follow(sizes: Iterable[tuple[int, int]], columns: int) -> int:
    """What a group takes whose readers have so many columns of it, and outputs; the largest is inverted."""
    return 8 * (sum(n * (n + o) for n, o in sizes) + MATRICES * columns**2)
