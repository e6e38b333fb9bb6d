"""l1: filter norm (Li et al. 2017, "Pruning Filters for Efficient ConvNets").

The importance of an output channel is the sum of the absolute weights of its filter, `|f| = sum |W[n]|`, bias
excluded. Coupled channels add up what all layers that produce them contribute.
"""

from typing import ClassVar

import numpy as np
from pydantic.dataclasses import dataclass
from torch import Tensor

from graphcomp.channels import Axis, Channels
from graphcomp.pipeline import Context
from graphcomp.removal import OPTIONS, ChannelRemoval, Scores


@dataclass(frozen=True, config=OPTIONS)
class L1(ChannelRemoval):
    """Remove the channels whose filters have the smallest l1 norm (Li et al. 2017)."""

    name: ClassVar[str] = "l1"

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """Sum of filter norms over the layers that produce a channel."""
        scores = np.zeros(len(channels.channel_of))
        for axis in channels.axes:
            if axis.role == "out":
                np.add.at(
                    scores,
                    axis.channels,
                    filter_norms(channels.program.tensors[axis.tensors[0][0]], axis),
                )
        return scores, {}


def filter_norms(weight: Tensor, axis: Axis) -> Scores:
    """`sum |W|` of every output channel's filter, shape (channels,)."""
    dim = axis.tensors[0][1]
    blocks = weight.detach().double().reshape(axis.groups, -1, *weight.shape[1:])
    norms = blocks.movedim(dim + 1, 1).flatten(2).abs().sum(2).flatten()
    return np.asarray(norms.numpy(), dtype=np.float64)
