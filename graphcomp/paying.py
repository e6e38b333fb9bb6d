"""Removals that do not pay: a group of channels whose removal makes the network slower stays whole.

    slower(g)  predicted time of the operators that g's channels touch, without them over with them, the rest
               of the removal as it is; above 1 + MARGIN the group is restored, those first that cost most
    confirmed  the network as planned and the one with what was restored, timed by turns on the target; if the
               restored one is not faster there, the prediction was wrong and the plan stays

Kernels compute whole blocks, so widths in multiples of the block never make a layer slower; what does is a
width with which its operators leave the layout of the others (61 channels of 64). That is known from the
widths alone, and nothing is measured where there is none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphcomp.allocation import Scores
from graphcomp.channels import ChannelGroup, Channels
from graphcomp.closing import Stopwatch
from graphcomp.latency import LatencyCost, LatencyModel, Marks, Operator, Remaining, cold_bytes, form_of
from graphcomp.pipeline import Context
from graphcomp.surgery import Drop, feasible, legalise, no_drop, remove
from graphcomp.targets import Target

Revert = Literal["auto", "always", "never"]
REVERT = (
    "groups whose removal makes the network slower on the target stay whole; auto: where the run measures "
    "times (a benchmark, or latency as the target) and widths leave the kernels' blocks; always: look at all "
    "widths, and measure in every run"
)

MARGIN = 0.02
"""Of the time, that a prediction is not trusted to."""


@dataclass(frozen=True, eq=False)
class Paying:
    """What is left of a removal.

    Attributes:
        drop: the channels that go all the same.
        slower: groups that were restored -> how many times longer their operators would take.
        milliseconds: measured: the network before, as planned, with what was restored; None: not measured.
    """

    drop: Drop
    slower: dict[ChannelGroup, float]
    milliseconds: tuple[float, float, float] | None = None

    def reason(self, group: ChannelGroup, planned: Drop) -> str:
        """Why a group was left alone."""
        kept, width = int((~planned[group.channels]).sum()), len(group.channels)
        return f"{kept} of {width} channels predicted {self.slower[group]:.2f}x slower; left alone"

    @property
    def evidence(self) -> dict[str, Any]:
        """As JSON; nothing if nothing was measured."""
        if self.milliseconds is None:
            return {}
        names = ("before", "planned", "restored")
        groups = {group.name: ratio for group, ratio in self.slower.items()}
        return {
            "reverted": {"groups": groups, "milliseconds": dict(zip(names, self.milliseconds, strict=True))}
        }


def paying(
    channels: Channels, drop: Drop, scores: Scores, revert: Revert, is_timed: bool, context: Context
) -> Paying:
    """The removal without the groups that make the network slower.

    Args:
        channels, drop: a removal that is feasible.
        scores: which channels come back first where not all can go.
        revert: as asked for.
        is_timed: whether times are what this removal is for.

    Raises:
        ProviderError: if there is something to measure and the target does not work here.
    """
    if revert == "never" or (revert == "auto" and not (is_timed or context.timed)):
        return Paying(drop, {})
    doubtful = _doubtful(channels, drop, context.target, every=revert == "always")
    if not doubtful:
        return Paying(drop, {})
    cold = cold_bytes(channels.program, context.target)
    model = LatencyModel(context.target, context.threads, context.timer, context.progress, cold)
    only = _touched(Remaining(channels), doubtful)
    restored, slower = _restore(channels, drop, scores, doubtful, LatencyCost(channels, model, only))
    if not slower:
        return Paying(drop, {})
    restored, _ = feasible(channels, restored, scores)
    watch = Stopwatch(channels.program, context.target, context.threads, context.timer)
    before, planned, after = watch.times(
        [remove(channels.program, channels, d, "trial") for d in (drop, restored)]
    )
    if after >= planned:
        return Paying(drop, {}, (before, planned, after))
    return Paying(restored, slower, (before, planned, after))


def _doubtful(channels: Channels, drop: Drop, target: Target, every: bool) -> list[ChannelGroup]:
    """The groups that lost channels and touch an operator that left the layout; or all that lost some."""
    touched = [g for g in channels.groups if drop[g.channels].any() and not g.derived]
    if every:
        return touched
    remaining = Remaining(channels)
    pairs = zip(remaining.operators(no_drop(channels)), remaining.operators(drop), strict=True)
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


def _restore(
    channels: Channels, drop: Drop, scores: Scores, groups: Sequence[ChannelGroup], cost: LatencyCost
) -> tuple[Drop, dict[ChannelGroup, float]]:
    """Restore groups as long as that is predicted to be faster, those first that cost most."""
    slower: dict[ChannelGroup, float] = {}

    def without(group: ChannelGroup) -> tuple[Drop, float]:
        """The removal without a group, and how many times longer its operators take with it."""
        trial = drop.copy()
        trial[group.channels] = False
        trial = legalise(channels, trial, scores)
        now, then = cost.parts(drop), cost.parts(trial)
        moved = now != then
        return trial, float(now[moved].sum() / then[moved].sum()) if moved.any() else 1.0

    while True:
        left = [group for group in groups if group not in slower]
        found = sorted(((without(group)[1], i) for i, group in enumerate(left)), reverse=True)
        before = len(slower)
        for _, i in found:
            trial, ratio = without(left[i])  # again: others may have been restored since
            if ratio > 1 + MARGIN:
                drop, slower[left[i]] = trial, ratio
        if len(slower) == before:
            return drop, slower
