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

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from graphcomp import records
from graphcomp.base import Progress
from graphcomp.errors import BenchError
from graphcomp.ir import Shape
from graphcomp.runtime import machine, onnxfile
from graphcomp.runtime.inputs import check_inputs, mismatch, random_inputs
from graphcomp.runtime.onnxfile import OnnxFile
from graphcomp.runtime.precision import Precision
from graphcomp.runtime.providers import HOST, Provider
from graphcomp.runtime.session import OpenSession, probe
from graphcomp.runtime.turns import (
    Setup,
    Timed,
    Times,
    TimingBudget,
    is_busy,
    time_files,
)

NO_DIFFERENCE = "no measurable difference"
RESAMPLES = 2000


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
    precision: Precision = "fp32",
    input_shapes: Mapping[str, Shape] | None = None,
    progress: Progress | None = None,
) -> records.Bench:
    """Time two ONNX files against each other at every batch size.

    For each batch both files are loaded six times, run once (their own column), warmed up for `warmup_runs`
    (and all times together for `warmup_seconds`) each, and timed until `runs` of each or `seconds` for both,
    whichever comes first, but never less than one A B B A round a load: six support an interval. `threads`
    is the intra-op count. Inputs are drawn from `seed`; `input_shapes` are for files that leave more than the
    batch open, see `onnxfile.read`. `cuda_graphs`, `precision`: see `open_session`; the record
    says so. `progress(what, fraction)` is called between rounds, with the fraction of
    that phase.

    Writes nothing (TensorRT's engine cache excepted). Raises BenchError if a file cannot be read, the two
    differ in their inputs, a batch does not fit, or a run fails; ProviderError if the provider does not
    work here.
    """
    budget = TimingBudget(runs, seconds, warmup_runs, warmup_seconds)
    _check_options(budget, batches)
    setup = Setup(provider, threads, cuda_graphs, precision)
    files = onnxfile.read(Path(base), input_shapes), onnxfile.read(Path(new), input_shapes)
    check_inputs(*files)
    macs = {batch: _macs(files, batch) for batch in batches}
    # Besides proving the provider, this pays for what happens once a process: no file's first run should.
    probe(provider, threads, cuda_graphs=cuda_graphs, precision=precision)
    found = []
    for batch in batches:
        report = _throttle(progress, f"batch {batch}")
        found.append(time_files(files, setup, batch, random_inputs(files[0], batch, seed), budget, report))
    # A GPU's host thread waits by design, and several threads have no one CPU clock to compare with.
    comparable = provider in HOST and threads == 1
    pairs = zip(batches, found, strict=True)
    opened = found[0][0].opened[0]
    models = [_model_file(file, one.opened) for file, one in zip(files, found[0], strict=True)]
    return records.Bench(
        provider=provider,
        provider_options=opened.provider_options,
        precision=precision,
        threads=threads,
        tf32=opened.tf32,
        base=models[0],
        new=models[1],
        batches=[_judge(one[0], one[1], comparable, batch, macs[batch], seed) for batch, one in pairs],
        environment=machine.environment(),
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


def _macs(files: tuple[OnnxFile, OnnxFile], batch: int) -> tuple[int, int]:
    """MACs of both files at `batch`, having made sure that both take it."""
    left, right = (onnxfile.feed_shapes(file.inputs, batch, str(file.path)) for file in files)
    if left != right:
        raise mismatch(*files)
    base, new = (onnxfile.count_macs(file, batch) for file in files)
    if new == 0:
        raise BenchError(
            f"{files[1].path}: found no convolution or matrix product, expected at least one; "
            "there is nothing to compare"
        )
    return base, new


def _judge(
    base: Timed, new: Timed, comparable: bool, batch: int, macs: tuple[int, int], seed: int
) -> records.BatchTiming:
    """Turn samples into a row; `comparable` says that wall time over CPU time tells a busy machine."""
    busy = comparable and is_busy([base.samples, new.samples])
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
