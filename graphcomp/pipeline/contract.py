"""What a pass is, what it may look at, and what it leaves: plans, contexts, strategies."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from graphcomp.base import Progress, part, quiet
from graphcomp.budget import Clock, Points
from graphcomp.data import Data
from graphcomp.errors import DataError, PassError
from graphcomp.ir import Program
from graphcomp.measure import Request, Statistic, calibrate, drift, first_inputs, score, snapshot
from graphcomp.onnx import Exports, Timing
from graphcomp.pipeline.accounting import Concern
from graphcomp.records import Drift, Fit, Plan, Quantized, Score, Snapshot, Step, Training
from graphcomp.runtime import Target, Timer, memory

DRIFT_SAMPLES = 250
DRIFT_OF_NOISE = 16
"""Samples that tell how far outputs moved; of noise one sample says what the others do."""


@dataclass(frozen=True)
class Earlier:
    """A program that a run came by: what it began with, or what one of its passes yielded.

    Attributes:
        name: the pass's, "input" for the first.
        load: reads it back, or hands it out; collective (see `distributed`).
    """

    name: str
    load: Callable[[], Program] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Context:
    """What a pass may look at while it plans.

    Attributes:
        target: where the result will run.
        data: calibration (`train`) and evaluation (`eval`) data; None if the user gave none.
        seed: of everything random.
        progress: called with a message and a fraction in [0, 1].
        workdir: where passes that take long keep their state, each in a folder of its own; None: nowhere.
        statistics: what was collected, by content; so that nothing is computed twice in a run.
        latencies: times of kernels that were measured, by content, for the same reason.
        exports: what was exported, for the same reason.
        momenta: what the optimiser of the last training remembers, by `parameter#what`; a training goes on
            from it and leaves its own there. None: every training begins anew.
        threads: that the result will run with, where times are targets.
        timer: measures ONNX models for such passes; None: the target's provider does.
        timed: whether the run ends with a measurement on the target, so that passes may measure as well.
        memory: bytes of activations and sums that a pass may hold at once, beside the network and a batch on
            its way through it; a quarter of the machine's. More activations and finished sums lie in files,
            more sums under way take another pass over the data.
        earlier: what the run began with, and what each pass before this one yielded: number i is step i.
    """

    target: Target
    data: Data | None = None
    seed: int = 0
    progress: Progress = quiet
    workdir: Path | None = None
    statistics: dict[str, Statistic] = field(default_factory=dict, repr=False, compare=False)
    latencies: dict[str, Points] = field(default_factory=dict, repr=False, compare=False)
    exports: Exports = field(default_factory=Exports, repr=False, compare=False)
    momenta: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    threads: int = 1
    timer: Timer | None = None
    timed: bool = False
    memory: int = field(default_factory=lambda: memory() // 4, compare=False)
    earlier: tuple[Earlier, ...] = field(default=(), repr=False, compare=False)

    def holding(self, memory: int | None) -> "Context":
        """The context with another `memory`; None: with its own."""
        return self if memory is None else replace(self, memory=memory)

    @property
    def clock(self) -> Clock:
        """What times and predictions are made with."""
        return Clock(
            self.target, self.threads, self.timer, self.timed, self.progress, self.latencies, self.exports
        )

    def evaluate(self, program: Program) -> Score | None:
        """The score on the evaluation data, None if they say nothing; collective (see `distributed`)."""
        return None if self.data is None else score(program, self.data.eval, shared=True)

    def snapshot(self, program: Program) -> Snapshot:
        """What a program costs and how good it is on the evaluation data; collective."""
        return snapshot(program, self.evaluate(program))

    def drift(self, before: Program, after: Program) -> Drift | None:
        """How far outputs moved on calibration data; None if nothing changed, or there is no data."""
        if after is before or self.data is None:
            return None
        random = self.data.spec.partition("?")[0] == "random"
        return drift(
            before, after, first_inputs(self.data.train, DRIFT_OF_NOISE if random else DRIFT_SAMPLES)
        )

    def collect(
        self, program: Program, requests: Iterable[Request], samples: int | None = None
    ) -> dict[Request, Statistic]:
        """Statistics of activations over the first `samples` of the calibration data (default: all).

        One pass over the data for all requests, none for what was asked before of an equal program; see
        `measure.calibrate.collect`.

        Raises:
            DataError: if there is no data, or not enough. AnalysisError: no such node or dimension.
        """
        if self.data is None:
            raise DataError("calibration: found no data, expected samples; give --data")
        return calibrate.collect(
            program,
            self.data.train,
            requests,
            samples=samples,
            memory=self.statistics,
            progress=self.progress,
        )


@dataclass(frozen=True)
class Outlook:
    """What is known of a pass's input before any pass runs.

    Attributes:
        program: the network as it came, but for what the passes before certainly change of its structure.
        context: the data, and the steps before by name.
        names: whether layers are still called as in `program`.
        plain: whether they are still plain convolutions and linear layers, called as often.
        untrained: the steps (0: the run's input) whose weights are known to be random.
    """

    program: Program
    context: Context
    names: bool = True
    plain: bool = True
    untrained: frozenset[int] = frozenset()


@runtime_checkable
class Demanding(Protocol):
    """A pass that not every network, data or place in a recipe suits."""

    def require(self, outlook: Outlook) -> None:
        """Raise a GraphcompError if the pass cannot work; quickly, and without looking at samples."""
        ...


@runtime_checkable
class Foreseen(Protocol):
    """A pass of which is known beforehand what it leaves; of others nothing is, but that it has weights."""

    def foresee(self, outlook: Outlook) -> Outlook:
        """What holds after the pass, but for the steps: whatever is not certain must not be claimed."""
        ...


class Pass(Protocol):
    """One method. Implementations are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide, from the program and the context; change nothing."""
        ...

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Change values: the same graph with the same shapes."""
        ...

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Change structure: a smaller graph with the same function as the simulated `program`."""
        ...


@runtime_checkable
class TrainingPass(Pass, Protocol):
    """A pass that changes values by learning from data, for which a plan is not enough."""

    def train(self, program: Program, plan: Plan, context: Context) -> tuple[Program, Training | Fit]:
        """Take the place of `simulate`: the same graph with the same shapes, and how it came to be."""
        ...


@runtime_checkable
class ExportingPass(Pass, Protocol):
    """A pass that is carried out on the file of the result and leaves the program as it is: the last one.

    What it decides is known once the file is there; then it takes the place of what `plan` said.
    """

    def export(
        self, program: Program, file: Path, out: Path, plan: Plan, context: Context, timing: Timing | None
    ) -> tuple[Plan, Quantized]:
        """Write another form of the program's ONNX file `file` to `out`, or nothing where it does not pay.

        `timing`: how the two are raced; None: they are not, and `out` is written.
        """
        ...


@runtime_checkable
class Reshaping(Protocol):
    """A pass that writes a network in another form, and changes nothing of what it computes.

    What learns from an earlier program has to read that one in the same form, so it is carried out there as
    well; and such a pass is none from which accuracy could be lost.
    """

    def follow(self, program: Program, plan: Plan) -> Program:
        """Carry the plan out on a program before the one that it was made for: where that still has what the
        plan names, and nowhere else.
        """
        ...


@runtime_checkable
class KeepingRows(Protocol):
    """A pass after which every layer has the output channels that it had, in the same order, whatever else.

    Of passes that do not say so the plans are carried out to see where channels went (see `refit`).
    """

    @property
    def keeps_rows(self) -> bool:
        """True; a class variable of most."""
        ...


@dataclass(frozen=True)
class Course:
    """How a pass over several rounds went so far: all that its decisions may go by, so that it resumes.

    Attributes:
        plan: what was decided before the first round.
        start: the program as it came.
        seconds: that `plan` and `start` took.
        rounds: finished ones, oldest first. Accuracies are those on held-out training samples.
    """

    plan: Plan
    start: Snapshot
    seconds: float = 0.0
    rounds: tuple[Step, ...] = ()

    @property
    def snapshots(self) -> list[Snapshot]:
        """The program as it came, and after round 1, 2, …"""
        return [self.start, *(step.after for step in self.rounds)]


class Strategy(Protocol):
    """A method that goes over several rounds. It emits ordinary passes, each of which is run and verified as
    any other, and says the result of which round is its own: taking a round back is naming an earlier one.
    """

    @property
    def name(self) -> str:
        """Of the pass."""
        ...

    @property
    def held_out(self) -> float:
        """Fraction of the training data that no round learns from, and by which all are judged."""
        ...

    @property
    def most_rounds(self) -> int:
        """There will not be more: for progress."""
        ...

    @property
    def keeps_momenta(self) -> bool:
        """Whether a training goes on from what the optimiser of the one before it remembers."""
        ...

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide and measure what has to be known before the first round; `context` holds the data that
        rounds see: its evaluation data are held-out training samples.
        """
        ...

    def next_pass(self, course: Course) -> Pass | None:
        """The pass of the next round, None at the end."""
        ...

    def result(self, course: Course) -> int:
        """After which round the program is the result, 0: as it came. Never before an earlier answer."""
        ...

    def ending(self, course: Course) -> str:
        """Why there is no next round: a few words for the summary."""
        ...


@runtime_checkable
class Concerned(Protocol):
    """A pass that says what it works on; the pipeline adds to `kept` what it neither changes nor keeps."""

    @property
    def concern(self) -> Concern:
        """See `pipeline.accounting`; a class variable of most."""
        ...


@runtime_checkable
class IterativePass(Pass, Protocol):
    """A pass that may go over several rounds."""

    @property
    def iteration(self) -> Strategy | None:
        """How; None if this one is a single step as any other pass."""
        ...


NEED_NO_LABELS = "l1, pfa, apoz, obs, low-rank, dct and refit need none"
"""What can be done with data that say nothing of what is right; `tests/pipeline/test_order.py` runs them."""


def require_data(name: str, context: Context, *, labels: bool = False) -> Data:
    """The data of a pass; DataError if it has none, or none with classes as labels if it needs these."""
    data = context.data
    if data is None:
        raise DataError(f"{name}: found no data, expected samples; give --data")
    if labels and (not data.labelled or data.regression):
        found = "data without labels" if not data.labelled else "values as labels"
        raise DataError(
            f"{name}: found {found}, expected a class for every sample; give labelled --data "
            f"({NEED_NO_LABELS})"
        )
    return data


def require_trained(name: str, outlook: Outlook, what: str) -> None:
    """PassError if decisions would be made by the accuracy of random weights."""
    if len(outlook.context.earlier) - 1 in outlook.untrained:
        raise PassError(
            f"{name}: found random weights, expected trained ones, since {what}; give --weights, or train "
            "first (finetune)"
        )


def held(name: str, program: Program) -> Earlier:
    """A program in memory."""
    return Earlier(name, lambda: program)


def within(context: Context, prefix: str, start: float, share: float) -> Context:
    """The context, with its progress in a part of the bar."""
    return replace(context, progress=part(context.progress, start, share, prefix))


def work_name(index: int, name: str) -> str:
    """What the files and folders of a pass are called."""
    return f"{index + 1:02d}-{name}"
