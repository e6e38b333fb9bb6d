"""Compiling to a latency: predict, build, measure, correct.

    goal   <- what was asked for
    choice <- the largest network whose predicted time is within the goal
    goal   <- asked * predicted(choice) / measured(choice)      until measured(choice) is what was asked for

All are parts of the time of the network that a pass was given. Predicted over measured is what the model is
wrong by, near the choice; where widths are so coarse that no choice is close to what was asked for, the same
choice comes again and the loop ends.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import onnx

from graphcomp.base import Progress, distributed, part, quiet
from graphcomp.errors import GraphcompWarning, PassError
from graphcomp.ir import Program
from graphcomp.onnx import Exports, export_onnx
from graphcomp.runtime import RACE_LOADS, Target, Timer, race_timer

Choice = TypeVar("Choice")

NEAR = 0.03
"""Measured times within this part of what was asked for are accepted."""

ROUNDS = 4
AT = 0.9
"""How far a plan is once all is predicted; how many networks will be timed is not known."""

RUNS, SECONDS = 40, 8.0
"""Of either network in a measurement, or seconds for both."""


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
    watch: "Stopwatch",
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


@dataclass(frozen=True, eq=False)
class Stopwatch:
    """Times programs that come of one program against it, as ONNX files on the target; see `require_first`.

    Attributes:
        program: the one to compare with.
        target, threads: where both run.
        timer: measures ONNX models; the default races them on the target's provider.
        progress: told what is being exported and timed.
        exports: what the same run exported before, read and extended.
    """

    program: Program
    target: Target
    threads: int = 1
    timer: Timer | None = None
    progress: Progress = quiet
    exports: Exports = field(default_factory=Exports, repr=False)

    def race(self, other: Program) -> tuple[float, float]:
        """Milliseconds at batch 1 of the program and of the other one, by turns in one process.

        Raises:
            ExportError: if a program cannot be exported. ProviderError: if the target does not work here.
        """
        before, after = self.times([other])
        return before, after

    def times(self, others: Sequence[Program]) -> list[float]:
        """The same of the program and of several others, all by turns."""
        distributed.require_first("stopwatch")
        models = [self._base]
        for number, other in enumerate(others, 1):
            which = f" {number} of {len(others)}" if len(others) > 1 else ""
            models.append(self._exported(other, f"the trial{which}"))
        self.progress(f"time {len(models)} networks in turn", AT)
        return self._timer(models, self._feeds)

    def milliseconds(self) -> float:
        """Of the program alone."""
        distributed.require_first("stopwatch")
        (now,) = self._timer([self._base], self._feeds)
        return now

    def ratio_of(self, amount: float | str) -> float:
        """What part of the time is asked for by a fraction, or by milliseconds such as `3.5ms`."""
        if not isinstance(amount, str):
            return amount
        wanted, now = float(amount.removesuffix("ms")), self.milliseconds()
        if wanted >= now:
            raise PassError(
                f"target latency: found {now:.3g} ms before the pass, expected more than the {amount} asked "
                "for; ask for less, or leave the pass out"
            )
        return wanted / now

    @cached_property
    def _base(self) -> bytes:
        return self._exported(self.program, "the network as it came")

    @cached_property
    def _feeds(self) -> dict[str, Any]:
        names = [i.name for i in onnx.load_from_string(self._base).graph.input]
        return {n: x.numpy() for n, x in zip(names, self.program.example_inputs, strict=True)}

    @cached_property
    def _timer(self) -> Timer:
        return self.timer or race_timer(self.target.provider, self.threads, RUNS, SECONDS, RACE_LOADS)

    def _exported(self, program: Program, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            provider = None if self.timer else self.target.provider
            told = part(self.progress, AT, 0, f"export {name}: ")
            export_onnx(program, path, batches=(1,), provider=provider, known=self.exports, progress=told)
            return path.read_bytes()


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
