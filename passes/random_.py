"""random: channels drawn at random, the baseline that every criterion must beat."""

from typing import ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from graphcomp.allocation import Scores
from graphcomp.channels import Channels
from graphcomp.pipeline import Context
from graphcomp.removal import OPTIONS, RatioRemoval


@dataclass(frozen=True, config=OPTIONS)
class Random(RatioRemoval):
    """Remove channels drawn at random, from the seed of the run."""

    name: ClassVar[str] = "random"

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """Uniform numbers."""
        return np.random.default_rng(context.seed).random(len(channels.channel_of)), {}
