"""The training loop: a program in, a trained program out.

    fit(program, train, TrainOptions(epochs=10, lr=0.05), held_out=…).program

Two runs with one seed are equal to the last bit, on the same machine and number of threads. Whatever is
random is a function of the seed and of the step's number, so a run that was interrupted and goes on from its
state is equal to one that was not. A run in several processes (`base.distributed`) sees the same batches
as one in a single process and computes the same gradients: the processes also share the statistics of
normalisations.

The best epoch is chosen by samples held out from the training data, never by the evaluation data.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphcomp.base import Progress, distributed, load_state, quiet, stoppable
from graphcomp.data import Augmentation, Split, Unchanged
from graphcomp.errors import DataError, PassError
from graphcomp.ir import Batch, Program, in_type
from graphcomp.records import Training
from graphcomp.train.batches import part, random_state
from graphcomp.train.loop import Loop, mean_score
from graphcomp.train.mode import choose_mode
from graphcomp.train.normalisation import reestimate
from graphcomp.train.options import (
    Distance,
    Loss,
    Metric,
    Seen,
    Task,
    TrainOptions,
    closeness,
    cross_entropy,
    is_correct,
    value_loss,
)
from graphcomp.train.rates import settle

__all__ = [
    "Distance",
    "Fitted",
    "Loss",
    "Metric",
    "Seen",
    "TrainOptions",
    "closeness",
    "cross_entropy",
    "fit",
    "is_correct",
    "value_loss",
]

STATISTICS = 3
"""Random numbers for the choice of samples to estimate statistics from; see `train.batches`."""


@dataclass(frozen=True)
class Fitted:
    """A trained program, in eval mode, and how it came to be.

    Attributes:
        program: the result.
        record: how it came to be.
        momenta: what the optimiser remembers after the last step, by `parameter#what`; tensors on the CPU.
    """

    program: Program
    record: Training
    momenta: dict[str, Tensor] = field(default_factory=dict)


def fit(
    program: Program,
    train: Split,
    options: TrainOptions,
    *,
    held_out: Split | None = None,
    loss: Loss | None = None,
    metric: Metric = is_correct,
    watch: Sequence[str] = (),
    teacher: Program | None = None,
    augmentation: Augmentation | None = None,
    momenta: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    state: Path | None = None,
    progress: Progress = quiet,
) -> Fitted:
    """Train a copy of `program`. Collective: all processes of a run call it with the same arguments.

    Normalisations use and track the statistics of batches, dropout modules are on; what has
    `requires_grad=False` stays as it is. A step's samples are weighted alike, however they are cut into
    pieces.

    Args:
        program: left as it is; its network takes one tensor.
        train: samples to learn from.
        options: how; `augment`, `crop_padding`, `held_out` and `seed` are for the caller to read.
        held_out: samples to score every epoch by; without them the last epoch is the result.
        loss: cross-entropy by default.
        metric: what `held_out` is scored with; top-1 accuracy by default.
        watch: names of nodes whose outputs the loss wants, in the program and in the teacher.
        teacher: a program to learn from: run in eval mode on the same inputs, never changed.
        augmentation: of `train`; default none.
        momenta: `Fitted.momenta` of an earlier training to go on from; after a removal of channels see
            `pipeline.momenta`.
        seed: of everything random.
        state: file to save the running training in and to go on from; None: nothing is kept.
        progress: told what is going on and which fraction is done.

    Raises:
        DataError: no samples, fewer than processes and pieces, or one in both splits.
        PassError: nothing to train, or a loss that is not finite.
        LoadError: a damaged or foreign state. OutputError: a state that cannot be written.
        KeyboardInterrupt: stopped by the user; the message says how to go on.
    """
    check_training(program, train, options, held_out)
    _check_momenta(program, momenta or {})
    task = Task(
        program=program,
        train=train,
        options=options,
        held_out=held_out,
        loss=loss or cross_entropy(options.label_smoothing),
        metric=metric,
        watch=watch,
        teacher=teacher,
        augmentation=augmentation or Unchanged(),
        seed=seed,
        momenta=momenta or {},
    )
    with _reproducible(), stoppable() as stop:
        key = task.key() if state is not None else ""
        found = distributed.on_first(lambda: None if state is None else load_state(state, key))
        if found:
            loop = Loop.restored(task, *found)
        else:
            task, rates = settle(task, stop, progress)
            loop = Loop(task, *choose_mode(task, progress), rates)
        if found:
            progress(f"goes on after step {loop.at} of {loop.steps}", loop.at / max(loop.steps, 1))
        loop.run(stop, state, key, progress)
        return _finished(loop, progress)


def check_training(
    program: Program, train: Split, options: TrainOptions, held_out: Split | None = None
) -> None:
    """Refuse what cannot be trained; DataError and PassError as for `fit`."""
    if program.interface.one_at_a_time:
        raise PassError(
            "training: found a network that takes one sample at a time, expected one that takes batches: its "
            "file is for one sample; write the file with an open batch, or repair without training (refit)"
        )
    pieces = options.accumulate * distributed.world_size()
    if min(len(train), options.batch) < pieces:
        raise DataError(
            f"training: found {len(train)} samples in batches of {options.batch}, expected at least "
            f"{pieces}: one for each piece (accumulate) of each process; give more data or a larger batch"
        )
    shared = held_out is not None and held_out.fetch is train.fetch
    if held_out is not None and shared and np.isin(held_out.indices, train.indices).any():
        raise DataError("training: found a held-out sample among the others, expected none; split the data")
    if options.epochs and not any(t.requires_grad for t in program.tensors.values()):
        raise PassError(
            "training: found no parameter that wants a gradient, expected at least one; set requires_grad, "
            "or epochs=0 with bn_reestimate"
        )


def _check_momenta(program: Program, momenta: Mapping[str, Tensor]) -> None:
    """They have to be those of this program's parameters: a removal of channels slices them as well."""
    for name, value in momenta.items():
        key, _, what = name.partition("#")
        parameter = program.tensors.get(key)
        if parameter is None or not parameter.requires_grad:
            raise PassError(
                f"training: found {what} of {key}, expected momenta of parameters that are trained"
            )
        if value.ndim and value.shape != parameter.shape:
            raise PassError(
                f"training: found {what} of {key} with shape {tuple(value.shape)}, expected "
                f"{tuple(parameter.shape)}; slice momenta together with the weights (pipeline.momenta)"
            )


@contextmanager
def _reproducible() -> Iterator[None]:
    """The caller's random numbers are left alone; cuDNN has no choice of algorithm."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        yield


def _finished(loop: Loop, progress: Progress) -> Fitted:
    """The program of the epoch that is kept, with its statistics estimated anew if that was asked for."""
    task, options, rows = loop.task, loop.options, loop.rows
    program = loop.network.to_program(loop.result)
    final = rows[loop.kept].held_out
    samples = min(options.bn_reestimate, len(task.train))
    if samples:
        program = _reestimated(program, task, samples, progress)
        final = mean_score(_predictor(program), task.held_out, task.metric) if task.held_out else None
    seconds = sum(row.seconds for row in rows)
    record = Training(
        samples=len(task.train),
        held_out_samples=len(task.held_out) if task.held_out else 0,
        batch=options.batch,
        processes=distributed.world_size(),
        device=str(loop.network.device),
        precision=loop.mode.precision,
        layout=loop.mode.layout,
        rates=loop.rates,
        lr=options.highest,
        clip=options.clip,
        statistics=options.known_statistics,
        trials=loop.trials,
        epochs=rows,
        kept_epoch=loop.kept,
        bn_samples=samples,
        held_out=final,
        samples_per_second=sum(row.samples for row in rows) / seconds if seconds else None,
        seconds=seconds,
        resumed=loop.resumed,
    )
    return Fitted(program, record, {n: t.detach().cpu().clone() for n, t in loop.momenta.items()})


def _reestimated(program: Program, task: Task, samples: int, progress: Progress) -> Program:
    """Batches that are alike: drawn at random, and of sizes that differ by at most one."""
    chosen = task.train.subset(random_state(task.seed, STATISTICS).permutation(len(task.train))[:samples])
    count = math.ceil(samples / task.options.batch)
    cuts = [np.arange(samples)[part(samples, count, i)] for i in range(count)]
    mine = cuts[distributed.rank() :: distributed.world_size()]
    inputs = (in_type(chosen.fetch(chosen.indices[rows]), _dtype(program)) for rows in mine)
    total = sum(map(len, mine))
    return reestimate(program, inputs, lambda seen: progress(f"estimate statistics, {seen}/{total}", 1.0))


def _predictor(program: Program) -> Callable[[Batch], Any]:
    return lambda inputs: program(*in_type(inputs, _dtype(program)))


def _dtype(program: Program) -> torch.dtype:
    return next((t.dtype for t in program.module.parameters()), torch.float32)
