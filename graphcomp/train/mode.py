"""Which arithmetic trains a network fastest on this machine: measured once, then remembered."""

import math
import platform
import time
from collections.abc import Sequence

import torch

from graphcomp.base import Progress, cache, distributed
from graphcomp.records import ModeTrial
from graphcomp.train.loop import Loop
from graphcomp.train.network import Mode
from graphcomp.train.options import Task

KIND = "train-mode"
MIN_STEPS = 200
"""Trainings shorter than this are not worth a measurement."""

ROUNDS = 3
MIN_GAIN = 1.05
"""Another arithmetic than the plainest must be faster by this factor."""


def choose_mode(task: Task, progress: Progress) -> tuple[Mode, list[ModeTrial]]:
    """The fastest kind of arithmetic that the options allow, and what was measured (nothing if not worth it).

    The times are kept in the cache (`base.cache`), so that a second run of the same training decides
    alike and computes the same numbers. Collective.
    """
    modes = task.options.modes()
    if len(modes) == 1 or task.steps < MIN_STEPS:
        return modes[0], []
    progress(f"measure {len(modes)} kinds of arithmetic", 0.0)
    key = cache.key(
        __name__,
        program=task.program.fingerprint(),
        batch=[task.options.batch, task.options.accumulate, distributed.world_size()],
        machine=[platform.node(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        modes=[str(mode) for mode in modes],
    )
    known = distributed.on_first(lambda: cache.load(KIND, key))
    trials = _records(modes, known["ms"].tolist()) if known else distributed.broadcast(measure(task, modes))
    if known is None and distributed.is_first():
        times = [math.nan if t.ms is None else t.ms for t in trials]
        cache.store(KIND, key, {"ms": torch.tensor(times, dtype=torch.float64)})
    return fastest(modes, trials), trials


def fastest(modes: Sequence[Mode], trials: Sequence[ModeTrial]) -> Mode:
    """The mode of the shortest time; the first one that runs unless another gains `MIN_GAIN` over it."""
    timed = [(trial.ms, mode) for mode, trial in zip(modes, trials, strict=True) if trial.ms is not None]
    if not timed:
        return modes[0]  # its error is then the training's
    plain, best = timed[0], min(timed, key=lambda pair: pair[0])
    return best[1] if plain[0] >= MIN_GAIN * best[0] else plain[1]


def measure(task: Task, modes: Sequence[Mode]) -> list[ModeTrial]:
    """Time one step of every mode in turn, `ROUNDS` times after one to warm up, on copies of the program."""
    loops: list[Loop | None] = [Loop(task, mode) for mode in modes]
    times = [math.inf] * len(modes)
    for turn in range(ROUNDS + 1):
        for i, loop in enumerate(loops):
            if loop is None:
                continue
            try:
                spent = _step_seconds(loop)
            except RuntimeError:  # no such kernel, or a view that this layout does not allow
                loops[i], times[i] = None, math.nan
                continue
            times[i] = min(times[i], spent) if turn else math.inf
    return _records(modes, [1e3 * seconds for seconds in times])


def _step_seconds(loop: Loop) -> float:
    """CPU time, which other work on a busy machine does not lengthen; on a GPU wall time."""
    pieces = loop.batches(0)
    if loop.network.device.type == "cpu":
        started = time.process_time()
        loop.step(pieces)
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    loop.step(pieces)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _records(modes: Sequence[Mode], times: Sequence[float]) -> list[ModeTrial]:
    return [
        ModeTrial(precision=m.precision, layout=m.layout, ms=None if math.isnan(t) else round(t, 3))
        for m, t in zip(modes, times, strict=True)
    ]
