"""The learning rate, tried: short trainings say which one lowers the loss on samples they do not see.

What rates are stable differs by orders of magnitude. The sharpest direction of the loss decides: a step of
SGD with momentum m has to stay below 2 (1 + m) / h along a direction of curvature h. Trained ResNet-56,
Hinton's loss at temperature 4: h = 240 with normalisations, 2,300 with these folded into the weights, 7,800
with half of the MACs removed and layers fitted again. Gradients of single batches point there mostly, so
they are also kept to a share of their usual norm. Statistics of batches are noise to a network that was
fitted to those of all samples: where no rate lowers the loss by them, those that the network has are kept.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch

from graphcomp.base import Progress, Stop
from graphcomp.ir import FrozenBatchNorm2d
from graphcomp.records import RateTrial
from graphcomp.train.batches import random_state
from graphcomp.train.loop import DivergedError, Loop, anywhere, judges
from graphcomp.train.network import Mode, Statistics
from graphcomp.train.normalisation import BatchNorm
from graphcomp.train.options import Task

RATES = [10 ** (-k / 2) for k in range(13)]
"""Neighbours are tried as long as the loss falls; of the best ones the largest is taken."""

START = {"sgd": 4, "adamw": 6}
"""Which of them is tried first, by optimiser."""

NEAR = 0.1
"""A rate is as good as the best one if it misses at most this part of what that one gains."""

GAIN = 0.05
"""Part of the loss that trials by statistics of batches have to take away; else frozen ones are tried."""

STEPS = 8, 24
SHARE = 1 / 16
"""A trial's steps, at least and at most, and as a share of the training's."""

JUDGES = 256
"""Samples that say how good a trial is."""

NORMS = 8
CLIP = 0.1
"""Gradients are kept to this part of the median norm of the first so many."""

JUDGED = 4
"""Random numbers for the choice of judges; see `train.batches`."""


def settle(task: Task, stop: Stop, progress: Progress) -> tuple[Task, list[RateTrial]]:
    """The task with what was found in the place of `lr=auto`, and all that was tried; collective.

    `clip` and `statistics` are found only together with the rate, and only where they were left open.

    Raises:
        KeyboardInterrupt: asked to stop.
    """
    options = task.options
    if options.lr != "auto" or not task.steps:
        known = replace(options, lr=None if options.lr == "auto" else options.lr)
        return replace(task, options=replace(known, statistics=kinds(task)[0])), []
    search = _Search(task, stop, progress)
    trials: list[RateTrial] = []
    for kind in kinds(task):
        trials += search.climb(kind)
        if min(map(_loss, trials)) < (1 - GAIN) * search.start:
            break
    chosen = choose(trials, search.start)
    found = replace(options, lr=chosen.rate, clip=search.clip, statistics=cast(Statistics, chosen.statistics))
    return replace(task, options=found), trials


def kinds(task: Task) -> list[Statistics]:
    """What statistics of normalisations may be used; the first one where nothing is tried."""
    if task.options.statistics != "auto":
        return [task.options.statistics]
    norms = (m for m in task.program.module.modules() if isinstance(m, BatchNorm))
    moving = any(not isinstance(m, FrozenBatchNorm2d) and m.running_mean is not None for m in norms)
    return ["batch", "frozen"] if moving and not task.options.bn_reestimate else ["batch"]


def choose(trials: list[RateTrial], start: float) -> RateTrial:
    """The largest rate among those that are as good as the best, of its kind of statistics.

    Args:
        trials: one at least.
        start: the loss without any training.
    """
    best = min(trials, key=_loss)
    limit = _loss(best) + NEAR * max(start - _loss(best), 0)
    good = [t for t in trials if t.statistics == best.statistics and _loss(t) <= limit]
    return max(good, key=lambda t: t.rate)


class _Search:
    """Trials of one task.

    Attributes:
        start: mean loss of the judges before any training.
        clip: see `CLIP`; what was asked for if something was.
    """

    def __init__(self, task: Task, stop: Stop, progress: Progress) -> None:
        self.task, self.stop, self.progress = task, stop, progress
        self.steps = min(max(STEPS[0], min(STEPS[1], int(SHARE * task.steps))), task.steps)
        split = task.train if task.held_out is None else task.held_out
        chosen = random_state(task.seed, JUDGED).permutation(len(split))[:JUDGES]
        self.judges = judges(split.subset(chosen), task)
        loop = self.loop(RATES[-1], "batch", None)
        self.start = loop.judge(self.judges)
        self.clip = task.options.clip if task.options.clip is not None else self.usual(loop)

    def loop(self, rate: float, statistics: Statistics, clip: float | None) -> Loop:
        """A training of its own, on a copy."""
        asked = replace(
            self.task.options, lr=rate, clip=clip, statistics=statistics, max_steps=self.steps, ema=None
        )
        return Loop(replace(self.task, options=asked), Mode())

    def usual(self, loop: Loop) -> float | None:
        """What gradients are kept to; None where they are all zero or not finite."""
        norms = []
        for step in range(NORMS):
            loop.gradients(loop.batches(step % self.task.steps))
            found = [p.grad for p in loop.parameters.values() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(found)))
        usual = CLIP * sorted(norms)[NORMS // 2]
        return usual if math.isfinite(usual) and usual > 0 else None

    def climb(self, statistics: Statistics) -> Iterator[RateTrial]:
        """Trials from the usual rate to lower ones, or to higher ones if those are worse."""
        at = START[self.task.options.optimizer]
        first = self.trial(RATES[at], statistics)
        yield first
        for way in (1, -1):
            best, where = _loss(first), at + way
            while 0 <= where < len(RATES):
                trial = self.trial(RATES[where], statistics)
                yield trial
                # rates that all diverge say nothing: go on downwards
                if _loss(trial) >= best and not (way == 1 and math.isinf(best)):
                    break
                best, where = _loss(trial), where + way
            if best < _loss(first):
                return

    def trial(self, rate: float, statistics: Statistics) -> RateTrial:
        """The loss after a few steps."""
        if anywhere(bool(self.stop)):
            raise KeyboardInterrupt("stopped while rates were tried; nothing was trained: run it again")
        self.progress(f"try lr {rate:.2g}", 0.0)
        loop = self.loop(rate, statistics, self.clip)
        loss = math.inf
        try:
            for step in range(self.steps):
                loop.step(loop.batches(step))
            loss = loop.judge(self.judges)
        except DivergedError:
            pass
        return RateTrial(rate=rate, statistics=statistics, loss=loss if math.isfinite(loss) else None)


def _loss(trial: RateTrial) -> float:
    return math.inf if trial.loss is None else trial.loss
