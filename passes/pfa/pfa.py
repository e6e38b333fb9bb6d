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

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self, cast

import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, ChannelRemoval, norm_scores, only_one
from graphcomp.budget import Judgement, Scores
from graphcomp.channels import ChannelGroup, Channels
from graphcomp.errors import PassError
from graphcomp.measure import Covariance, Request
from graphcomp.passes.pfa.principal import ChannelNorm, Map, count_kl, energies, pearson, removal_order
from graphcomp.passes.pfa.responses import Analysis, analysed
from graphcomp.passes.pfa.views import Response, calls_of, normalisation_behind, views_of
from graphcomp.pipeline import Context, Outlook, require_data
from graphcomp.records import Spectrum, Width


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
        if self.response == "bn" and not any(normalisation_behind(program, n) for n in program.graph.nodes):
            raise PassError(
                "response=bn: found no batch normalisation behind a layer, expected at least one; fold-bn "
                "removes them: run it later, or use response=conv, which needs none"
            )

    @property
    def share(self) -> float | None:
        """Of the spectral energy."""
        return self.energy

    def judge(self, channels: Channels, groups: Sequence[ChannelGroup], context: Context) -> Judgement:
        """Spectra and removal orders, from one pass over the data."""
        calls = calls_of(channels.program)
        views = {g: views_of(channels, g, calls, self.join, self.response) for g in groups}
        requests = [request for seen in views.values() for view in seen for request in view.requests]
        statistics = context.collect(channels.program, requests, self.samples) if requests else {}
        found = {
            g: analysed(g, seen, cast(dict[Request, Covariance], statistics)) for g, seen in views.items()
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
        self, channels: Channels, judged: Mapping[ChannelGroup, Analysis], context: Context
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
