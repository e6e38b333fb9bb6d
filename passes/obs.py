"""obs: what stays of the error once the rest has made up for a channel (Hassibi & Stork 1993; METHODS 9.3).

A channel counts as much as the error that its readers are left with after the other channels they read were
fitted again in its place, weighted by how much their outputs move the network's; channels that others can
stand in for go first. Channels are taken out one after the other, and each time all others are judged anew.

By default a target is met by what stays of the error at the outputs, measured once a group on samples of its
own (`allocation=calibrated`, METHODS 9.4). Follow it by `refit`, which carries out what is counted on here.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, Compensation, RatioRemoval, Scores
from graphcomp.budget import Judgement
from graphcomp.channels import ChannelGroup, Channels
from graphcomp.pipeline import Context, Outlook, require_data


@dataclass(frozen=True, config=OPTIONS)
class Obs(RatioRemoval):
    """Remove the channels that the others can best make up for; no labels (Hassibi & Stork 1993)."""

    name: ClassVar[str] = "obs"

    @property
    def calibrates(self) -> bool:
        """Unless another allocation is asked for."""
        return self.allocation in ("auto", "calibrated")

    def require(self, outlook: Outlook) -> None:
        """Data."""
        require_data(self.name, outlook.context)
        super().require(outlook)

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """The order of removal, as the share of its group that goes before a channel does."""
        judgement = self.judge(channels, channels.removable, context)
        return judgement.scores, {group.name: reason for group, reason in judgement.unjudged.items()}

    def judge(self, channels: Channels, groups: Sequence[ChannelGroup], context: Context) -> Judgement:
        """The order of removal, and the losses by width as they follow from the statistics alone."""
        statistics = Compensation(channels, context, self.name)
        unjudged = {g: reason for g in groups if (reason := statistics.why_unjudged(g)) is not None}
        scores = np.zeros(len(channels.channel_of))
        losses = {}
        for number, group in enumerate(groups):
            if group in unjudged:
                continue
            context.progress(f"order the channels of {group.name}", 0.7 + 0.1 * number / len(groups))
            curve = statistics.curve(group)
            n = len(group.channels)
            scores[group.channels[curve.order]] = np.arange(1, n + 1) / n
            losses[group] = curve.lost
        return Judgement(
            scores,
            preserved={g: np.arange(1, len(g.channels) + 1) / len(g.channels) for g in groups},
            unjudged=unjudged,
            losses=losses,
        )
