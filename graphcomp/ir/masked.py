"""What stands in front of a normalisation while some of its channels count for nothing.

Statistics over channels change when channels go. A removal is simulated at the old shapes, so what a
normalisation is given is prepared such that it yields, for the channels that stay, what it yields for those
alone. Both functions are elementwise but for the statistics that they take themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_norm(
    x: Tensor, kept: Tensor, dims: Sequence[int], eps: float | None, centred: bool, groups: int
) -> Tensor:
    """Input for a normalisation by sqrt(var + eps) over all channels, of which some do not count.

    With d = (x - mean) * kept, v = mean(d^2) over what is kept, and s the share that is kept, it finds mean 0
    and variance r^2 s v of r d, and yields d / sqrt(v + eps) where r^2 (v + eps) = r^2 s v + eps:

        r^2 = eps / (eps + (1 - s) v)

    Args:
        x: any shape; (N, C, ...) where groups are formed.
        kept: 1 and 0 along the channels, broadcast to x.
        dims: what statistics are taken over, counted from the back; with groups, of (N, groups, C / groups,
            ...).
        eps: positive; None: the machine's, of x's type (as nn.RMSNorm has it).
        centred: whether the mean is taken off.
        groups: of channels, each normalised by itself; 0: there are none.
    """
    shape, dims = x.shape, list(dims)
    if groups:
        x, kept = (torch.unflatten(t, 1, (groups, -1)) for t in (x, kept))
    share = kept.mean(dims, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # a group may go whole
    d = x * kept
    if centred:
        d = (x - d.mean(dims, keepdim=True) / share) * kept
    variance = (d * d).mean(dims, keepdim=True) / share
    small = torch.finfo(x.dtype).eps if eps is None else eps
    return (d * torch.sqrt(small / (small + (1 - share) * variance))).reshape(shape)


def masked_spread(x: Tensor, kept: Tensor, dims: Sequence[int], correction: float) -> Tensor:
    """Input whose mean and variance over all channels are those of x over the channels that are kept.

    Args:
        x: any shape.
        kept: 1 and 0 along the channels, broadcast to x.
        dims: what statistics are taken over, counted from the back.
        correction: what is taken off the number of elements that the squares are divided by.
    """
    dims = list(dims)
    count = 1
    for d in dims:
        count = count * x.shape[d]
    share = kept.mean(dims, keepdim=True)
    mean = (x * kept).mean(dims, keepdim=True) / share
    return mean + (x - mean) * kept * torch.sqrt((count - correction) / (share * count - correction))


MASKS = (masked_norm, masked_spread)
"""Functions that only simulated removals call."""
