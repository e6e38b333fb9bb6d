"""Baseline against candidate: two ONNX files timed by turns in one process.

Both sessions are open at once and run A B B A, so that drift of the machine (clock, temperature,
neighbours) falls on both alike. The estimate is the ratio of medians; its 95 % interval is a bootstrap over
whole A B B A rounds, which keeps the pairing. If the interval contains 1 there is no measurable difference.
The interval covers the noise between runs, not what changes when the files are loaded anew.

Time is wall time beside CPU time: at one thread the calling thread's own, otherwise the whole process's.
Where wall time exceeds CPU time by more than 10 % at one thread, something else had the core: the machine
is busy and the verdict is taken from CPU time.

Written to be run on CUDA and TensorRT as well, but **not yet run on a GPU**.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from graphcomp import doctor, onnxfile, records
from graphcomp.errors import BenchError
from graphcomp.onnxfile import OnnxFile, onnx_macs
from graphcomp.progress import Progress
from graphcomp.session import OpenSession, Provider, open_session, probe, run_errors

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
# With n rounds that all point one way, chance alone does so with 2^(1-n): 6 is the least that supports 95 %.
MIN_ROUNDS = 6

RACE_RUNS, RACE_SECONDS = 100, 10.0
"""Runs of each model in a race, or seconds for all."""

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
class Budget:
    """How long to measure: `runs` of each file or `seconds` for both, whichever ends first."""

    runs: int
    seconds: float
    warmup_runs: int
    warmup_seconds: float


@dataclass(frozen=True)
class Setup:
    """Where both files run, and how."""

    provider: Provider
    threads: int
    cuda_graphs: bool = False


@dataclass(frozen=True)
class Timed:
    """What one batch size leaves behind once its sessions are closed."""

    row: records.BatchTiming
    base: records.ModelFile
    new: records.ModelFile
    options: dict[str, str]
    tf32: bool | None


@dataclass(frozen=True)
class Samples:
    """Milliseconds by round, (rounds, 2) each: the two turns that a file has in A B B A."""

    wall: tuple[Times, Times]
    cpu: tuple[Times, Times]


def benchmark(
    base: Path,
    new: Path,
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

    For each batch both files are loaded anew, run once (their own column), warmed up for `warmup_runs`
    *and* `warmup_seconds` each, and timed until `runs` of each or `seconds` for both, whichever comes
    first, but never fewer than six A B B A rounds: less supports no interval. `threads` is the intra-op
    count. Inputs are drawn from `seed`. `cuda_graphs`: see `open_session`; the record says so among the
    provider's options. `progress(what, fraction)` is called between rounds, with the
    fraction of that phase.

    Writes nothing (TensorRT's engine cache excepted). Raises BenchError if a file cannot be read, the two
    differ in their inputs, a batch does not fit, or a run fails; ProviderError if the provider does not
    work here.
    """
    budget = Budget(runs, seconds, warmup_runs, warmup_seconds)
    _check_options(budget, batches)
    setup = Setup(provider, threads, cuda_graphs)
    files = onnxfile.read(base), onnxfile.read(new)
    check_inputs(*files)
    macs = {batch: _macs(files, batch) for batch in batches}
    # Besides proving the provider, this pays for what happens once a process: no file's first run should.
    probe(provider, threads, cuda_graphs=cuda_graphs)
    timed = []
    for batch in batches:
        report = _throttle(progress, f"batch {batch}")
        timed.append(_time_batch(files, setup, batch, macs[batch], budget, seed, report))
    return records.Bench(
        provider=provider,
        provider_options=timed[0].options,
        threads=threads,
        tf32=timed[0].tf32,
        base=timed[0].base,
        new=timed[0].new,
        batches=[one.row for one in timed],
        environment=doctor.environment(),
    )


def ratio_interval(base: Times, new: Times, *, seed: int = 0) -> records.Interval:
    """Median of `base` over median of `new`, with the percentile bootstrap's 95 % interval.

    Both are (rounds, 2) and row r is the same A B B A round: rounds are resampled whole, so that what
    slowed a round down slows both sides of the ratio. Raises BenchError if the shapes differ or a median is
    not positive.
    """
    if base.shape != new.shape or base.ndim != 2:
        raise BenchError(
            f"samples: found shapes {base.shape} and {new.shape}, expected the same (rounds, 2); "
            "pair them by round"
        )
    medians = float(np.median(base)), float(np.median(new))
    if min(medians) <= 0:
        raise BenchError(
            f"clock: found a median of {min(medians)} ms, expected more than 0; "
            "the clock is too coarse for this model, use a larger batch"
        )
    ratios = np.concatenate(list(_resampled_ratios(base, new, np.random.default_rng(seed))))
    low, high = np.percentile(ratios, (2.5, 97.5))
    return records.Interval(value=medians[0] / medians[1], low=float(low), high=float(high))


def _resampled_ratios(base: Times, new: Times, rng: np.random.Generator) -> Iterator[Times]:
    """RESAMPLES ratios of medians over rounds drawn with replacement, some at a time to bound the memory."""
    count = len(base)
    for left in range(RESAMPLES, 0, -(step := max(1, 500_000 // count))):
        drawn = rng.integers(count, size=(min(step, left), count))
        top, bottom = (np.median(side[drawn], axis=(1, 2)) for side in (base, new))
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
        title=escape(f"Time per run in ms ({where}, {bench.environment.isa})\n{files}"),
        caption=escape("\n".join(_line(row) for row in bench.batches)),
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
    table = Table(title="Speedup by batch size", caption=escape(_marks(benches)), caption_justify="left")
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


def _check_options(budget: Budget, batches: Sequence[int]) -> None:
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


def _open(
    files: Sequence[OnnxFile],
    setup: Setup,
    batch: int,
    feeds: Mapping[str, NDArray[Any]],
) -> list[OpenSession]:
    shapes = {name: array.shape for name, array in feeds.items()}
    return [
        open_session(
            file.path,
            setup.provider,
            setup.threads,
            shapes=shapes,
            cache_key=f"{file.sha256}-b{batch}",
            cuda_graphs=setup.cuda_graphs,
        )
        for file in files
    ]


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
    before_each: Callable[[], object] = lambda: None,
) -> list[float]:
    """Median times in ms of several ONNX models that take the same inputs, run in turn.

    `runs` of each or `seconds` for all, whichever ends first, but never fewer than six rounds; `before_each`
    of them is called, untimed. CPU time on one CPU thread, else wall time. For choosing
    between forms of one network, not for quoting.
    Raises ProviderError and BenchError.
    """
    runners = [_Runner(open_session(m, provider, threads), feeds, Path("candidate")) for m in models]
    for runner in runners:
        runner.first()
        runner.run()
    wall, cpu = _take_turns(runners, runs, seconds, MIN_ROUNDS, threads, before_each)
    times = cpu if provider == "cpu" and threads == 1 else wall
    return [float(np.median(one)) / 1e6 for one in times]


@dataclass(frozen=True)
class Turns:
    """Milliseconds of one of several models that took turns, (rounds, 2) each: see `in_turn`."""

    wall: Times
    cpu: Times

    @property
    def busy(self) -> bool:
        """Whether, at one thread, all runs together took 10 % longer than they had the processor."""
        return bool(self.wall.sum() > BUSY * self.cpu.sum())


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
) -> list[Turns]:
    """Time any number of ONNX files side by side, in rounds A B C C B A.

    Times of two of them are what `ratio_interval` takes, whichever two. `runs` of each or `seconds` for all,
    whichever ends first, but never fewer than six rounds, after `warmup_seconds` of each. Inputs are drawn
    from `seed`. Raises BenchError if the files differ in their inputs, ProviderError.
    """
    read = [onnxfile.read(file) for file in files]
    for other in read[1:]:
        check_inputs(read[0], other)
    probe(provider, threads)
    feeds = random_inputs(read[0], batch, seed)
    opened = _open(read, Setup(provider, threads), batch, feeds)
    runners = [_Runner(one, feeds, file.path) for one, file in zip(opened, read, strict=True)]
    for runner in runners:
        runner.first()
    _warm_up(runners, Budget(runs, seconds, 2, warmup_seconds), lambda what, fraction: None)
    wall, cpu = _take_turns(runners, runs, seconds, 2 * MIN_ROUNDS, threads)
    whole = len(wall[0]) // 2 * 2
    return [Turns(_in_rounds(w[:whole]), _in_rounds(c[:whole])) for w, c in zip(wall, cpu, strict=True)]


def _take_turns(
    runners: Sequence["_Runner"],
    runs: int,
    seconds: float,
    least: int,
    threads: int,
    before_each: Callable[[], object] = lambda: None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Nanoseconds, by runner and run, of wall and of CPU time; every other run in the opposite order."""
    clock = time.thread_time_ns if threads == 1 else time.process_time_ns
    wall: list[list[int]] = [[] for _ in runners]
    cpu: list[list[int]] = [[] for _ in runners]
    start, order = time.perf_counter(), list(range(len(runners)))
    with _no_garbage_collection():
        while len(wall[0]) < least or (_spent(len(wall[0]) / runs, time.perf_counter() - start, seconds) < 1):
            for index in order:
                before_each()
                cpu_start, wall_start = clock(), time.perf_counter_ns()
                runners[index].run()
                wall_end, cpu_end = time.perf_counter_ns(), clock()
                wall[index].append(wall_end - wall_start)
                cpu[index].append(cpu_end - cpu_start)
            order.reverse()
    return wall, cpu


def _in_rounds(times: Sequence[int]) -> Times:
    """Nanoseconds as ms, (rounds, 2)."""
    return np.asarray(times, np.float64).reshape(-1, 2) / 1e6


def _time_batch(
    files: tuple[OnnxFile, OnnxFile],
    setup: Setup,
    batch: int,
    macs: tuple[int, int],
    budget: Budget,
    seed: int,
    report: Progress,
) -> Timed:
    feeds = random_inputs(files[0], batch, seed)
    provider, threads = setup.provider, setup.threads
    opened = _open(files, setup, batch, feeds)
    runners = _Runner(opened[0], feeds, files[0].path), _Runner(opened[1], feeds, files[1].path)
    firsts = runners[0].first(), runners[1].first()
    _warm_up(runners, budget, report)
    clock = time.thread_time_ns if threads == 1 else time.process_time_ns
    samples = _sample((runners[0].run, runners[1].run), budget, clock, lambda x: report("timing", x))
    copied: tuple[float | None, float | None] = None, None
    if provider != "cpu":
        steps = runners[0].run_end_to_end, runners[1].run_end_to_end
        whole = _sample(steps, budget, clock, lambda x: report("timing with copies", x)).wall
        copied = float(np.median(whole[0])), float(np.median(whole[1]))
    # A GPU's host thread waits by design, and several threads have no one CPU clock to compare with.
    row = _judge(samples, provider == "cpu" and threads == 1, batch, firsts, copied, macs, seed)
    base, new = (_model_file(file, one) for file, one in zip(files, opened, strict=True))
    return Timed(row, base, new, opened[0].provider_options, opened[0].tf32)


def _judge(
    samples: Samples,
    comparable: bool,
    batch: int,
    firsts: tuple[float, float],
    copied: tuple[float | None, float | None],
    macs: tuple[int, int],
    seed: int,
) -> records.BatchTiming:
    """Turn samples into a row; `comparable` says that wall time over CPU time tells a busy machine."""
    busy = comparable and _busy(samples)
    wall, cpu = ratio_interval(*samples.wall, seed=seed), ratio_interval(*samples.cpu, seed=seed)
    base, new = (_stats(firsts[i], samples.wall[i], samples.cpu[i], copied[i]) for i in (0, 1))
    return records.BatchTiming(
        batch=batch,
        base=base,
        new=new,
        speedup=wall,
        cpu_speedup=cpu,
        theoretical=macs[0] / macs[1],
        busy=busy,
        verdict=verdict(wall, cpu, busy),
    )


def _warm_up(runners: Sequence[_Runner], budget: Budget, report: Progress) -> None:
    for index, runner in enumerate(runners):
        start, done = time.perf_counter(), 0
        while done < budget.warmup_runs or time.perf_counter() - start < budget.warmup_seconds:
            runner.run()
            done += 1
        report("warming up", (index + 1) / len(runners))


def _sample(
    steps: tuple[Callable[[], None], Callable[[], None]],
    budget: Budget,
    cpu_clock: Callable[[], int],
    tick: Callable[[float], None],
) -> Samples:
    """Run A B B A rounds until the budget is spent, and at least MIN_ROUNDS of them."""
    wall: tuple[list[int], list[int]] = ([], [])
    cpu: tuple[list[int], list[int]] = ([], [])
    rounds, start, share = 0, time.perf_counter(), 0.0
    with _no_garbage_collection():
        while rounds < MIN_ROUNDS or share < 1:
            for which in (0, 1, 1, 0):
                cpu_start, wall_start = cpu_clock(), time.perf_counter_ns()
                steps[which]()
                wall_end, cpu_end = time.perf_counter_ns(), cpu_clock()
                wall[which].append(wall_end - wall_start)
                cpu[which].append(cpu_end - cpu_start)
            rounds += 1
            share = _spent(2 * rounds / budget.runs, time.perf_counter() - start, budget.seconds)
            tick(min(share, rounds / MIN_ROUNDS, 1.0))
    return Samples(_by_round(wall), _by_round(cpu))


def _spent(share_of_runs: float, elapsed: float, seconds: float) -> float:
    return max(share_of_runs, elapsed / seconds if seconds > 0 else 1.0)


def _by_round(times: tuple[list[int], list[int]]) -> tuple[Times, Times]:
    base, new = map(_in_rounds, times)
    return base, new


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _busy(samples: Samples) -> bool:
    """Whether all runs together took 10 % longer than they had the processor: medians would hide stalls."""
    return bool(sum(one.sum() for one in samples.wall) > BUSY * sum(one.sum() for one in samples.cpu))


def _stats(first: float, wall: Times, cpu: Times, copied: float | None) -> records.TimingStats:
    median, p90, p99 = (float(value) for value in np.percentile(wall, (50, 90, 99)))
    return records.TimingStats(
        runs=wall.size,
        first_ms=first,
        median_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        cpu_median_ms=float(np.median(cpu)),
        end_to_end_median_ms=copied,
    )


def _model_file(file: OnnxFile, opened: OpenSession) -> records.ModelFile:
    return records.ModelFile(
        path=str(file.path),
        sha256=file.sha256,
        bytes=file.bytes,
        macs=onnxfile.count_macs(file, 1),
        load_seconds=opened.load_seconds,
        load_cpu_seconds=opened.load_cpu_seconds,
        nodes_per_provider=opened.nodes_per_provider,
        memcpy_nodes=opened.memcpy_nodes,
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
