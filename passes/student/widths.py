"""How wide the layers of a student are, by groups of coupled channels."""

from collections.abc import Sequence

from graphcomp.channels import ChannelGroup, Channels, Ints


def rows_of(channels: Channels) -> dict[str, Ints]:
    """Layer -> the channel of every output row, in the order of the network."""
    return {a.layer: a.channels for a in channels.axes if a.role == "out"}


def others(channels: Channels, layers: Sequence[str]) -> list[ChannelGroup]:
    """The groups that keep their widths though they could lose channels."""
    return [g for g in channels.removable if g.producers and not set(g.producers) & set(layers)]


def kept_counts(channels: Channels, layers: Sequence[str], fraction: float) -> dict[ChannelGroup, int]:
    """How many channels of every group stay, so that each layer has `max(1, round(fraction * n))`.

    A layer whose channels are all in one group decides for it. One whose channels are in several (option A:
    those that the stage before has, and its own) fills what is not decided yet with what it lacks, in
    proportion to the groups' sizes.
    """
    counts: dict[ChannelGroup, int] = {}
    groups = {n: [g for g in channels.removable if n in g.producers] for n in layers}
    for name in sorted(layers, key=lambda n: (len(groups[n]), layers.index(n))):
        rows = {g: len(g.producers[name]) for g in groups[name]}
        open_ = [g for g in groups[name] if g not in counts]
        left = max(1, round(fraction * sum(rows.values()))) - sum(counts.get(g, 0) for g in groups[name])
        for i, group in enumerate(open_):
            size = sum(len(g.channels) for g in open_[i:])
            counts[group] = min(max(round(left * len(group.channels) / size), 0), len(group.channels))
            left -= counts[group]
    return counts
