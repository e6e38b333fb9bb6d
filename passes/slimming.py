"""slimming: one threshold for the scales of all normalisations (Liu et al. 2017, "Network Slimming").

A channel is worth the absolute scale |gamma| that its batch normalisation multiplies it by. Of all channels
that are judged, in all layers together, those of the smallest scales go:

    remove { c : |gamma_c| <= T },   T the `ratio` quantile over all channels

so layers lose as much as they can do without, and not all the same part. Scales mean something after a
training in which they carried an l1 term: the whole method is

    finetune{sparsity=1e-4, keep=last}, slimming{ratio=0.5}, finetune

Channels that several layers share count with the mean of |gamma| over the normalisations behind these layers.
Layers without a normalisation of their own behind them are left alone.

With R(c) a channel's place among all n, the largest scale first, the best k channels of a group preserve the
share (R(c_{k+1}) - 1) / n of the ranking: asking all groups for one share is asking for one threshold. So
`target` works as everywhere, and finds the threshold.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, cast

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from graphcomp.bases import OPTIONS, RatioRemoval, layer_node
from graphcomp.budget import Judgement, Preserved, Scores
from graphcomp.channels import ChannelGroup, Channels
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.pipeline import Context, Outlook


@dataclass(frozen=True, config=OPTIONS)
class Slimming(RatioRemoval):
    """Remove the channels of the smallest normalisation scales, by one threshold for the whole network."""

    name: ClassVar[str] = "slimming"

    ratio: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        Field(description="fraction of all judged channels together to remove"),
    ] = None

    def require(self, outlook: Outlook) -> None:
        """Also a normalisation with scales behind some layer."""
        super().require(outlook)
        program = outlook.program
        if all(_scales_behind(program, layer) is None for layer in program.called_modules()):
            raise PassError(
                "scales: found no batch normalisation behind a layer, expected at least one; fold-bn removes "
                "them: run it later; where a file has them folded already, l1, pfa, apoz, obs, low-rank, dct "
                "and refit work without"
            )

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """The mean |gamma| behind the layers that produce a channel."""
        sums, counts = np.zeros((2, len(channels.channel_of)))
        bare: set[str] = set()
        for axis in channels.axes:
            if axis.role != "out":
                continue
            layer = axis.layer
            scales = _scales_behind(channels.program, layer)
            if scales is None:
                bare.add(layer)
                continue
            np.add.at(sums, axis.channels, scales)
            np.add.at(counts, axis.channels, 1)
        unjudged = {
            g.name: "no batch normalisation of its own behind it"
            for g in channels.removable
            if bare & set(g.producers)
        }
        return sums / np.maximum(counts, 1), unjudged

    def judge(self, channels: Channels, groups: Sequence[ChannelGroup], context: Context) -> Judgement:
        """Shares of the ranking of all channels together."""
        judgement = super().judge(channels, groups, context)
        judged = [g for g in groups if g not in judgement.unjudged]
        return replace(judgement, preserved={**judgement.preserved, **_ranked(judgement.scores, judged)})


def _ranked(scores: Scores, groups: Sequence[ChannelGroup]) -> dict[ChannelGroup, Preserved]:
    """For every group what its best 1, 2, … channels preserve of the common ranking; the last one is 1."""
    if not groups:
        return {}
    every = np.concatenate([g.channels for g in groups])
    place = np.zeros(len(scores))
    place[every[np.argsort(-scores[every], kind="stable")]] = np.arange(len(every))
    return {g: np.append(np.sort(place[g.channels])[1:] / len(every), 1.0) for g in groups}


def _scales_behind(program: Program, layer: str) -> Scores | None:
    """|gamma| of the batch normalisation that a layer feeds, and nothing else; shape (channels,)."""
    node = layer_node(program, layer)
    user = next(iter(node.users)) if node is not None and len(node.users) == 1 else None
    if user is None or user.op != "call_module":
        return None
    norm = program.layer(cast(str, user.target))
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.weight is None:
        return None
    weight: Tensor = norm.weight
    return np.asarray(weight.detach().double().abs().numpy(), dtype=np.float64)
