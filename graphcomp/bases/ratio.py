"""Criteria that only score channels: the same part of every group goes, or what a target leaves room for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.bases.options import JOIN, OPTIONS, only_one
from graphcomp.bases.removal import ChannelRemoval
from graphcomp.budget import Judgement, Scores
from graphcomp.channels import ChannelGroup, Channels, JoinPolicy
from graphcomp.pipeline import Context


@dataclass(frozen=True, config=OPTIONS)
class RatioRemoval(ChannelRemoval):
    """Base of the criteria that only score channels: the same ratio goes everywhere."""

    needs_amount: ClassVar[bool] = True

    join: Annotated[JoinPolicy, Field(description=JOIN)] = "couple"
    ratio: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        Field(description="fraction of each group's channels to remove"),
    ] = None

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = {"ratio": self.ratio is not None, "target": self.target is not None}
        if self.needs_amount or any(given.values()):
            only_one(given, "ratio=0.5")
        return self

    @property
    def share(self) -> float | None:
        """Of the channels: those that stay."""
        return None if self.ratio is None else 1 - self.ratio

    @abstractmethod
    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """Importance by channel id, and group name -> reason for groups that the criterion cannot judge."""

    def own_count(self, scores: Scores, group: ChannelGroup) -> int:
        """How many channels stay if neither ratio nor target says: for criteria with a rule of their own."""
        return len(group.channels)

    def judge(self, channels: Channels, groups: Sequence[ChannelGroup], context: Context) -> Judgement:
        """Every channel preserves as much as any other."""
        scores, unjudged = self.score(channels, context)
        return Judgement(
            scores,
            preserved={g: np.arange(1, len(g.channels) + 1) / len(g.channels) for g in groups},
            counts={g: self.own_count(scores, g) for g in groups},
            unjudged={g: unjudged[g.name] for g in groups if g.name in unjudged},
            worth={g: _held(scores[g.channels]) for g in groups},
        )


def _held(scores: Scores) -> Scores:
    """What part of the sum of scores the 1, 2, … highest hold; shape (n,)."""
    held = np.cumsum(np.sort(np.maximum(scores, 0))[::-1])
    return held / held[-1] if held[-1] > 0 else np.ones_like(held)
