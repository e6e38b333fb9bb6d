"""How many channels of every group stay: what a criterion says, rounding, and targets.

A criterion orders the channels of a group and says what share of something (of the channels, of the spectral
energy) is preserved by keeping the best 1, 2, … of them. A share asked for then is a count for every group.
The only shares at which a count changes are those numbers themselves, so a target is met exactly, by a binary
search over them.
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphcomp.channels import (
    ChannelGroup,
    Channels,
    Drop,
    legalise,
    live_of,
    no_drop,
    round_up,
    rounding_step,
)
from graphcomp.measure import layer_row, layer_weight, params_trainable

Scores = NDArray[np.float64]
"""Importance by channel id; the lowest go first."""

Preserved = NDArray[np.float64]
"""What keeping the best 1, 2, …, n channels of a group preserves: ascending, shape (n,), the last about 1."""

Shares = Mapping[ChannelGroup, float]
"""What share of it a group is asked to preserve."""

Counter = Literal["macs", "params"]
AllocationRule = Literal["uniform", "greedy"]
Cost = Callable[[Drop], float]
"""What a program costs after a removal."""
Steps = Callable[[ChannelGroup, Mapping[ChannelGroup, int], float, Cost], list[tuple[int, float]]]
"""Widths that a group can go to from the current ones, and what all then costs, less than now."""

NARROW = 2
"""Blocks of channels (multiples) up to which a group may go whole: with more of them it can be narrowed."""
DEPTH = 2.0
"""Times what its channels lose, that is counted for a layer that goes whole: what it computes goes, too."""

TOLERANCE = 1e-12
"""Shares are sums of rounded numbers: ten times 0.1 is less than 1."""


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a criterion says about the groups that it was asked about.

    Attributes:
        scores: importance by channel id.
        preserved: how much of a group its best channels preserve.
        counts: kept counts by the criterion's own rule, if it has one.
        unjudged: groups that it cannot judge, and why; they stay whole.
        evidence: what a group's record in the plan shows besides its width.
        worth: like `preserved`, where that says nothing of single channels (shares of their number): what
            part of a group's importance its best channels hold. For `Allocation.buy`.
    """

    scores: Scores
    preserved: dict[ChannelGroup, Preserved]
    counts: dict[ChannelGroup, int] = field(default_factory=dict)
    unjudged: dict[ChannelGroup, str] = field(default_factory=dict)
    evidence: dict[ChannelGroup, dict[str, Any]] = field(default_factory=dict)
    worth: dict[ChannelGroup, Preserved] = field(default_factory=dict)


def fewest(preserved: Preserved, share: float) -> int:
    """The smallest k whose k best channels preserve `share`, at least 1 (METHODS 5.2)."""
    return min(int(np.searchsorted(preserved, share - TOLERANCE)) + 1, len(preserved))


def largest(rungs: Sequence[float], meets: Callable[[float], bool]) -> int | None:
    """Index of the largest of ascending `rungs` that meets a goal, by binary search; None if none does.

    What a rung costs must not fall from one rung to the next.
    """
    index = bisect_left(rungs, True, key=lambda rung: not meets(rung)) - 1
    return index if index >= 0 else None


@dataclass(frozen=True, eq=False)
class Allocation:
    """From shares to channels, for the groups that may lose some.

    Attributes:
        channels: the analysis that the groups are of.
        groups: those that were judged.
        judgement: by the criterion.
        multiple, min_channels: see `round_up`.
    """

    channels: Channels
    groups: Sequence[ChannelGroup]
    judgement: Judgement
    multiple: int
    min_channels: int

    def uniform(self, share: float, gone: Collection[ChannelGroup] = ()) -> dict[ChannelGroup, float]:
        """The same share everywhere, but nothing of groups that are to go whole."""
        return {group: 0.0 if group in gone else share for group in self.groups}

    def wanted(self, shares: Shares) -> dict[ChannelGroup, int]:
        """Kept counts before rounding; a share of 0 asks for none."""
        preserved = self.judgement.preserved
        return {g: fewest(preserved[g], share) if share > 0 else 0 for g, share in shares.items()}

    def drop(self, wanted: Mapping[ChannelGroup, int]) -> Drop:
        """The channels that go: of every block the lowest, after rounding, as far as that is legal.

        A group that is to keep none keeps as few as rounding allows where somebody needs one.
        """
        drop, scores = no_drop(self.channels), self.judgement.scores
        for group, keep in wanted.items():
            _drop_lowest(drop, group, scores, round_up(keep, group, self.multiple, self.min_channels))
        drop = legalise(self.channels, drop, scores)
        needed = {g: 1 for g, keep in wanted.items() if not keep and not drop[g.channels].all()}
        if needed and self.min_channels == 0:
            return self.drop({**wanted, **needed})
        return drop

    def choose(self, shares: Shares) -> Drop:
        """The channels that go for these shares."""
        return self.drop(self.wanted(shares))

    def meet(
        self, goal: float, cost: Cost, gone: Collection[ChannelGroup] = ()
    ) -> dict[ChannelGroup, float] | None:
        """The largest share, the same everywhere, whose cost is within the goal; None if none is.

        Rounding makes groups of one width jump together, past the goal: what there is room for is given back
        (`_refill`), so that some groups may preserve more than the others.

        Args:
            goal, cost: what is to be left, and how it is counted.
            gone: groups that go whole.
        """
        rungs = self._rungs
        index = self._largest_rung(goal, cost, gone)
        if index is None:
            return None
        shares = self.uniform(rungs[index], gone)
        if index + 1 == len(rungs):
            return shares
        more = self.uniform(rungs[index + 1], gone)
        return self._refill(shares, more, lambda trial: cost(self.choose(trial)) <= goal)

    def meet_with_whole_layers(self, goal: float, cost: Cost) -> dict[ChannelGroup, float] | None:
        """`meet`, after so many layers went whole that least is lost in the end (`_Inputs.total`, `DEPTH`).

        They go in the order in which `buy` would take them, and come back, the last one first, where there is
        room for them in the end. Where no layer may go whole, this is `meet`.
        """
        best: tuple[float, int, list[ChannelGroup]] | None = None
        for gone in self._whole_layers(cost):
            index = self._largest_rung(goal, cost, gone)
            if index is None:
                continue
            lost = self._lost(self.choose(self.uniform(self._rungs[index], gone))) * (DEPTH if gone else 1)
            if best is None or lost < best[0]:
                best = lost, index, gone
            if index + 1 == len(self._rungs):  # nothing else has to go
                break
        if best is None:
            return None
        _, index, gone = best
        for group in reversed(gone):
            fewer = [other for other in gone if other is not group]
            if cost(self.choose(self.uniform(self._rungs[index], fewer))) <= goal:
                gone = fewer
        return self.meet(goal, cost, gone)

    @cached_property
    def _rungs(self) -> list[float]:
        """The shares at which a count changes."""
        rungs: list[float] = np.unique([s for g in self.groups for s in self.judgement.preserved[g]]).tolist()
        return rungs

    def _largest_rung(self, goal: float, cost: Cost, gone: Collection[ChannelGroup]) -> int | None:
        return largest(self._rungs, lambda rung: cost(self.choose(self.uniform(rung, gone))) <= goal)

    def _whole_layers(self, cost: Cost) -> Iterator[list[ChannelGroup]]:
        """None, then one more each time: the one that saves most cost for what is lost."""
        gone: list[ChannelGroup] = []
        yield []
        for group, _, _ in self._purchases({g: len(g.channels) for g in self.groups}, cost, self._whole):
            gone.append(group)
            yield list(gone)

    def _lost(self, drop: Drop) -> float:
        """What a choice loses over all layers."""
        kept = {g: int((~drop[g.channels]).sum()) for g in self.groups}
        parts = {g: 1 - self._held(g, keep) for g, keep in kept.items() if keep < len(g.channels)}
        inputs = _Inputs(self.channels)
        inputs.forget(drop)
        return inputs.total(parts)

    def buy(self, goal: float, cost: Cost) -> dict[ChannelGroup, float] | None:
        """Shares, one for every group, whose cost is within the goal; None if none are.

        One step of a group's width at a time, always the one that saves most cost for what is lost
        (`_Inputs`). A step is as wide as it has to be to save anything: kernels compute whole blocks;
        or it takes the whole group, where `min_channels` allows that, little is left and nobody
        misses it. Gains are looked at again only when they come to the top: removing channels seldom
        makes other channels dearer. The last step may save far more than was missing; what there is
        room for then is given back, the last bought first.
        """
        kept = {g: len(g.channels) for g in self.groups}
        bought, now = list[tuple[ChannelGroup, int]](), cost(self.drop(kept))
        if now > goal:
            for group, before, now in self._purchases(kept, cost, self._steps):
                bought.append((group, before))
                if now <= goal:
                    break
        if now > goal:
            return None
        for group, before in reversed(bought):
            if cost(self.drop({**kept, group: before})) <= goal:
                kept[group] = before
        return {g: float(self.judgement.preserved[g][k - 1]) if k else 0.0 for g, k in kept.items()}

    def _purchases(
        self, kept: dict[ChannelGroup, int], cost: Cost, steps_of: Steps
    ) -> Iterator[tuple[ChannelGroup, int, float]]:
        """Narrow groups in `kept`, step by step: the group, its width before, what all costs now."""
        inputs, now = _Inputs(self.channels), cost(self.drop(kept))
        heap = [(-math.inf, i) for i in range(len(self.groups))]
        while heap:
            _, index = heapq.heappop(heap)
            group = self.groups[index]
            steps = []
            for fewer, after in steps_of(group, kept, now, cost):
                part = self._held(group, kept[group]) - self._held(group, fewer)
                loss = inputs.loss(group, part) * (1 if fewer else DEPTH)
                steps.append(((now - after) / loss, part, fewer, after))
            if not steps:
                continue
            gain, part, fewer, after = max(steps)
            is_best = not heap or gain >= -heap[0][0]
            heapq.heappush(heap, (-gain, index))
            if not is_best:
                continue
            inputs.lose(group, part)
            before, kept[group], now = kept[group], fewer, after
            if not fewer:
                inputs.forget(self.drop(kept))
            yield group, before, now

    def _fewer(self, group: ChannelGroup, keep: int) -> int | None:
        """The next smaller width that rounding allows, above 0; None if there is none."""
        step = rounding_step(group, self.multiple)
        found = round_up(max((keep - 1) // step * step, 1), group, self.multiple, self.min_channels)
        return found if found < keep else None

    def _steps(
        self, group: ChannelGroup, kept: Mapping[ChannelGroup, int], now: float, cost: Cost
    ) -> list[tuple[int, float]]:
        """Smaller widths that cost less than now, and what: the next one, and none at all."""
        found = []
        fewer = self._fewer(group, kept[group])
        while fewer is not None:
            after = cost(self.drop({**kept, group: fewer}))
            if after < now:
                found.append((fewer, after))
                break
            fewer = self._fewer(group, fewer)
        return found + self._whole(group, kept, now, cost)

    def _whole(
        self, group: ChannelGroup, kept: Mapping[ChannelGroup, int], now: float, cost: Cost
    ) -> list[tuple[int, float]]:
        """None at all, if that costs less than now, nobody misses it, and few are left (`NARROW`)."""
        if self.min_channels or not 0 < kept[group] <= NARROW * rounding_step(group, self.multiple):
            return []
        drop = self.drop({**kept, group: 0})
        return [(0, after)] if drop[group.channels].all() and (after := cost(drop)) < now else []

    def _held(self, group: ChannelGroup, keep: int) -> float:
        """What part of a group's importance its best channels hold."""
        if not keep:
            return 0.0
        return float(self.judgement.worth.get(group, self.judgement.preserved[group])[keep - 1])

    def _refill(
        self, shares: dict[ChannelGroup, float], more: Shares, meets: Callable[[Shares], bool]
    ) -> dict[ChannelGroup, float]:
        """Raise groups to the next share, those first that would regain most of their importance."""
        scores = self.judgement.scores
        regained = self.choose(shares) & ~self.choose(more)

        def gain(group: ChannelGroup) -> float:
            back = group.channels[regained[group.channels]]
            return float(scores[back].sum() / max(float(scores[group.channels].sum()), 1e-300))

        for group in sorted(self.groups, key=gain, reverse=True):
            trial = {**shares, group: more[group]}
            if gain(group) > 0 and meets(trial):
                shares = trial
        return shares


class _Inputs:
    """What part of its input's importance every layer still reads; its groups count by their channels.

    A layer that goes from a part a to a part b loses log(a / b), so that no input is emptied before others
    were touched. A residual stream, which saves in many layers, loses in each of them; a group that is a
    small part of a concatenation loses little in every layer behind it, and so does one of the summands of an
    addition whose operands keep channels of their own (`join="pad"`).
    """

    def __init__(self, channels: Channels) -> None:
        self.live = live_of(channels)
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
        return max(float(np.log(self.left / after)[self.works].sum()), 1e-12)

    def total(self, parts: Mapping[ChannelGroup, float]) -> float:
        """What losing these parts of groups' importance loses together, over all layers."""
        left = 1 - sum(part * self._of(group) for group, part in parts.items())
        return -float(np.log(np.maximum(left, 1e-300))[self.works].sum())

    def lose(self, group: ChannelGroup, part: float) -> None:
        """Go on from there."""
        self.left = np.maximum(self.left - part * self._of(group), 1e-300)

    def forget(self, drop: Drop) -> None:
        """Layers that work for nobody any more lose nothing."""
        idle = self.live.idle_names(drop)
        self.works = np.array([name not in idle for name in self.nodes], bool)

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


def _drop_lowest(drop: Drop, group: ChannelGroup, scores: Scores, keep: int) -> None:
    blocks = int(group.blocks.max()) + 1
    for block in range(blocks):
        members = group.channels[group.blocks == block]
        order = members[np.argsort(scores[members], kind="stable")]
        drop[order[: len(members) - keep // blocks]] = True


class CostModel:
    """Parameters and MACs of a program after a removal, from the axes alone."""

    def __init__(self, channels: Channels) -> None:
        program, self.axes, self.live = channels.program, channels.axes, live_of(channels)
        self.total_params = params_trainable(program)
        self.sizes: dict[str, tuple[int, bool]] = {}
        name_of: dict[int, str] = {}  # a tied weight is on the axes under one of its names
        for axis in self.axes:
            for name, _ in axis.tensors:
                tensor = program.tensors[name]
                self.sizes[name] = tensor.numel(), tensor.requires_grad
                name_of[id(tensor)] = name
        self.layers: list[tuple[int, str, int]] = []  # node by number, its weight, its MACs
        for number, node in enumerate(program.graph.nodes):
            row = layer_row(program, node)
            if row is not None:
                self.layers.append((number, name_of.get(id(layer_weight(program, node)), ""), row.macs))

    def macs(self, drop: Drop) -> float:
        """Multiply-accumulates after the removal."""
        left, idle = self._left(drop), self.live.idle(drop)
        return sum(m * left.get(weight, 1.0) for number, weight, m in self.layers if not idle[number])

    def params(self, drop: Drop) -> float:
        """Trainable parameters after the removal."""
        left = self._left(drop)
        return self.total_params - sum(
            n * (1 - left[name]) for name, (n, trainable) in self.sizes.items() if trainable
        )

    def _left(self, drop: Drop) -> dict[str, float]:
        """The fraction of every tensor that stays."""
        left = dict.fromkeys(self.sizes, 1.0)
        for axis in self.axes:
            fraction = 1 - float(drop[axis.channels].mean())
            for name, _ in axis.tensors:
                left[name] *= fraction
        return {**left, **{name: 0.0 for name in self.live.unused(drop) if name in left}}


def cost_of(counter: Counter, channels: Channels) -> Cost:
    """What a target counts, as a function of the removal."""
    model = CostModel(channels)
    return {"macs": model.macs, "params": model.params}[counter]
