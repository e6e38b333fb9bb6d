"""What the width of a group is rounded to: here once, for all that decide about widths."""

import math

from graphcomp.channels.model import ChannelGroup


def next_multiple(count: int, multiple: int, limit: int | None = None) -> int:
    """The least multiple that is no less than a count, or the limit if that is lower."""
    found = -(-count // multiple) * multiple
    return found if limit is None else min(found, limit)


def rounding_step(group: ChannelGroup, multiple: int) -> int:
    """What widths are rounded to: the multiple, and equal numbers in every block of the group."""
    return math.lcm(multiple, int(group.blocks.max()) + 1)


def round_up(keep: int, group: ChannelGroup, multiple: int, min_channels: int) -> int:
    """Kept channels after rounding up: to the multiple, and to equal numbers in every block."""
    total, blocks = len(group.channels), int(group.blocks.max()) + 1
    step = rounding_step(group, multiple)
    return next_multiple(max(keep, min_channels), step, total) if total % blocks == 0 else total
