"""Baseline against candidate: two ONNX files timed by turns in one process.

Both sessions are open at once and run A B B A, so that drift of the machine (clock, temperature,
neighbours) falls on both alike. Where its buffers happen to lie makes a session one or two per cent faster or
slower for as long as it is open, and opening it second makes it faster; so both are loaded six times, in
alternating order, and each time that order is also the order of the turns. The estimate is the ratio of
medians over all of that; its 95 % interval is a bootstrap over loads and, within each, over whole A B B A
rounds, which keeps the pairing. If the interval contains 1 there is no measurable difference.

Time is wall time beside CPU time: at one thread the calling thread's own, otherwise the whole process's.
Where wall time exceeds CPU time by more than 10 % at one thread, something else had the core: the machine
is busy and the verdict is taken from CPU time.

Written to be run on CUDA and TensorRT as well, but **not yet run on a GPU**.
"""

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
from rich.table import Table
from rich.text import Text

from graphcomp import records
from graphcomp.base import Progress, part, quiet
from graphcomp.errors import BenchError
from graphcomp.runtime import doctor, onnxfile
from graphcomp.runtime.onnxfile import OnnxFile, onnx_macs
from graphcomp.runtime.session import OpenSession, Provider, open_session, probe, run_errors

__all__ = [
    "NO_DIFFERENCE",
    "benchmark",
    "check_inputs",
    "format_table",
    "in_turn",
    "onnx_macs",
    "race",
    "random_inputs",
    "ratio_interval",
    "sweep_table",
    "verdict",
]

NO_DIFFERENCE = "no measurable difference"
BUSY = 1.1
RESAMPLES = 2000
# With n loads that all point one way, chance alone does so with 2^(1-n): 6 is the least that supports 95 %.
LOADS = 6

RACE_RUNS, RACE_SECONDS, RACE_LOADS, LEAST_RACE = 100, 10.0, 4, 3
"""Runs of each model in a race, or seconds for all; and rounds at least."""

DTYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "DOUBLE": np.float64,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}

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


@dataclass(frozen=True)
class Samples:
    """Milliseconds of one file, ([loads,] rounds, 2): the two turns that it has in a round A B B A."""

    wall: Times
    cpu: Times

    @property
    def busy(self) -> bool:
        """Whether, at one thread, all runs together took 10 % longer than they had the processor."""
        return _busy([self])


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


def benchmark(
    base: str | Path,
    new: str | Path,
    *,
    provider: Provider = "cpu",
    batches: Sequence[int] = (1,),
    threads: int = 1,
    runs: int = 200,
    seconds: float = 10.0,
    warmup_runs: int = 10,
    warmup_seconds: float = 1.0,
    seed: int = 0,
    cuda_graphs: bool = False,
    progress: Progress | None = None,
) -> records.Bench:
    """Time two ONNX files against each other at every batch size.

    For each batch both files are loaded six times, run once (their own column), warmed up for `warmup_runs`
    (and all times together for `warmup_seconds`) each, and timed until `runs` of each or `seconds` for both,
    whichever comes first, but never less than one A B B A round a load: six support an interval. `threads`
    is the intra-op count. Inputs are drawn from `seed`. `cuda_graphs`: see `open_session`; the record says so
    among the provider's options. `progress(what, fraction)` is called between rounds, with the fraction of
    that phase.

    Writes nothing (TensorRT's engine cache excepted). Raises BenchError if a file cannot be read, the two
    differ in their inputs, a batch does not fit, or a run fails; ProviderError if the provider does not
    work here.
    """
    budget = TimingBudget(runs, seconds, warmup_runs, warmup_seconds)
    _check_options(budget, batches)
    setup = Setup(provider, threads, cuda_graphs)
    files = onnxfile.read(Path(base)), onnxfile.read(Path(new))
    check_inputs(*files)
    macs = {batch: _macs(files, batch) for batch in batches}
    # Besides proving the provider, this pays for what happens once a process: no file's first run should.
    probe(provider, threads, cuda_graphs=cuda_graphs)
    found = []
    for batch in batches:
        report = _throttle(progress, f"batch {batch}")
        found.append(_time(files, setup, batch, random_inputs(files[0], batch, seed), budget, report))
    # A GPU's host thread waits by design, and several threads have no one CPU clock to compare with.
    comparable = provider == "cpu" and threads == 1
    pairs = zip(batches, found, strict=True)
    opened = found[0][0].opened[0]
    models = [_model_file(file, one.opened) for file, one in zip(files, found[0], strict=True)]
    return records.Bench(
        provider=provider,
        provider_options=opened.provider_options,
        threads=threads,
        tf32=opened.tf32,
        base=models[0],
        new=models[1],
        batches=[_judge(one[0], one[1], comparable, batch, macs[batch], seed) for batch, one in pairs],
        environment=doctor.environment(),
    )


def ratio_interval(base: Times, new: Times, *, seed: int = 0) -> records.Interval:
    """Median of `base` over median of `new`, with the percentile bootstrap's 95 % interval.

    Both are (loads, rounds, 2), or (rounds, 2) of a single load, and row r of a load is the same A B B A
    round: loads and, within each, rounds are resampled whole, so that what slowed one down slows both sides
    of the ratio. Raises BenchError if the shapes differ or a median is not positive.
    """
    if base.shape != new.shape or base.ndim not in (2, 3):
        raise BenchError(
            f"samples: found shapes {base.shape} and {new.shape}, expected the same (loads, rounds, 2); "
            "pair them by round"
        )
    medians = float(np.median(base)), float(np.median(new))
    if min(medians) <= 0:
        raise BenchError(
            f"clock: found a median of {min(medians)} ms, expected more than 0; "
            "the clock is too coarse for this model, use a larger batch"
        )
    base, new = (one.reshape(-1, *one.shape[-2:]) for one in (base, new))
    ratios = np.concatenate(list(_resampled_ratios(base, new, np.random.default_rng(seed))))
    low, high = np.percentile(ratios, (2.5, 97.5))
    return records.Interval(value=medians[0] / medians[1], low=float(low), high=float(high))


def _resampled_ratios(base: Times, new: Times, rng: np.random.Generator) -> Iterator[Times]:
    """RESAMPLES ratios of medians over loads and rounds drawn with replacement, some at a time for memory."""
    loads, rounds, _ = base.shape
    for left in range(RESAMPLES, 0, -(step := max(1, 500_000 // (loads * rounds)))):
        size = min(step, left)
        chosen = rng.integers(loads, size=(size, loads, 1)), rng.integers(rounds, size=(size, loads, rounds))
        top, bottom = (np.median(side[chosen], axis=(1, 2, 3)) for side in (base, new))
        # A clock may stand still for most of a resample though not for most of the sample.
        yield top / np.maximum(bottom, np.finfo(np.float64).tiny)


def verdict(wall: records.Interval, cpu: records.Interval, busy: bool) -> str:
    """'faster', 'slower' or 'no measurable difference'; from CPU time, and saying so, on a busy machine."""
    speedup = cpu if busy else wall
    word = "faster" if speedup.low > 1 else "slower" if speedup.high < 1 else NO_DIFFERENCE
    return f"{word} (by CPU time: the machine was busy)" if busy else word


def format_table(bench: records.Bench) -> Table:
    """The result as a table that fits 80 columns: times of both models, and below them one line a batch."""
    plural = "s" if bench.threads > 1 else ""
    where = f"{bench.provider}, {bench.threads} thread{plural}, {bench.environment.cpu}"
    files = f"base {Path(bench.base.path).name}, new {Path(bench.new.path).name}"
    end_to_end = any(row.base.end_to_end_median_ms is not None for row in bench.batches)
    table = Table(
        title=Text(f"Time per run in ms ({where}, {bench.environment.isa})\n{files}"),
        caption=Text("\n".join(_line(row) for row in bench.batches)),
        caption_justify="left",
    )
    table.add_column("batch", justify="right")
    table.add_column("model")
    for name in ("runs", "first", "median", "p90", "p99", "CPU", *(["end to end"] if end_to_end else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in bench.batches:
        table.add_row(str(row.batch), "base", *_cells(row.base, end_to_end))
        table.add_row("", "new", *_cells(row.new, end_to_end), end_section=True)
    return table


def sweep_table(benches: Sequence[records.Bench]) -> Table:
    """Speedup by batch size, theory beside what every provider measured: one line a batch.

    All are of the same two files and the same batch sizes. A busy machine's speedup is that of CPU time.
    """
    table = Table(title="Speedup by batch size", caption=Text(_marks(benches)), caption_justify="left")
    for name in ("batch", "by MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in benches:
        table.add_column(f"{one.provider}, 95 % interval", justify="right")
        table.add_column("of theory", justify="right", no_wrap=True)
    for rows in zip(*(one.batches for one in benches), strict=True):
        cells = [str(rows[0].batch), f"{rows[0].theoretical:.2f}x"]
        for row in rows:
            quoted = row.quoted
            mark = " *" if row.busy else ""
            cells += [f"{_interval(quoted)}{mark}", f"{quoted.value / row.theoretical:.0%}"]
        table.add_row(*cells)
    return table


def _marks(benches: Sequence[records.Bench]) -> str:
    busy = any(row.busy for one in benches for row in one.batches)
    return "* CPU time: the machine was busy" if busy else ""


def _line(row: records.BatchTiming) -> str:
    """One batch in words."""
    wall, cpu = _interval(row.speedup), _interval(row.cpu_speedup)
    return (
        f"batch {row.batch}: {wall} in wall time, {cpu} in CPU time, "
        f"{row.theoretical:.2f}x by MACs: {row.verdict}"
    )


def _cells(stats: records.TimingStats, end_to_end: bool) -> list[str]:
    times = [stats.first_ms, stats.median_ms, stats.p90_ms, stats.p99_ms, stats.cpu_median_ms]
    if end_to_end and stats.end_to_end_median_ms is not None:
        times.append(stats.end_to_end_median_ms)
    return [str(stats.runs), *(f"{value:.3f}" for value in times)]


def _interval(speedup: records.Interval) -> str:
    return f"{speedup.value:.3f}x [{speedup.low:.3f}, {speedup.high:.3f}]"


def _check_options(budget: TimingBudget, batches: Sequence[int]) -> None:
    if not batches or min(batches) < 1:
        raise BenchError(f"batches: found {list(batches)}, expected one or more sizes of at least 1")
    for name, value, least in (
        ("runs", budget.runs, 1),
        ("seconds", budget.seconds, 0),
        ("warmup_runs", budget.warmup_runs, 0),
        ("warmup_seconds", budget.warmup_seconds, 0),
    ):
        if not value >= least:
            raise BenchError(f"{name}: found {value}, expected at least {least}")


def check_inputs(base: OnnxFile, new: OnnxFile) -> None:
    """Both files must take the same inputs; a batch fixed on one side only is for `_macs` to judge."""
    left, right = (
        {item.name: (item.dtype, item.shape[1:], len(item.shape)) for item in file.inputs}
        for file in (base, new)
    )
    if left != right:
        raise _mismatch(base, new)


def _mismatch(base: OnnxFile, new: OnnxFile) -> BenchError:
    left, right = (", ".join(map(str, file.inputs)) for file in (base, new))
    return BenchError(
        f"inputs: found {left} in {base.path} and {right} in {new.path}, expected the same names, types and "
        "sizes; compare exports of the same task"
    )


def _macs(files: tuple[OnnxFile, OnnxFile], batch: int) -> tuple[int, int]:
    """MACs of both files at `batch`, having made sure that both take it."""
    left, right = (onnxfile.feed_shapes(file.inputs, batch, str(file.path)) for file in files)
    if left != right:
        raise _mismatch(*files)
    base, new = (onnxfile.count_macs(file, batch) for file in files)
    if new == 0:
        raise BenchError(
            f"{files[1].path}: found no convolution or matrix product, expected at least one; "
            "there is nothing to compare"
        )
    return base, new


def random_inputs(file: OnnxFile, batch: int, seed: int) -> dict[str, NDArray[Any]]:
    """Standard normal floats, and zeros and ones for other types, which are valid indices and masks."""
    rng = np.random.default_rng(seed)
    shapes = onnxfile.feed_shapes(file.inputs, batch, str(file.path))
    feeds: dict[str, NDArray[Any]] = {}
    for item in file.inputs:
        if item.dtype not in DTYPES:
            raise BenchError(
                f"{file.path}: input {item} cannot be generated, expected one of {', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[item.dtype], shapes[item.name]
        real = np.issubdtype(dtype, np.floating)
        feeds[item.name] = (rng.standard_normal(shape) if real else rng.integers(2, size=shape)).astype(dtype)
    return feeds


def _open(file: OnnxFile, setup: Setup, batch: int, feeds: Mapping[str, NDArray[Any]]) -> OpenSession:
    return open_session(
        file.path,
        setup.provider,
        setup.threads,
        shapes={name: array.shape for name, array in feeds.items()},
        cache_key=f"{file.sha256}-b{batch}",
        cuda_graphs=setup.cuda_graphs,
    )


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
    is_cpu = provider == "cpu" and threads == 1

    def one_load(number: int) -> list[Times]:
        order = _order(len(models), number)
        opened = {index: open_session(models[index], provider, threads) for index in order}
        runners = [_Runner(opened[index], feeds, Path("candidate")) for index in range(len(models))]
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
    timed = _time(read, Setup(provider, threads), batch, feeds, budget, quiet)
    return [one.samples for one in timed]


def _time(
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
    runners = [_Runner(opened[index], feeds, file.path) for index, file in enumerate(files)]
    firsts = {index: runners[index].first() for index in order}
    _warm_up([runners[index] for index in order], budget, report)

    def spent(what: str, done: int, elapsed: float) -> float:
        share = budget.spent(done, elapsed) if rounds is None else done / rounds
        report(what, share)
        return share

    samples = _take_turns([r.run for r in runners], order, setup.threads, partial(spent, "timing"))
    copied: Sequence[Samples | None] = [None] * len(files)
    if setup.provider != "cpu":
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


def _judge(
    base: Timed, new: Timed, comparable: bool, batch: int, macs: tuple[int, int], seed: int
) -> records.BatchTiming:
    """Turn samples into a row; `comparable` says that wall time over CPU time tells a busy machine."""
    busy = comparable and _busy([base.samples, new.samples])
    wall = ratio_interval(base.samples.wall, new.samples.wall, seed=seed)
    cpu = ratio_interval(base.samples.cpu, new.samples.cpu, seed=seed)
    return records.BatchTiming(
        batch=batch,
        base=_stats(base),
        new=_stats(new),
        speedup=wall,
        cpu_speedup=cpu,
        theoretical=macs[0] / macs[1],
        busy=busy,
        verdict=verdict(wall, cpu, busy),
    )


def _warm_up(runners: Sequence[_Runner], budget: TimingBudget, report: Progress) -> None:
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


def _busy(samples: Sequence[Samples]) -> bool:
    """Whether all runs together took 10 % longer than they had the processor: medians would hide stalls."""
    return bool(sum(one.wall.sum() for one in samples) > BUSY * sum(one.cpu.sum() for one in samples))


def _stats(timed: Timed) -> records.TimingStats:
    wall, cpu = timed.samples.wall, timed.samples.cpu
    median, p90, p99 = (float(value) for value in np.percentile(wall, (50, 90, 99)))
    return records.TimingStats(
        runs=wall.size,
        first_ms=float(np.median(timed.firsts)),
        median_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        cpu_median_ms=float(np.median(cpu)),
        end_to_end_median_ms=None if timed.copied is None else float(np.median(timed.copied.wall)),
    )


def _model_file(file: OnnxFile, opened: Sequence[OpenSession]) -> records.ModelFile:
    return records.ModelFile(
        path=str(file.path),
        sha256=file.sha256,
        bytes=file.bytes,
        macs=onnxfile.count_macs(file, 1),
        load_seconds=float(np.median([one.load_seconds for one in opened])),
        load_cpu_seconds=float(np.median([one.load_cpu_seconds for one in opened])),
        nodes_per_provider=opened[0].nodes_per_provider,
        memcpy_nodes=opened[0].memcpy_nodes,
    )


def _throttle(progress: Progress | None, prefix: str, seconds: float = 0.1) -> Progress:
    """Pass on at most ten calls a second, and every last one: a display must not take time from the runs."""
    last = 0.0

    def report(what: str, fraction: float) -> None:
        nonlocal last
        now = time.perf_counter()
        if progress is not None and (fraction >= 1 or now - last >= seconds):
            last = now
            progress(f"{prefix}: {what}", fraction)

    return report
