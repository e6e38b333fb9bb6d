"""l1: filter norm (Li et al. 2017, "Pruning Filters for Efficient ConvNets").

The importance of an output channel is the sum of the absolute weights of its filter, `|f| = sum |W[n]|`, bias
excluded. Coupled channels add up what all layers that produce them contribute.
"""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, RatioRemoval, norm_scores
from graphcomp.budget import Scores
from graphcomp.channels import Channels
from graphcomp.pipeline import Context


@dataclass(frozen=True, config=OPTIONS)
class L1(RatioRemoval):
    """Remove the channels whose filters have the smallest l1 norm (Li et al. 2017)."""

    name: ClassVar[str] = "l1"

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """Sum of filter norms over the layers that produce a channel."""
        return norm_scores(channels), {}
