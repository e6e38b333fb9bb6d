"""How many samples a network takes at a time, and its outputs sample by sample, wherever it has that axis."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphcomp.ir import Program, output_tensors


def elements(program: Program) -> Sequence[int]:
    """Of every value that the network computes, for one sample."""
    shapes = (program.shape(node) for node in program.graph.nodes if node.op != "get_attr")
    return [math.prod(shape) for shape in shapes if shape is not None]


def at_once(program: Program, count: int, fewest: int, most: int) -> int:
    """So many samples, within bounds; one where the network takes one at a time."""
    return 1 if program.interface.one_at_a_time else min(max(count, fewest), most)


def by_sample(program: Program, output: Any, samples: int) -> Tensor:
    """All numbers of an output as a matrix: a row a sample, or one for all where they lie behind each other.

    Args:
        program: whose example's outputs, of one sample, say which axis grows.
        output: what it yields for that many samples.
    """
    found = output_tensors(output)
    ones = output_tensors(program.output)
    axes = [_axis(t, one, samples) for t, one in zip(found, ones, strict=True)]
    if None in axes:
        return torch.cat([t.reshape(1, -1) for t in found], 1)
    rows = (t.movedim(d or 0, 0) for t, d in zip(found, axes, strict=True))
    return torch.cat([t.reshape(len(t), -1) for t in rows], 1)


def _axis(found: Tensor, one: Tensor, samples: int) -> int | None:
    """Where an output has a place for each sample; None if an axis holds more than that."""
    if samples == 1:
        return None
    grown = [d for d, (n, m) in enumerate(zip(found.shape, one.shape, strict=True)) if n != m]
    return grown[0] if len(grown) == 1 and one.shape[grown[0]] == 1 else None
