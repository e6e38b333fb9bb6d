"""Some samples as a network is called with them."""

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]
"""A tensor an input, in the order of the network's inputs; samples are counted along the first axis of each.

One input is a tuple of one: nothing that calls a network asks how many inputs there are.
"""


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device."""
    return tuple(x.to(device) for x in batch)


def in_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating point tensors in `dtype`; whole numbers (tokens) stay as they are."""
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)
