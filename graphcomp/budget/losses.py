"""What a removal loses, by group: what greedy allocation divides its savings by."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from graphcomp.channels import ChannelGroup, Channels, Removal

DEPTH = 2.0
"""Times what its channels lose, that is counted for a layer that goes whole: what it computes goes, too."""

LEAST = 1e-12
"""Of a step, so that what loses nothing can be compared, too."""


class Losses(Protocol):
    """What losing parts of groups costs, as far as parts were lost before.

    Attributes:
        depth: times what its channels lose, that is counted for a group that goes whole.
    """

    depth: float

    def loss(self, group: ChannelGroup, part: float) -> float:
        """Of losing a part of a group now; above 0."""

    def total(self, parts: Mapping[ChannelGroup, float]) -> float:
        """Of losing these parts, and nothing before."""

    def lose(self, group: ChannelGroup, part: float) -> None:
        """Go on from there."""

    def forget(self, removal: Removal) -> None:
        """What works for nobody any more, after this removal, loses nothing."""


class CurveLosses:
    """Losses that are known group by group and add up: the part that is lost is the loss."""

    depth = 1.0  # a curve says itself what a whole group is worth

    def loss(self, group: ChannelGroup, part: float) -> float:
        """The part itself."""
        return max(part, LEAST)

    def total(self, parts: Mapping[ChannelGroup, float]) -> float:
        """Their sum."""
        return sum(parts.values())

    def lose(self, group: ChannelGroup, part: float) -> None:
        """Nothing: the next part loses what it loses."""

    def forget(self, removal: Removal) -> None:
        """Nothing: a curve knows of no others."""


class InputLosses:
    """What part of its input's importance every layer still reads; its groups count by their channels.

    A layer that goes from a part a to a part b loses log(a / b), so that no input is emptied before others
    were touched. A residual stream, which saves in many layers, loses in each of them; a group that is a
    small part of a concatenation loses little in every layer behind it, and so does one of the summands of an
    addition whose operands keep channels of their own (`join="pad"`).
    """

    def __init__(self, channels: Channels) -> None:
        self.depth = DEPTH
        axes = [axis for axis in channels.axes if axis.reads]
        self.read = [axis.channels for axis in axes]
        self.nodes = [axis.node for axis in axes]
        self.works = np.ones(len(self.read), bool)
        self.left = np.ones(len(self.read))
        self.joins = channels.joins
        self.summands = np.ones(len(channels.channel_of))
        self.summands[0] = 0.0
        for join in self.joins:
            self.summands[join.result] = sum(self.summands[operand] for operand in join.operands)
        self._parts: dict[ChannelGroup, NDArray[np.float64]] = {}

    def loss(self, group: ChannelGroup, part: float) -> float:
        """Of losing this part of a group's importance, over all layers; above 0."""
        after = np.maximum(self.left - part * self._of(group), 1e-300)
        return max(float(np.log(self.left / after)[self.works].sum()), LEAST)

    def total(self, parts: Mapping[ChannelGroup, float]) -> float:
        """What losing these parts of groups' importance loses together, over all layers."""
        left = 1 - sum(part * self._of(group) for group, part in parts.items())
        return -float(np.log(np.maximum(left, 1e-300))[self.works].sum())

    def lose(self, group: ChannelGroup, part: float) -> None:
        """Go on from there."""
        self.left = np.maximum(self.left - part * self._of(group), 1e-300)

    def forget(self, removal: Removal) -> None:
        """Layers that work for nobody any more lose nothing."""
        self.works = np.array([name not in removal.idle.names for name in self.nodes], bool)

    def _of(self, group: ChannelGroup) -> NDArray[np.float64]:
        """What part of every layer's input a group is."""
        if group not in self._parts:
            parts = np.zeros(len(self.summands))
            parts[group.channels] = 1.0
            for join in self.joins:  # operands come before their sums
                parts[join.result] = sum(parts[x] * self.summands[x] for x in join.operands)
                parts[join.result] /= np.maximum(self.summands[join.result], 1)
            self._parts[group] = np.array([parts[ids].mean() for ids in self.read])
        return self._parts[group]
