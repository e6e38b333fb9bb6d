"""Compiling to a latency: predict, build, measure, correct.

    goal   <- what was asked for
    choice <- the largest network whose predicted time is within the goal
    goal   <- asked * predicted(choice) / measured(choice)      until measured(choice) is what was asked for

All are parts of the time of the network that a pass was given. Predicted over measured is what the model is
wrong by, near the choice; where widths are so coarse that no choice is close to what was asked for, the same
choice comes again and the loop ends.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from graphcomp.budget.stopwatch import Stopwatch
from graphcomp.errors import GraphcompWarning
from graphcomp.ir import Program

Choice = TypeVar("Choice")

NEAR = 0.03
"""Measured times within this part of what was asked for are accepted."""

ROUNDS = 4


@dataclass(frozen=True)
class Trial(Generic[Choice]):
    """One round: a choice, and what part of the time it leaves.

    Attributes:
        goal: that was predicted for.
        measured: before and after, in milliseconds.
    """

    choice: Choice
    goal: float
    predicted: float
    measured: tuple[float, float]

    @property
    def ratio(self) -> float:
        """What part of the time is left, measured."""
        return self.measured[1] / self.measured[0]


def close(
    asked: float,
    propose: Callable[[float], Choice | None],
    predict: Callable[[Choice], float],
    measure: Callable[[Choice], tuple[float, float]],
) -> list[Trial[Choice]]:
    """Rounds until the measured ratio is what was asked for, or nothing new is proposed.

    Args:
        asked: part of the time that is to be left.
        propose: a choice for a goal on predictions; None if none is small enough.
        predict, measure: what part a choice leaves; milliseconds before and after.

    Returns:
        The rounds, oldest first; none if nothing is small enough.
    """
    trials: list[Trial[Choice]] = []
    goal = asked
    while len(trials) < ROUNDS:
        choice = propose(goal)
        if choice is None or any(t.choice == choice for t in trials):
            break
        trials.append(Trial(choice, goal, predict(choice), measure(choice)))
        if abs(trials[-1].ratio / asked - 1) <= NEAR:
            break
        goal = min(asked * trials[-1].predicted / trials[-1].ratio, 1.0)
    return trials


def meet(
    watch: Stopwatch,
    asked: float,
    propose: Callable[[float], Choice | None],
    predict: Callable[[Choice], float],
    build: Callable[[Choice], Program],
) -> tuple[Choice, dict[str, Any]] | None:
    """The choice that takes the time asked for, with the evidence of it; None if none is small enough.

    Args:
        watch: times what `build` makes of a choice.
        asked, propose, predict: see `close`.

    Raises:
        ExportError: if a program cannot be exported. ProviderError: if the target does not work here.
    """
    trials = close(asked, propose, predict, lambda choice: watch.race(build(choice)))
    if not trials:
        return None
    chosen = best(trials, asked)
    return chosen.choice, {"latency": evidence(asked, trials, chosen, watch.threads)}


def best(trials: list[Trial[Choice]], asked: float) -> Trial[Choice]:
    """The largest network that is as fast as was asked for; if none is, the fastest, with a warning."""
    met = [t for t in trials if t.ratio <= asked * (1 + NEAR)]
    if met:
        return max(met, key=lambda t: t.ratio)
    found = min(trials, key=lambda t: t.ratio)
    warnings.warn(
        f"target latency: measured {found.ratio:.3f} of the time after {len(trials)} rounds, expected "
        f"{asked:.3f}; this is the closest that was found: the predictions are off, or the machine is busy",
        GraphcompWarning,
        stacklevel=2,
    )
    return found


def evidence(asked: float, trials: list[Trial[Any]], chosen: Trial[Any], threads: int) -> dict[str, Any]:
    """The rounds as JSON: parts of the time, and milliseconds."""
    return {
        "asked": asked,
        "predicted": chosen.predicted,
        "measured": chosen.ratio,
        "milliseconds": list(chosen.measured),
        "threads": threads,
        "rounds": [{"goal": t.goal, "predicted": t.predicted, "measured": t.ratio} for t in trials],
    }
