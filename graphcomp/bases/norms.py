"""Filter norms, which more than one method goes by."""

import numpy as np
import torch
from torch import Tensor

from graphcomp.budget import Scores
from graphcomp.channels import Axis, Channels

_AT_ONCE = 1 << 20
"""Weights that are converted to float64 at once."""


def norm_scores(channels: Channels) -> Scores:
    """By channel id: the sum of filter norms over the layers that produce it."""
    scores = np.zeros(len(channels.channel_of))
    for axis in channels.axes:
        if axis.role == "out":
            np.add.at(scores, axis.channels, filter_norms(channels.program.tensors[axis.weight], axis))
    return scores


def filter_norms(weight: Tensor, axis: Axis) -> Scores:
    """`sum |W|` of every output channel's filter, shape (channels,)."""
    rows = filters(weight.detach(), axis)
    some = max(_AT_ONCE // rows.size(1), 1)  # fresh memory costs more than the arithmetic
    norms = torch.cat([part.double().abs().sum(1) for part in torch.split(rows, some)])
    return np.asarray(norms.numpy(), dtype=np.float64)


def filters(weight: Tensor, axis: Axis) -> Tensor:
    """The filter of every output channel, shape (channels, weights of one); differentiable."""
    dim = axis.tensors[0][1]
    blocks = weight.reshape(axis.groups, -1, *weight.shape[1:])
    return blocks.movedim(dim + 1, 1).flatten(2).flatten(0, 1)
