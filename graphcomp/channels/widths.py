"""What the width of a group is rounded to: here once, for all that decide about widths."""

import math
from functools import lru_cache

from graphcomp.channels.model import ChannelGroup


def next_multiple(count: int, multiple: int) -> int:
    """The least multiple that is no less than a count."""
    return -(-count // multiple) * multiple


@lru_cache(maxsize=1 << 12)  # asked for every state of every layer, of few different ones
def multiple_for(width: int, multiple: int) -> int:
    """What a layer so wide is rounded to: the largest divisor of the multiple within half of it, or 1.

    Multiples are what kernels compute at a time. In steps coarser than half of its width a layer could only
    stay whole or go whole, which is no question of speed.
    """
    return max(d for d in range(1, multiple + 1) if multiple % d == 0 and (d == 1 or 2 * d <= width))


def round_within(count: int, multiple: int, width: int) -> int:
    """A count rounded up, of something so wide: to what `multiple_for` says, and to no more than all."""
    return min(next_multiple(count, multiple_for(width, multiple)), width)


def rounding_step(group: ChannelGroup, multiple: int) -> int:
    """What widths are rounded to: `multiple_for` the group, and equal numbers in every block of it."""
    return math.lcm(multiple_for(len(group.channels), multiple), int(group.blocks.max()) + 1)


def round_up(keep: int, group: ChannelGroup, multiple: int, min_channels: int) -> int:
    """Kept channels after rounding up: to the step of the group, whatever decides about it."""
    total, blocks = len(group.channels), int(group.blocks.max()) + 1
    step = rounding_step(group, multiple)
    return min(next_multiple(max(keep, min_channels), step), total) if total % blocks == 0 else total
