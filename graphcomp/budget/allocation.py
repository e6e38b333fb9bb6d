"""How many channels of every group stay: what a criterion says, rounding, and targets.

A criterion orders the channels of a group and says what share of something (of the channels, of the spectral
energy) is preserved by keeping the best 1, 2, … of them. A share asked for then is a count for every group.
The only shares at which a count changes are those numbers themselves, so a target is met exactly, by a binary
search over them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphcomp.budget.cost import Cost
from graphcomp.budget.losses import CurveLosses, InputLosses, Losses
from graphcomp.budget.market import Step, give_back, greedy, largest, purchases
from graphcomp.channels import ChannelGroup, Channels, Removal, round_up, rounding_step

Scores = NDArray[np.float64]
"""Importance by channel id; the lowest go first."""

Preserved = NDArray[np.float64]
"""What keeping the best 1, 2, …, n channels of a group preserves: ascending, shape (n,), the last about 1."""

Lost = NDArray[np.float64]
"""What keeping the best 0, 1, …, n channels of a group loses: descending, shape (n + 1,), the last 0."""

Shares = Mapping[ChannelGroup, float]
"""What share of it a group is asked to preserve."""

AllocationRule = Literal["uniform", "greedy"]

NARROW = 2
"""Blocks of channels (multiples) up to which a group may go whole: with more of them it can be narrowed."""

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
        losses: where what is lost is known by group and width (calibrated, say): a curve for every judged
            group, in one unit. They add up over groups, and take the place of `worth`.
    """

    scores: Scores
    preserved: dict[ChannelGroup, Preserved]
    counts: dict[ChannelGroup, int] = field(default_factory=dict)
    unjudged: dict[ChannelGroup, str] = field(default_factory=dict)
    evidence: dict[ChannelGroup, dict[str, Any]] = field(default_factory=dict)
    worth: dict[ChannelGroup, Preserved] = field(default_factory=dict)
    losses: dict[ChannelGroup, Lost] = field(default_factory=dict)

    def lost(self, group: ChannelGroup, before: int, after: int) -> float:
        """What narrowing a group loses: of its importance, or by its curve; its best channels stay."""
        return self._held(group, before) - self._held(group, after)

    def at_random(self, groups: Sequence[ChannelGroup], seed: int) -> "Judgement":
        """The same order of channels, and of every group as many as chance says.

        Of n channels `n u^t` stay, with one u, uniform in (0, 1], for each group; t is the same for all, and
        the larger it is the less is left: a target decides about it. As a share that is asked for, s = e^-t:
        `k / n >= s^(-ln u)` is `(k / n)^(-1 / ln u) >= s`. At t = 1 every width is as likely as any other.
        """
        drawn = np.random.RandomState(seed).standard_exponential(len(groups))  # -ln u
        power = 1 / np.maximum(drawn, 1e-9)
        shares = {
            g: (np.arange(1, len(g.channels) + 1) / len(g.channels)) ** p
            for g, p in zip(groups, power, strict=True)
        }
        return replace(self, preserved={**self.preserved, **shares})

    def _held(self, group: ChannelGroup, keep: int) -> float:
        if self.losses:
            return -float(self.losses[group][keep])
        return float(self.worth.get(group, self.preserved[group])[keep - 1]) if keep else 0.0


def fewest(preserved: Preserved, share: float) -> int:
    """The smallest k whose k best channels preserve `share`, at least 1 (METHODS 5.2)."""
    return min(int(np.searchsorted(preserved, share - TOLERANCE)) + 1, len(preserved))


def rungs(preserved: Iterable[Preserved]) -> list[float]:
    """The shares at which a count changes, ascending."""
    found: list[float] = np.unique([share for shares in preserved for share in shares]).tolist()
    return found


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

    def removal(self, wanted: Mapping[ChannelGroup, int]) -> Removal:
        """The channels that go: of every block the lowest, after rounding, as far as that is legal.

        A group that is to keep none keeps as few as rounding allows where somebody needs one.
        """
        gone = self.channels.marks()
        for group, keep in wanted.items():
            width = round_up(keep, group, self.multiple, self.min_channels)
            gone[group.channels] = self._places[group] >= width
        found = Removal(self.channels, gone).legal(self.judgement.scores)
        needed = {g: 1 for g, keep in wanted.items() if not keep and found.kept(g)}
        if needed and self.min_channels == 0:
            return self.removal({**wanted, **needed})
        return found

    def choose(self, shares: Shares) -> Removal:
        """The channels that go for these shares."""
        return self.removal(self.wanted(shares))

    def meet(
        self, goal: float, cost: Cost, gone: Collection[ChannelGroup] = ()
    ) -> dict[ChannelGroup, float] | None:
        """The largest share, the same everywhere, whose cost is within the goal; None if none is.

        Rounding makes groups of one width jump together, past the goal: what there is room for is given back,
        so that some groups may preserve more than the others; those first that regain most importance.

        Args:
            goal, cost: what is to be left, and how it is counted.
            gone: groups that go whole.
        """
        index = self._largest_rung(goal, cost, gone)
        if index is None:
            return None
        shares = self.uniform(self._rungs[index], gone)
        if index + 1 == len(self._rungs):
            return shares
        more = self.uniform(self._rungs[index + 1], gone)
        earlier = [(group, more[group]) for group in self._by_regained(shares, more)]
        return give_back(shares, earlier, lambda trial: cost(self.choose(trial)) <= goal)

    def meet_with_whole_layers(self, goal: float, cost: Cost) -> dict[ChannelGroup, float] | None:
        """`meet`, after so many layers went whole that least is lost in the end (`Losses.total`, `depth`).

        They go in the order in which `buy` would take them, and come back, the last one first, where there is
        room for them in the end. Where no layer may go whole, this is `meet`.
        """
        best: tuple[float, float, list[ChannelGroup]] | None = None
        for gone in self._whole_layers(cost):
            index = self._largest_rung(goal, cost, gone)
            if index is None:
                continue
            share = self._rungs[index]
            lost = self._lost(self.choose(self.uniform(share, gone))) * (self._losses().depth if gone else 1)
            if best is None or lost < best[0]:
                best = lost, share, gone
            if index + 1 == len(self._rungs):  # nothing else has to go
                break
        if best is None:
            return None
        _, share, gone = best

        def meets(trial: Mapping[ChannelGroup, bool]) -> bool:
            return cost(self.choose(self.uniform(share, [g for g in gone if trial[g]]))) <= goal

        stays = give_back(dict.fromkeys(gone, True), [(g, False) for g in reversed(gone)], meets)
        return self.meet(goal, cost, [g for g in gone if stays[g]])

    def buy(self, goal: float, cost: Cost) -> dict[ChannelGroup, float] | None:
        """Shares, one for every group, whose cost is within the goal; None if none are.

        One step of a group's width at a time, always the one that saves most cost for what is lost
        (`Losses`). A step is as wide as it has to be to save anything: kernels compute whole blocks; or it
        takes the whole group, where `min_channels` allows that, little is left and nobody misses it. The last
        step may save far more than was missing; what there is room for then is given back.
        """
        offers = _Narrowing(self, cost, self._losses())
        kept = greedy(self._widths, lambda trial: cost(self.removal(trial)), goal, offers)
        if kept is None:
            return None
        return {g: float(self.judgement.preserved[g][k - 1]) if k else 0.0 for g, k in kept.items()}

    @property
    def _widths(self) -> dict[ChannelGroup, int]:
        return {g: len(g.channels) for g in self.groups}

    @cached_property
    def _rungs(self) -> list[float]:
        return rungs(self.judgement.preserved[g] for g in self.groups)

    @cached_property
    def _places(self) -> dict[ChannelGroup, NDArray[np.int64]]:
        return {group: places(group, self.judgement.scores) for group in self.groups}

    def _largest_rung(self, goal: float, cost: Cost, gone: Collection[ChannelGroup]) -> int | None:
        return largest(self._rungs, lambda rung: cost(self.choose(self.uniform(rung, gone))) <= goal)

    def _whole_layers(self, cost: Cost) -> Iterator[list[ChannelGroup]]:
        """None, then one more each time: the one that saves most cost for what is lost."""
        gone: list[ChannelGroup] = []
        yield []
        kept, offers = self._widths, _Narrowing(self, cost, self._losses(), only_whole=True)
        for purchase in purchases(kept, cost(self.removal(kept)), offers):
            gone.append(purchase.item)
            yield list(gone)

    def _losses(self) -> Losses:
        return CurveLosses() if self.judgement.losses else InputLosses(self.channels)

    def _lost(self, removal: Removal) -> float:
        """What a choice loses over all groups."""
        kept = {g: removal.kept(g) for g in self.groups}
        lost, losses = self.judgement.lost, self._losses()
        parts = {g: lost(g, len(g.channels), keep) for g, keep in kept.items() if keep < len(g.channels)}
        losses.forget(removal)
        return losses.total(parts)

    def _by_regained(self, shares: Shares, more: Shares) -> list[ChannelGroup]:
        """The groups that regain something by more, those first that regain most of their importance."""
        scores = self.judgement.scores
        regained = self.choose(shares).gone & ~self.choose(more).gone

        def gain(group: ChannelGroup) -> float:
            back = group.channels[regained[group.channels]]
            return float(scores[back].sum() / max(float(scores[group.channels].sum()), 1e-300))

        gains = {group: gain(group) for group in self.groups}
        return sorted((g for g in self.groups if gains[g] > 0), key=lambda g: gains[g], reverse=True)


@dataclass(frozen=True, eq=False)
class _Narrowing:
    """What `Allocation` buys: for a group the next smaller width that saves anything, or none at all.

    Attributes:
        cost, losses: what savings are divided by.
        only_whole: whether nothing but whole groups is on offer.
    """

    allocation: Allocation
    cost: Cost
    losses: Losses
    only_whole: bool = False

    def steps(self, group: ChannelGroup, kept: Mapping[ChannelGroup, int], now: float) -> Iterator[Step[int]]:
        """Those that cost less than now."""
        lost = self.allocation.judgement.lost
        if not self.only_whole:
            for fewer, after in self._narrower(group, kept, now):
                yield Step(fewer, after, self.losses.loss(group, lost(group, kept[group], fewer)))
        for after in self._whole(group, kept, now):
            loss = self.losses.loss(group, lost(group, kept[group], 0)) * self.losses.depth
            yield Step(0, after, loss)

    def taken(self, group: ChannelGroup, before: int, kept: Mapping[ChannelGroup, int]) -> None:
        """What is lost next depends on it."""
        self.losses.lose(group, self.allocation.judgement.lost(group, before, kept[group]))
        if not kept[group]:
            self.losses.forget(self.allocation.removal(kept))

    def _narrower(
        self, group: ChannelGroup, kept: Mapping[ChannelGroup, int], now: float
    ) -> Iterator[tuple[int, float]]:
        """The first smaller width above 0 that costs less, and what."""
        multiple, min_channels = self.allocation.multiple, self.allocation.min_channels
        step, width = rounding_step(group, multiple), kept[group]
        while (fewer := round_up(max((width - 1) // step * step, 1), group, multiple, min_channels)) < width:
            after = self.cost(self.allocation.removal({**kept, group: fewer}))
            if after < now:
                yield fewer, after
                return
            width = fewer

    def _whole(self, group: ChannelGroup, kept: Mapping[ChannelGroup, int], now: float) -> Iterator[float]:
        """What none at all costs, if that is less, nobody misses it, and few are left (`NARROW`)."""
        blocks = NARROW * rounding_step(group, self.allocation.multiple)
        if not self.allocation.min_channels and 0 < kept[group] <= blocks:
            without = self.allocation.removal({**kept, group: 0})
            if not without.kept(group) and (after := self.cost(without)) < now:
                yield after


def places(group: ChannelGroup, scores: Scores) -> NDArray[np.int64]:
    """How many channels stay at most, in equal blocks, while each of the group's does not; shape (n,)."""
    blocks = int(group.blocks.max()) + 1
    found = np.empty(len(group.channels), np.int64)
    for block in range(blocks):
        at = np.flatnonzero(group.blocks == block)
        order = at[np.argsort(scores[group.channels[at]], kind="stable")]
        found[order] = np.arange(len(order) - 1, -1, -1) * blocks
    return found
