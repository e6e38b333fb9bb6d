"""What the responses of a group's channels are: their covariance over the views, its spectrum, or why not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any

import numpy as np

from graphcomp.channels import ChannelGroup, Ints
from graphcomp.measure import Covariance, Request
from graphcomp.passes.pfa.principal import Bools, Matrix, Vector, dead_channels, spectrum
from graphcomp.passes.pfa.views import View

NOISE = 2.0**-20
"""Responses that vary by less than this part of their size are constant: float32 inference rounds them so."""


@plain_dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a group's responses.

    Attributes:
        covariance: (n, n), in the order of the group's channels.
        eigenvalues, dead: see `passes.pfa.principal`.
        samples: that it was estimated from.
        nodes: that were looked at.
    """

    covariance: Matrix
    eigenvalues: Vector
    dead: Bools
    samples: int
    nodes: list[str]

    @property
    def evidence(self) -> dict[str, Any]:
        """The fields of `Spectrum` that are known before the counts."""
        return {
            "eigenvalues": [float(f"{x:.6g}") for x in self.eigenvalues],
            "samples": self.samples,
            "dead": int(self.dead.sum()),
            "statistics": self.nodes,
        }


def analysed(
    group: ChannelGroup, views: Sequence[View], statistics: Mapping[Request, Covariance]
) -> Analysis | str:
    """The analysis, or why there is none."""
    requests = [request for view in views for request in view.requests]
    if not requests:
        return "no call of a layer shows the responses of its channels"
    samples, width = min(statistics[r].samples for r in requests), len(group.channels)
    if samples < width:
        return (
            f"{samples} samples say too little about {width} channels, expected at least as many; give more "
            "data, or raise samples"
        )
    covariance = group_covariance(group.channels, views, statistics)
    nodes = [request.node for request in requests]
    return Analysis(covariance, spectrum(covariance), dead_channels(covariance), samples, nodes)


def group_covariance(
    members: Ints, views: Sequence[View], statistics: Mapping[Request, Covariance]
) -> Matrix:
    """Covariance of the responses of some channels, (n, n): the sum over all views of C / tr C (METHODS 5.7).

    Calls of one layer are summed first. Where a channel has several positions in a view (the pieces of a
    maxout, the sub-pixels of a shuffle), the first positions are one view, the second ones another, …
    """
    total = np.zeros((len(members), len(members)))
    for view in views:
        matrix = np.sum([_without_noise(statistics[request]) for request in view.requests], axis=0)
        for at, rows in _positions(members, view.channels):
            part = matrix[np.ix_(rows, rows)]
            if part.trace() > 0:
                total[np.ix_(at, at)] += part / part.trace()
    return total


def _without_noise(found: Covariance) -> Matrix:
    """The covariance; 0 if all there is of it is what inference rounds differently from batch to batch."""
    matrix, mean = found.matrix.numpy(), found.mean.numpy()
    return np.zeros_like(matrix) if matrix.trace() <= NOISE**2 * float(mean @ mean) else matrix


def _positions(members: Ints, channels: Ints) -> Iterator[tuple[Ints, Ints]]:
    """(which members, where they are in `channels`) for everyone's first position, then the second, …"""
    order = np.argsort(channels, kind="stable")
    start, end = (np.searchsorted(channels[order], members, side) for side in ("left", "right"))
    for turn in range(int((end - start).max())):
        at = np.flatnonzero(end - start > turn)
        yield at, order[start[at] + turn]
