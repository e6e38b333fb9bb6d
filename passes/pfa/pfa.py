"""pfa: principal filter analysis (Suau, Zappella, Apostoloff 2020; METHODS 5).

    a(x)     a layer's response to a sample: its own output, before normalisation and activation, the largest
             value of every channel                                                                      (5.1)
    C        covariance of a(x) over the data; its normalised eigenvalues are the layer's spectrum
    count    energy=tau: the fewest directions that hold a share tau of the energy; mode=kl: by how far the
             spectrum is from a flat one; target: the largest tau, for all layers, that is small enough
    choice   the channel that is most correlated with those that are left goes, again and again          (5.5)

Channels that several layers share (a residual stream) have one spectrum: that of sum_i C_i / tr C_i, over the
layers that produce them (`join=couple`) or over the additions in which they meet (`join=project`). Where a
layer is called several times, the covariances of its calls are summed. The mathematics is in
`passes.pfa.principal`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn

from graphcomp.bases import OPTIONS, ChannelRemoval, JoinOption, norm_scores, only_one
from graphcomp.budget import Judgement, Scores
from graphcomp.channels import ChannelGroup, Channels, Ints, compact, varying
from graphcomp.errors import PassError
from graphcomp.ir import Program, op_name
from graphcomp.measure import Covariance, Request, layer_row, layer_weight
from graphcomp.passes.pfa.principal import (
    Bools,
    ChannelNorm,
    Map,
    Matrix,
    Vector,
    count_kl,
    dead_channels,
    energies,
    pearson,
    removal_order,
    spectrum,
)
from graphcomp.pipeline import Context, Outlook, require_data
from graphcomp.records import Spectrum, Width

NOISE = 2.0**-20
"""Responses that vary by less than this part of their size are constant: float32 inference rounds them so."""

Response = Literal["conv", "bn"]


@dataclass(frozen=True, config=OPTIONS)
class PFA(ChannelRemoval):
    """Remove the channels whose responses are correlated with others', as many as the spectrum allows."""

    name: ClassVar[str] = "pfa"
    record: ClassVar[type[Width]] = Spectrum

    energy: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None,
        Field(description="share of the spectral energy that every group preserves"),
    ] = None
    mode: Annotated[
        Literal["energy", "kl"],
        Field(description="kl: counts from the divergence of the spectrum from a flat one, without a number"),
    ] = "energy"
    map: Annotated[Map, Field(description="with mode=kl: from divergences to counts")] = "linear"
    selection: Annotated[
        Literal["correlation", "random", "l1"], Field(description="which channels go; the counts stay")
    ] = "correlation"
    norm: Annotated[ChannelNorm, Field(description="of a channel's correlations with the others")] = "l1"
    response: Annotated[Response, Field(description="bn: what the normalisation behind the layer yields")] = (
        "conv"
    )
    samples: Annotated[
        Annotated[int, Field(ge=2)] | None,
        Field(description="calibration samples, the first of the data; default all"),
    ] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = {
            "energy": self.energy is not None,
            "target": self.target is not None,
            "mode=kl": self.mode == "kl",
        }
        only_one(given, "energy=0.95")
        if self.map != "linear" and self.mode != "kl":
            raise ValueError(f"found map={self.map} without mode=kl, expected both or neither")
        if self.norm != "l1" and self.selection != "correlation":
            raise ValueError(
                f"found norm={self.norm} with selection={self.selection}, expected it with correlation only"
            )
        return self

    def require(self, outlook: Outlook) -> None:
        """Also data; and for response=bn a normalisation to look behind."""
        super().require(outlook)
        require_data("calibration", outlook.context)
        program = outlook.program
        if self.response == "bn" and not any(_normalisation(program, n) for n in program.graph.nodes):
            raise PassError(
                "response=bn: found no batch normalisation behind a layer, expected at least one; fold-bn "
                "removes them: run it later, or use response=conv"
            )

    @property
    def share(self) -> float | None:
        """Of the spectral energy."""
        return self.energy

    def judge(self, channels: Channels, groups: Sequence[ChannelGroup], context: Context) -> Judgement:
        """Spectra and removal orders, from one pass over the data."""
        calls = _calls(channels.program)
        views = {g: _views(channels, g, calls, self.join, self.response) for g in groups}
        requests = [request for seen in views.values() for view in seen for request in view.requests]
        statistics = context.collect(channels.program, requests, self.samples) if requests else {}
        found = {
            g: _analyse(g, seen, cast(dict[Request, Covariance], statistics)) for g, seen in views.items()
        }
        judged = {g: a for g, a in found.items() if isinstance(a, Analysis)}
        return Judgement(
            scores=self._scores(channels, judged, context),
            preserved={g: energies(a.eigenvalues, int(a.dead.sum())) for g, a in judged.items()},
            counts={g: count_kl(a.eigenvalues, int(a.dead.sum()), self.map) for g, a in judged.items()},
            unjudged={g: a for g, a in found.items() if isinstance(a, str)},
            evidence={g: a.evidence for g, a in judged.items()},
        )

    def _scores(
        self, channels: Channels, judged: Mapping[ChannelGroup, "Analysis"], context: Context
    ) -> Scores:
        if self.selection == "l1":
            return norm_scores(channels)
        size = len(channels.channel_of)
        if self.selection == "random":
            return np.random.default_rng(context.seed).random(size)
        scores = np.zeros(size)
        for group, analysis in judged.items():
            rho = pearson(analysis.covariance)
            for block in range(int(group.blocks.max()) + 1):
                at = np.flatnonzero(group.blocks == block)
                order = at[removal_order(rho[np.ix_(at, at)], analysis.dead[at], self.norm)]
                scores[group.channels[order]] = np.arange(1, len(at) + 1) / len(at)
        return scores


# ---------------------------------------------------------------------- what a group's responses are


@plain_dataclass(frozen=True, eq=False)
class View:
    """Where responses of a group's channels are seen: a layer, or an addition.

    Attributes:
        requests: one for every call of the layer.
        channels: the channel at every position of the responses.
    """

    requests: tuple[Request, ...]
    channels: Ints


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


def _analyse(
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


# ---------------------------------------------------------------------- where they are seen


Calls = Mapping[int, Sequence[fx.Node]]
"""id of a weight -> the nodes that it is the weight of."""


def _calls(program: Program) -> Calls:
    calls: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if layer_row(program, node) is not None:
            calls.setdefault(id(layer_weight(program, node)), []).append(node)
    return calls


def _views(
    channels: Channels, group: ChannelGroup, calls: Calls, join: JoinOption, response: Response
) -> list[View]:
    """The additions (project) or the layers in which a group's responses are seen."""
    additions = list(_additions(channels, group)) if join == "project" else []
    return additions or list(_layers(channels, group, calls, response))


def _layers(channels: Channels, group: ChannelGroup, calls: Calls, response: Response) -> Iterator[View]:
    program = channels.program
    for axis in channels.axes:
        if axis.role == "out" and group.channels[0] in axis.channels:
            weight = program.tensors[axis.tensors[0][0]]
            spatial = max(weight.ndim - 2, 0)
            nodes = [
                _normalisation(program, node) or node if response == "bn" else node
                for node in calls.get(id(weight), ())
            ]
            dims = [len(program.shape(node) or ()) - spatial - 1 for node in nodes]
            requests = [Request(n.name, "covariance", dim) for n, dim in zip(nodes, dims, strict=True)]
            if requests:
                yield View(tuple(requests), axis.channels)


def _normalisation(program: Program, node: fx.Node) -> fx.Node | None:
    """The batch normalisation that a layer feeds, and nothing else."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or user.op != "call_module":
        return None
    return user if isinstance(program.layer(str(user.target)), nn.modules.batchnorm._BatchNorm) else None


def _additions(channels: Channels, group: ChannelGroup) -> Iterator[View]:
    """The additions of activations that all of the group's channels take part in."""
    for node in channels.program.graph.nodes:
        if op_name(channels.program, node) != "add":
            continue
        operands = [
            a for a in node.all_input_nodes if isinstance(channels.values[a], Tensor) and a.op != "get_attr"
        ]
        if len(operands) < 2 or len(axes := varying(channels.values[node])) != 1:
            continue
        positions = channels.channel_of[compact(channels.values[node]).flatten().numpy()]
        if np.isin(group.channels, positions).all():
            yield View((Request(node.name, "covariance", axes[0]),), positions)
