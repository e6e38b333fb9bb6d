"""Which groups of channels come back since their removal makes the network slower; see `budget.restoring`.

Kernels compute whole blocks, so widths in multiples of the block never make a layer slower; what does is a
width with which its operators leave the layout of the others (61 channels of 64). That is known from the
widths alone, and nothing is measured where there is none of them.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from graphcomp.base import distributed
from graphcomp.budget.allocation import Scores
from graphcomp.budget.calls import Operator
from graphcomp.budget.kernel_fit import form_of
from graphcomp.budget.remaining import LatencyCost, Remaining
from graphcomp.budget.restoring import Paying, Revert, confirm, is_asked, restore
from graphcomp.budget.stopwatch import Clock
from graphcomp.channels import ChannelGroup, Marks, Removal
from graphcomp.runtime import Target


def paying(
    removal: Removal, scores: Scores, revert: Revert, is_timed: bool, clock: Clock
) -> Paying[Removal, ChannelGroup]:
    """The removal without the groups that make the network slower; collective (see `distributed`).

    Args:
        removal: one that is feasible.
        scores: which channels come back first where not all can go.
        revert: as asked for.
        is_timed: whether times are what this removal is for.

    Raises:
        ProviderError: if there is something to measure and the target does not work here.
    """
    if not is_asked(revert, is_timed, clock):
        return Paying(removal, {})
    doubtful = _doubtful(removal, clock.target, every=revert == "always")
    if not doubtful:
        return Paying(removal, {})
    found = distributed.on_first(lambda: _paying(removal, scores, doubtful, clock))
    choice = Removal(removal.channels, found.choice)
    return Paying(choice, {doubtful[i]: x for i, x in found.slower.items()}, found.milliseconds)


def _paying(
    removal: Removal, scores: Scores, doubtful: Sequence[ChannelGroup], clock: Clock
) -> Paying[Marks, int]:
    """Which of the doubtful groups do not pay, by number: groups are other objects in every process."""
    channels = removal.channels

    def without(choice: Removal, number: int) -> Iterable[Removal]:
        group = doubtful[number]
        if choice.kept(group) < len(group.channels):
            trial = choice.gone & ~channels.marks(group.channels)
            yield Removal(channels, trial).legal(scores)

    only = _touched(Remaining(channels), doubtful)
    cost = LatencyCost(channels, clock.model(channels.program), only)
    restored, slower = restore(removal, range(len(doubtful)), without, cost.parts)
    if not slower:
        return Paying(removal.gone, {})
    restored, _ = restored.feasible(scores)
    watch = clock.stopwatch(channels.program)
    found = confirm(removal, restored, slower, lambda trial: trial.apply("trial"), watch)
    return Paying(found.choice.gone, found.slower, found.milliseconds)


def group_left_alone(group: ChannelGroup, planned: Removal, ratio: float) -> str:
    """Why a group was restored."""
    kept, width = planned.kept(group), len(group.channels)
    return f"{kept} of {width} channels predicted {ratio:.2f}x slower; left alone"


def _doubtful(removal: Removal, target: Target, every: bool) -> list[ChannelGroup]:
    """The groups that lost channels and touch an operator that left the layout; or all that lost some."""
    channels = removal.channels
    touched = [g for g in channels.groups if removal.kept(g) < len(g.channels) and not g.derived]
    if every:
        return touched
    remaining = Remaining(channels)
    pairs = zip(remaining.operators(Removal.of(channels)), remaining.operators(removal), strict=True)
    left = [_leaves(old, new, target) for old, new in pairs]
    return [
        g for g in touched if any(a and b for a, b in zip(left, remaining.touching(g.channels), strict=True))
    ]


def _leaves(old: Operator | None, new: Operator | None, target: Target) -> bool:
    """Whether an operator was in the blocked layout and is not any more."""
    if old is None or new is None:
        return False
    before, after = (form_of(kernel, into, out, target) for kernel, into, out in (old, new))
    return before != "plain" and after == "plain"


def _touched(remaining: Remaining, groups: Sequence[ChannelGroup]) -> Marks:
    marks = [remaining.touching(group.channels) for group in groups]
    return np.asarray(np.any(marks, axis=0), np.bool_)
