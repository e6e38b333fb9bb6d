"""Times of whole programs on the target, against the one they came of."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from graphcomp.base import Progress, distributed, part, quiet
from graphcomp.budget.kernel_fit import Points
from graphcomp.budget.model import LatencyModel, cold_bytes
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.onnx import Exports, export_onnx
from graphcomp.runtime import RACE_LOADS, Target, Timer, race_timer

AT = 0.9
"""How far a plan is once all is predicted; how many networks will be timed is not known."""

RUNS, SECONDS = 40, 8.0
"""Of either network in a measurement, or seconds for both."""


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
            done = export_onnx(
                program, path, batches=(1,), provider=provider, known=self.exports, progress=told
            )
            if done.data is not None:
                raise PassError(
                    f"{name}: found {done.bytes / 2**30:.2f} GiB, expected no more than one ONNX file holds, "
                    "since whole networks are timed from memory; ask for a share of the MACs instead"
                )
            return path.read_bytes()


@dataclass(frozen=True, eq=False)
class Clock:
    """What a run times and predicts with.

    Attributes:
        target, threads: where the result will run.
        timer: measures ONNX models; None: the target's provider does.
        timed: whether the run ends with a measurement on the target.
        progress: told what is going on.
        latencies, exports: what was measured and exported before, so that nothing is done twice in a run.
    """

    target: Target
    threads: int
    timer: Timer | None
    timed: bool
    progress: Progress
    latencies: dict[str, Points]
    exports: Exports

    def model(self, program: Program) -> LatencyModel:
        """What predicts the times of a program's operators where the run's result will run."""
        cold = cold_bytes(program, self.target)
        return LatencyModel(self.target, self.threads, self.timer, self.progress, cold, self.latencies)

    def stopwatch(self, program: Program) -> Stopwatch:
        """What times programs that come of `program` where the run's result will run."""
        return Stopwatch(program, self.target, self.threads, self.timer, self.progress, self.exports)
