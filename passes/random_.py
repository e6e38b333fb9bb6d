"""random: channels drawn at random, the baseline that every criterion must beat."""

from typing import ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, RatioRemoval
from graphcomp.budget import Scores
from graphcomp.channels import Channels
from graphcomp.pipeline import Context


@dataclass(frozen=True, config=OPTIONS)
class Random(RatioRemoval):
    """Remove channels drawn at random, from the seed of the run."""

    name: ClassVar[str] = "random"

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """Uniform numbers."""
        return np.random.default_rng(context.seed).random(len(channels.channel_of)), {}
