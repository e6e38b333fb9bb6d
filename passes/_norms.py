"""Filter norms, which more than one method goes by."""

import numpy as np
from torch import Tensor

from graphcomp.allocation import Scores
from graphcomp.channels import Axis, Channels


def norm_scores(channels: Channels) -> Scores:
    """By channel id: the sum of filter norms over the layers that produce it."""
    scores = np.zeros(len(channels.channel_of))
    for axis in channels.axes:
        if axis.role == "out":
            np.add.at(scores, axis.channels, filter_norms(channels.program.tensors[axis.tensors[0][0]], axis))
    return scores


def filter_norms(weight: Tensor, axis: Axis) -> Scores:
    """`sum |W|` of every output channel's filter, shape (channels,)."""
    dim = axis.tensors[0][1]
    blocks = weight.detach().double().reshape(axis.groups, -1, *weight.shape[1:])
    norms = blocks.movedim(dim + 1, 1).flatten(2).abs().sum(2).flatten()
    return np.asarray(norms.numpy(), dtype=np.float64)
