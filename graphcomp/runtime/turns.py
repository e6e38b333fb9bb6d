"""ONNX files that take turns: opened together, again and again, and timed in rounds A B B A."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphcomp.base import Progress, part, quiet
from graphcomp.errors import BenchError
from graphcomp.runtime import onnxfile
from graphcomp.runtime.inputs import check_inputs, random_inputs
from graphcomp.runtime.onnxfile import OnnxFile
from graphcomp.runtime.openvino import Requested
from graphcomp.runtime.precision import Precision
from graphcomp.runtime.providers import HOST, Provider, run_errors
from graphcomp.runtime.session import OpenSession, compare, open_session, probe

BUSY = 1.1
# With n loads that all point one way, chance alone does so with 2^(1-n): 6 is the least that supports 95 %.
LOADS = 6

RACE_RUNS, RACE_SECONDS, RACE_LOADS, LEAST_RACE = 100, 10.0, 4, 3
"""Runs of each model in a race, or seconds for all; and rounds at least."""

Times = NDArray[np.float64]


@dataclass(frozen=True)
class TimingBudget:
    """How long to measure: `runs` of each file or `seconds` for all, whichever ends first."""

    runs: int
    seconds: float
    warmup_runs: int = 0
    warmup_seconds: float = 0.0

    def spent(self, rounds: int, elapsed: float) -> float:
        """The share that is spent after some rounds of two runs and some seconds; 1 is all of it."""
        return min(1.0, rounds, max(2 * rounds / self.runs, elapsed / self.seconds if self.seconds else 1.0))

    def of_a_load(self, loads: int) -> "TimingBudget":
        """A part for each of the loads; all its runs of warming up."""
        runs, seconds = max(2, round(self.runs / loads)), self.seconds / loads
        return TimingBudget(runs, seconds, self.warmup_runs, self.warmup_seconds / loads)


@dataclass(frozen=True)
class Setup:
    """Where both files run, and how."""

    provider: Provider
    threads: int
    cuda_graphs: bool = False
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Samples:
    """Milliseconds of one file, ([loads,] rounds, 2): the two turns that it has in a round A B B A."""

    wall: Times
    cpu: Times

    @property
    def busy(self) -> bool:
        """Whether, at one thread, all runs together took 10 % longer than they had the processor."""
        return is_busy([self])


@dataclass(frozen=True)
class Timed:
    """What one of several files leaves behind at one batch size once its sessions are closed.

    Attributes:
        samples: its times.
        firsts: ms of the first inference after each load.
        copied: its times with copies from and to the host; null on the CPU.
        opened: its sessions, closed: how they were loaded and ran.
    """

    samples: Samples
    firsts: list[float]
    copied: Samples | None
    opened: list[OpenSession]


def _open(file: OnnxFile, setup: Setup, batch: int, feeds: Mapping[str, NDArray[Any]]) -> OpenSession:
    return open_session(
        file.path,
        setup.provider,
        setup.threads,
        shapes={name: array.shape for name, array in feeds.items()},
        cache_key=f"{file.sha256}-b{batch}-{setup.precision}",
        cuda_graphs=setup.cuda_graphs,
        precision=setup.precision,
    )


def _runner(
    provider: Provider, opened: OpenSession, feeds: Mapping[str, NDArray[Any]], path: Path
) -> "_Runner | Requested":
    if provider == "openvino":
        return Requested(opened.session, feeds, path)
    return _Runner(opened, feeds, path)


class _Runner:
    """One session with its inputs and outputs bound on the device, for one shape."""

    def __init__(self, opened: OpenSession, feeds: Mapping[str, NDArray[Any]], path: Path) -> None:
        import onnxruntime as ort

        self.path = path
        self._arrays = dict(feeds)
        self._session = opened.session
        self._binding = opened.session.io_binding()
        self._values = {
            name: ort.OrtValue.ortvalue_from_numpy(array, opened.device, 0) for name, array in feeds.items()
        }
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._outputs = [output.name for output in opened.session.get_outputs()]
        for name in self._outputs:
            self._binding.bind_output(name, opened.device)

    def first(self) -> float:
        """The first inference, in ms; its outputs become the buffers that later runs write to."""
        start = time.perf_counter_ns()
        try:
            self.run()
        except run_errors() as error:
            raise BenchError(
                f"{self.path}: found an error when run ({error}), expected an output; export it again"
            ) from error
        elapsed = (time.perf_counter_ns() - start) / 1e6
        for name, value in zip(self._outputs, self._binding.get_outputs(), strict=True):
            self._binding.bind_ortvalue_output(name, value)
        return elapsed

    def run(self) -> None:
        """One inference, finished when it returns."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def run_end_to_end(self) -> None:
        """One inference with its inputs copied from the host and its outputs back to it."""
        for name, array in self._arrays.items():
            self._values[name].update_inplace(array)
        self.run()
        self._binding.copy_outputs_to_cpu()


def race(
    models: Sequence[bytes],
    feeds: Mapping[str, NDArray[Any]],
    provider: Provider,
    threads: int = 1,
    *,
    runs: int = RACE_RUNS,
    seconds: float = RACE_SECONDS,
    loads: int = RACE_LOADS,
    before_each: Callable[[], object] = lambda: None,
) -> list[float]:
    """Median times in ms of several ONNX models that take the same inputs, run in turn.

    Loaded `loads` times in alternating order, `runs` of each or `seconds` for all, whichever ends first, but
    never fewer than six; `before_each` of them is called, untimed. CPU time on one CPU thread, else wall
    time. For choosing between forms of one network, not for quoting.
    Raises ProviderError and BenchError.
    """
    budget, least = TimingBudget(runs, seconds).of_a_load(loads), math.ceil(LEAST_RACE / loads)
    is_cpu = provider in HOST and threads == 1

    def one_load(number: int) -> list[Times]:
        order = _order(len(models), number)
        shapes = {name: array.shape for name, array in feeds.items()}
        opened = {index: open_session(models[index], provider, threads, shapes=shapes) for index in order}
        runners = [_runner(provider, opened[index], feeds, Path("candidate")) for index in range(len(models))]
        for index in order:
            runners[index].first()
            runners[index].run()
        samples = _take_turns(
            [runner.run for runner in runners],
            order,
            threads,
            lambda rounds, elapsed: min(budget.spent(rounds, elapsed), rounds / least),
            before_each,
        )
        return [one.cpu if is_cpu else one.wall for one in samples]

    taken = [one_load(number) for number in range(loads)]
    return [float(np.median(np.concatenate(each))) for each in zip(*taken, strict=True)]


def in_turn(
    files: Sequence[Path],
    *,
    provider: Provider = "cpu",
    batch: int = 1,
    threads: int = 1,
    runs: int = 200,
    seconds: float = 10.0,
    warmup_seconds: float = 1.0,
    seed: int = 0,
) -> list[Samples]:
    """Time any number of ONNX files side by side, loaded six times, in rounds A B C C B A.

    Times of two of them are what `ratio_interval` takes, whichever two. `runs` of each or `seconds` for all,
    whichever ends first, but never less than a round a load, after `warmup_seconds` of each. Inputs are drawn
    from `seed`. Raises BenchError if the files differ in their inputs, ProviderError.
    """
    read = [onnxfile.read(file) for file in files]
    for other in read[1:]:
        check_inputs(read[0], other)
    probe(provider, threads)
    budget, feeds = TimingBudget(runs, seconds, 2, warmup_seconds), random_inputs(read[0], batch, seed)
    timed = time_files(read, Setup(provider, threads), batch, feeds, budget, quiet)
    return [one.samples for one in timed]


def time_files(
    files: Sequence[OnnxFile],
    setup: Setup,
    batch: int,
    feeds: Mapping[str, NDArray[Any]],
    budget: TimingBudget,
    report: Progress,
) -> list[Timed]:
    """Every file, loaded again and again with all the others; no more than one session of each at a time."""
    loads: list[list[Timed]] = []
    for number in range(LOADS):
        rounds = len(loads[0][0].samples.wall) if loads else None
        told = part(report, number / LOADS, 1 / LOADS)
        loads.append(_time_load(files, setup, batch, feeds, budget.of_a_load(LOADS), number, rounds, told))
    return [_joined([load[index] for load in loads]) for index in range(len(files))]


def _time_load(
    files: Sequence[OnnxFile],
    setup: Setup,
    batch: int,
    feeds: Mapping[str, NDArray[Any]],
    budget: TimingBudget,
    number: int,
    rounds: int | None,
    report: Progress,
) -> list[Timed]:
    """One load of every file: as many `rounds`, or what the budget allows."""
    order = _order(len(files), number)
    opened = {index: _open(files[index], setup, batch, feeds) for index in order}
    runners = [_runner(setup.provider, opened[i], feeds, file.path) for i, file in enumerate(files)]
    if (setup.provider == "openvino" or setup.precision != "fp32") and number == 0:
        for index, file in enumerate(files):
            compare(file, opened[index], feeds, setup.precision)
    firsts = {index: runners[index].first() for index in order}
    _warm_up([runners[index] for index in order], budget, report)

    def spent(what: str, done: int, elapsed: float) -> float:
        share = budget.spent(done, elapsed) if rounds is None else done / rounds
        report(what, share)
        return share

    samples = _take_turns([r.run for r in runners], order, setup.threads, partial(spent, "timing"))
    copied: Sequence[Samples | None] = [None] * len(files)
    if setup.provider not in HOST:
        steps = [r.run_end_to_end for r in runners]
        copied = _take_turns(steps, order, setup.threads, partial(spent, "timing with copies"))
    return [
        Timed(samples[i], [firsts[i]], copied[i], [replace(opened[i], session=None)])
        for i in range(len(files))
    ]


def _order(count: int, number: int) -> list[int]:
    """Of files in a load: each is first as often as last in any two loads, and all get to be it."""
    first = number // 2 % count
    order = [*range(first, count), *range(first)]
    return order[::-1] if number % 2 else order


def _joined(loads: Sequence[Timed]) -> Timed:
    copied = [load.copied for load in loads if load.copied is not None]
    return Timed(
        _stacked([load.samples for load in loads]),
        [first for load in loads for first in load.firsts],
        _stacked(copied) if copied else None,
        [one for load in loads for one in load.opened],
    )


def _stacked(loads: Sequence[Samples]) -> Samples:
    return Samples(np.stack([one.wall for one in loads]), np.stack([one.cpu for one in loads]))


def _take_turns(
    steps: Sequence[Callable[[], None]],
    order: Sequence[int],
    threads: int,
    spent: Callable[[int, float], float],
    before_each: Callable[[], object] = lambda: None,
) -> list[Samples]:
    """Times of every step, (rounds, 2), in rounds A B C C B A until all is spent.

    Args:
        steps: what to time.
        order: their indices, as they take turns.
        threads: of one the thread's own CPU time is taken, of more the process's.
        spent: the share that is spent after some rounds and seconds, from 1 on all of it; asked between
            rounds.
        before_each: called before each turn, not timed.
    """
    clock = time.thread_time_ns if threads == 1 else time.process_time_ns
    wall: list[list[int]] = [[] for _ in steps]
    cpu: list[list[int]] = [[] for _ in steps]
    rounds, start = 0, time.perf_counter()
    with _no_garbage_collection():
        while spent(rounds, time.perf_counter() - start) < 1:
            for index in (*order, *reversed(order)):
                before_each()
                cpu_start, wall_start = clock(), time.perf_counter_ns()
                steps[index]()
                wall_end, cpu_end = time.perf_counter_ns(), clock()
                wall[index].append(wall_end - wall_start)
                cpu[index].append(cpu_end - cpu_start)
            rounds += 1
    return [Samples(_in_rounds(w), _in_rounds(c)) for w, c in zip(wall, cpu, strict=True)]


def _in_rounds(times: Sequence[int]) -> Times:
    """Nanoseconds as ms, (rounds, 2)."""
    return np.asarray(times, np.float64).reshape(-1, 2) / 1e6


def _warm_up(runners: Sequence["_Runner | Requested"], budget: TimingBudget, report: Progress) -> None:
    for index, runner in enumerate(runners):
        start, done = time.perf_counter(), 0
        while done < budget.warmup_runs or time.perf_counter() - start < budget.warmup_seconds:
            runner.run()
            done += 1
        report("warming up", (index + 1) / len(runners))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_busy(samples: Sequence[Samples]) -> bool:
    """Whether all runs together took 10 % longer than they had the processor: medians would hide stalls."""
    return bool(sum(one.wall.sum() for one in samples) > BUSY * sum(one.cpu.sum() for one in samples))
