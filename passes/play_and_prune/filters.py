"""The filters that the game is played for: which they are, which are candidates, and the l1 term on them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass

import numpy as np
import torch
from torch import Tensor

from graphcomp.bases import filter_norms, filters, matches
from graphcomp.budget import Scores
from graphcomp.channels import Axis, Channels, Ints
from graphcomp.train import Loss, Seen


@plain_dataclass(frozen=True, eq=False)
class FilterLayer:
    """The filters of a layer that can go one by one: no other layer shares their channels.

    Attributes:
        axis: the layer's output.
        rows: which of its filters.
        channels: theirs, aligned with `rows`.
        norms: |f|, aligned with `rows`.
    """

    axis: Axis
    rows: Ints
    channels: Ints
    norms: Scores

    def rows_of(self, positions: Ints) -> list[int]:
        """Rows of the filters at `positions`, ascending."""
        return [int(row) for row in sorted(self.rows[positions])]


def find_layers(
    channels: Channels, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, FilterLayer]:
    """The layers that the game is played on, by name: globs on module paths."""
    alone: dict[str, list[Ints]] = {}
    for group in channels.removable:
        for layer, rows in group.producers.items():
            is_alone = len(group.producers) == 1 and len(rows) == len(group.channels)
            if is_alone and matches((layer,), include) and not matches((layer,), exclude):
                alone.setdefault(layer, []).append(rows)
    found = {}
    for axis in channels.axes:
        name = axis.layer
        if axis.role == "out" and name in alone:
            rows = np.sort(np.concatenate(alone[name]))
            norms = filter_norms(channels.program.tensors[axis.weight], axis)
            found[name] = FilterLayer(axis, rows, axis.channels[rows], norms[rows])
    return found


def candidates(norms: Scores, alpha: float) -> Ints:
    """Positions of U: the floor(alpha n) smallest of n norms (3.2)."""
    return np.argsort(norms, kind="stable")[: math.floor(alpha * len(norms) + 1e-9)]


def emptied(norms: Scores, chosen: Ints, threshold: float) -> Ints:
    """Positions of the candidates that go: |f| <= threshold (3.4)."""
    return chosen[norms[chosen] <= threshold]


def penalised(loss: Loss, weight: float, chosen: Mapping[str, tuple[Axis, Sequence[int]]]) -> Loss:
    """A loss with the l1 term on the chosen filters, and on no others (3.3).

    Args:
        loss: of the task.
        weight: lambda_A.
        chosen: layer -> its output axis and rows of filters.
    """

    def with_term(seen: Seen) -> Tensor:
        norms = [
            filters(seen.tensors[axis.weight], axis)[list(rows)].abs().sum() for axis, rows in chosen.values()
        ]
        return loss(seen) + weight * torch.stack(norms).sum() if norms else loss(seen)

    return with_term
