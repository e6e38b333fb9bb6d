"""What does not pay stays as it was: channels whose removal, or factors that make the network slower.

    slower(i)  predicted time of the operators that item i of a choice touches, with it over without it, the
               rest of the choice as it is; above 1 + MARGIN it is restored, those first that cost most
    confirmed  the network as planned and the one with what was restored, timed by turns on the target; if the
               restored one is not faster there, the prediction was wrong and the plan stays

Channels are restored by the group (`restoring_groups`), factors by the layer (`restoring_factors`).
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from graphcomp.budget.stopwatch import Clock, Stopwatch
from graphcomp.ir import Program

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


def is_asked(revert: Revert, is_timed: bool, clock: Clock) -> bool:
    """Whether to look for what does not pay.

    Args:
        revert: as asked for.
        is_timed: whether times are what this pass is for.
        clock: says whether the run measures times.
    """
    return revert == "always" or (revert == "auto" and (is_timed or clock.timed))


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
