"""What does not pay stays as it was: channels whose removal, or factors that make the network slower.

    slower(i)  predicted time of the operators that item i of a choice touches, with it over without it, the
               rest of the choice as it is; above 1 + MARGIN it is restored, those first that cost most
    confirmed  the network as planned and the one with what was restored, timed by turns on the target; if the
               restored one is not faster there, the prediction was wrong and the plan stays

*Channels* are restored by the group. Kernels compute whole blocks, so widths in multiples of the block never
make a layer slower; what does is a width with which its operators leave the layout of the others (61 channels
of 64). That is known from the widths alone, and nothing is measured where there is none of them.

*Factors* are restored by the layer. Two thin layers take two launches and pass on what is between them, so
that neither MACs nor widths say whether they are faster than one weight: all are looked at. A layer that
also reads only a part of its channels becomes one weight that reads as little; if picking the channels is
predicted to cost more than it saves, the layer becomes what it was.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from graphcomp.base import Progress, distributed
from graphcomp.budget.allocation import Scores
from graphcomp.budget.factors import FactorCost, Factors
from graphcomp.budget.latency import Stopwatch
from graphcomp.budget.model import (
    LatencyCost,
    LatencyModel,
    Marks,
    Operator,
    Points,
    Remaining,
    cold_bytes,
    form_of,
)
from graphcomp.channels import ChannelGroup, Channels, Drop, feasible, legalise, no_drop, remove
from graphcomp.factors import Factor, rank_text, rewrite, simulate
from graphcomp.ir import Program
from graphcomp.onnx import Exports
from graphcomp.runtime import Target, Timer

Choice = TypeVar("Choice")
Item = TypeVar("Item", bound=Hashable)

Revert = Literal["auto", "always", "never"]
REVERT = (
    "groups whose removal makes the network slower on the target stay whole; auto: where the run measures "
    "times (a benchmark, or latency as the target) and widths leave the kernels' blocks; always: look at all "
    "widths, and measure in every run"
)
REVERT_FACTORS = (
    "layers that factors, or picking channels, make slower on the target stay whole; auto: where the run "
    "measures times (a benchmark); always: measure in every run"
)

MARGIN = 0.02
"""Of the time, that a prediction is not trusted to."""


@dataclass(frozen=True, eq=False)
class Paying(Generic[Choice, Item]):
    """What is left of a choice.

    Attributes:
        choice: what is done all the same.
        slower: items that were restored -> how many times longer their operators would take; both steps
            multiplied where an item went back in two.
        milliseconds: measured: the network before, as planned, with what was restored; None: not measured.
    """

    choice: Choice
    slower: dict[Item, float]
    milliseconds: tuple[float, float, float] | None = None

    def evidence(self, kind: str, name: Callable[[Item], str]) -> dict[str, Any]:
        """As JSON, the items under `kind`; nothing if nothing was measured."""
        if self.milliseconds is None:
            return {}
        names = ("before", "planned", "restored")
        items = {name(item): ratio for item, ratio in self.slower.items()}
        return {"reverted": {kind: items, "milliseconds": dict(zip(names, self.milliseconds, strict=True))}}


class Clock(Protocol):
    """What is asked of a run before anything is timed or predicted; `pipeline.Context` is one.

    Attributes:
        target, threads: where the result will run.
        timer: measures ONNX models; None: the target's provider does.
        timed: whether the run ends with a measurement on the target.
        progress: told what is going on.
        latencies, exports: what was measured and exported before, so that nothing is done twice in a run.
    """

    @property
    def target(self) -> Target: ...  # noqa: D102
    @property
    def threads(self) -> int: ...  # noqa: D102
    @property
    def timer(self) -> Timer | None: ...  # noqa: D102
    @property
    def timed(self) -> bool: ...  # noqa: D102
    @property
    def progress(self) -> Progress: ...  # noqa: D102
    @property
    def latencies(self) -> dict[str, Points]: ...  # noqa: D102
    @property
    def exports(self) -> Exports: ...  # noqa: D102


def is_asked(revert: Revert, is_timed: bool, clock: Clock) -> bool:
    """Whether to look for what does not pay.

    Args:
        revert: as asked for.
        is_timed: whether times are what this pass is for.
        clock: says whether the run measures times.
    """
    return revert == "always" or (revert == "auto" and (is_timed or clock.timed))


def latency_model(program: Program, clock: Clock) -> LatencyModel:
    """What predicts the times of a program's operators where the run's result will run."""
    cold = cold_bytes(program, clock.target)
    return LatencyModel(clock.target, clock.threads, clock.timer, clock.progress, cold, clock.latencies)


def stopwatch(program: Program, clock: Clock) -> Stopwatch:
    """What times programs that come of `program` where the run's result will run."""
    return Stopwatch(program, clock.target, clock.threads, clock.timer, clock.progress, clock.exports)


# ---------------------------------------------------------------------- predicted, and measured


def restore(
    choice: Choice,
    items: Sequence[Item],
    instead: Callable[[Choice, Item], Iterable[Choice]],
    parts: Callable[[Choice], NDArray[np.float64]],
) -> tuple[Choice, dict[Item, float]]:
    """Restore items as long as that is predicted to be faster, those first that cost most.

    Args:
        choice: as planned.
        items: that may be restored.
        instead: the choices that restore an item, the one to try first first; none if it is restored already.
        parts: predicted times by operator, as many for every choice.

    Returns:
        The choice that is left, and what was restored -> how many times slower it was predicted to be.
    """
    slower: dict[Item, float] = {}

    def ratios(item: Item) -> Iterable[tuple[float, Choice]]:
        for trial in instead(choice, item):
            now, then = parts(choice), parts(trial)  # both: a new width may have made the predictions better
            moved = now != then
            yield (float(now[moved].sum() / then[moved].sum()) if moved.any() else 1.0), trial

    while True:
        first = [max((ratio for ratio, _ in ratios(item)), default=1.0) for item in items]
        before = choice
        for _, i in sorted(((ratio, i) for i, ratio in enumerate(first)), reverse=True):
            # Compared again: others may have been restored since.
            better = next(((ratio, trial) for ratio, trial in ratios(items[i]) if ratio > 1 + MARGIN), None)
            if better is not None:
                ratio, choice = better
                slower[items[i]] = slower.get(items[i], 1.0) * ratio
        if choice is before:
            return choice, slower


def confirm(
    planned: Choice,
    restored: Choice,
    slower: dict[Item, float],
    build: Callable[[Choice], Program],
    watch: Stopwatch,
) -> Paying[Choice, Item]:
    """What was restored if that is faster on the target, otherwise what was planned.

    Raises:
        ProviderError: if the target does not work here.
    """
    before, as_planned, after = watch.times([build(planned), build(restored)])
    milliseconds = before, as_planned, after
    if after >= as_planned:
        return Paying(planned, {}, milliseconds)
    return Paying(restored, slower, milliseconds)


# ---------------------------------------------------------------------- channels


def paying(
    channels: Channels, drop: Drop, scores: Scores, revert: Revert, is_timed: bool, clock: Clock
) -> Paying[Drop, ChannelGroup]:
    """The removal without the groups that make the network slower; collective (see `distributed`).

    Args:
        channels, drop: a removal that is feasible.
        scores: which channels come back first where not all can go.
        revert: as asked for.
        is_timed: whether times are what this removal is for.

    Raises:
        ProviderError: if there is something to measure and the target does not work here.
    """
    if not is_asked(revert, is_timed, clock):
        return Paying(drop, {})
    doubtful = _doubtful(channels, drop, clock.target, every=revert == "always")
    if not doubtful:
        return Paying(drop, {})
    found = distributed.on_first(lambda: _paying(channels, drop, scores, doubtful, clock))
    return Paying(found.choice, {doubtful[i]: x for i, x in found.slower.items()}, found.milliseconds)


def _paying(
    channels: Channels, drop: Drop, scores: Scores, doubtful: Sequence[ChannelGroup], clock: Clock
) -> Paying[Drop, int]:
    """Which of the doubtful groups do not pay, by number: groups are other objects in every process."""

    def without(choice: Drop, number: int) -> Iterable[Drop]:
        group = doubtful[number]
        if choice[group.channels].any():
            trial = choice.copy()
            trial[group.channels] = False
            yield legalise(channels, trial, scores)

    only = _touched(Remaining(channels), doubtful)
    cost = LatencyCost(channels, latency_model(channels.program, clock), only)
    restored, slower = restore(drop, range(len(doubtful)), without, cost.parts)
    if not slower:
        return Paying(drop, {})
    restored, _ = feasible(channels, restored, scores)
    watch = stopwatch(channels.program, clock)
    return confirm(drop, restored, slower, lambda d: remove(channels.program, channels, d, "trial"), watch)


def group_left_alone(group: ChannelGroup, planned: Drop, ratio: float) -> str:
    """Why a group was restored."""
    kept, width = int((~planned[group.channels]).sum()), len(group.channels)
    return f"{kept} of {width} channels predicted {ratio:.2f}x slower; left alone"


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


# ---------------------------------------------------------------------- factors


def paying_factors(
    program: Program, factors: Sequence[Factor], revert: Revert, clock: Clock, multiple: int = 1
) -> Paying[Factors, str]:
    """The factors, by layer, without those that make the network slower; collective (see `distributed`).

    Args:
        program: they are for.
        factors: at most one a layer, each of which fits the program.
        revert: as asked for.
        multiple: as `factors.surgery.rewrite` is going to be told.

    Raises:
        ProviderError: if there is something to measure and the target does not work here.
    """
    planned = {factor.layer: factor for factor in factors}
    if not planned or not is_asked(revert, False, clock):
        return Paying(planned, {})
    return distributed.on_first(lambda: _paying_factors(program, planned, clock, multiple))


def _paying_factors(program: Program, planned: Factors, clock: Clock, multiple: int) -> Paying[Factors, str]:
    cost = FactorCost(program, latency_model(program, clock), planned, multiple)
    restored, slower = restore(planned, list(planned), _instead, cost.parts)
    if not slower:
        return Paying(planned, {})

    def build(chosen: Factors) -> Program:
        listed = list(chosen.values())
        return rewrite(simulate(program, listed), listed, "trial", multiple)

    return confirm(planned, restored, slower, build, stopwatch(program, clock))


def _instead(chosen: Factors, layer: str) -> Iterable[Factors]:
    """One weight that reads the same channels, then the layer as it was."""
    factor = chosen.get(layer)
    if factor is None:
        return
    if factor.rank is not None and factor.keep is not None:
        yield {**chosen, layer: factor.as_one_weight()}
    yield {other: f for other, f in chosen.items() if other != layer}


def layer_left_alone(planned: Factor, left: Factor | None, ratio: float, channels: int) -> str:
    """Why a layer was restored.

    Args:
        planned, left: what it was going to be, and what it is; None: as it was.
        ratio: how many times slower it was predicted to be.
        channels: that arrive at it.
    """
    reads = "" if planned.keep is None else f"{len(planned.keep)} of {channels} channels"
    rank = "" if planned.rank is None else f"rank {rank_text(planned)}"
    slower = f"{' with '.join(filter(None, (rank, reads)))} predicted {ratio:.2f}x slower"
    return f"{slower}; left alone" if left is None else f"{slower}; one weight that reads {reads}"
