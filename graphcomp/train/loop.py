"""The loop of a training: steps, epochs, and the state to go on from after an interruption."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from graphcomp.base import Progress, Stop, distributed, save_state
from graphcomp.data import Split, Unchanged
from graphcomp.errors import DataError, PassError
from graphcomp.ir import Batch
from graphcomp.records import EpochRow, ModeTrial, RateTrial
from graphcomp.train.batches import Batches, Piece, ahead, noise_seed
from graphcomp.train.network import Mode, Network
from graphcomp.train.options import Metric, Seen, Task, TrainOptions

SAVE_SECONDS = 60.0
"""The state is saved at the end of every epoch, and in between when this much time has passed."""

TELL_SECONDS = 0.5
OWN = "optimizer/"
"""What the optimiser's tensors are called in a state."""

FOUND = "lr", "clip", "statistics"
"""Options that `train.rates` may have found; a training goes on with them."""

SCORE_BATCH = 250
AVERAGE_START = 10
"""An average follows closely at first: after t steps its decay is at most (1 + t) / (AVERAGE_START + t)."""


class DivergedError(PassError):
    """A loss that is not finite."""


class Average:
    """Exponential moving average of parameters and statistics; integers are copied."""

    def __init__(self, decay: float, tensors: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take in the values after step number `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (AVERAGE_START + step))
        for name, average in self.tensors.items():
            value = tensors[name].detach()
            if average.is_floating_point():
                average.lerp_(value, share)
            else:
                average.copy_(value)


def judges(split: Split, task: Task) -> Batches:
    """The samples of a split as they are, for `Loop.judge`."""
    return Batches(split, task.options.batch, 1, Unchanged(), task.seed)


def make_optimizer(options: TrainOptions, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimiser of the parameters; those that do not decay are a group of their own."""
    spared = {n for n, p in parameters.items() if options.decay == "weights" and p.ndim < 2}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in parameters.items() if n not in spared]},
        {"params": [parameters[n] for n in spared], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, options.highest, weight_decay=options.weight_decay)
    return torch.optim.SGD(groups, options.highest, options.momentum, weight_decay=options.weight_decay)


class Loop:
    """A training between two steps; `save` writes all that `restored` needs."""

    def __init__(
        self, task: Task, mode: Mode, trials: Sequence[ModeTrial] = (), rates: Sequence[RateTrial] = ()
    ) -> None:
        options = task.options
        self.task, self.options, self.mode, self.trials = task, options, mode, list(trials)
        self.rates = list(rates)
        self.network = Network(task.program, task.watch, mode, statistics=options.known_statistics)
        self.teacher = Network(task.teacher, task.watch, mode, training=False) if task.teacher else None
        self.tensors = self.network.tensors
        self.parameters = {n: t for n, t in self.tensors.items() if t.requires_grad}
        self.optimizer = make_optimizer(options, self.parameters) if self.parameters else None
        self._restore_momenta(task.momenta)
        self.average = Average(options.ema, self.tensors) if options.ema is not None else None
        self.batches = Batches(task.train, options.batch, options.accumulate, task.augmentation, task.seed)
        taught = task.held_out is not None and task.teacher is not None
        self.judges = judges(cast(Split, task.held_out), task) if taught else None
        """By what the teacher says of these the best epoch is chosen; None: by the metric."""
        self.steps, self.at = task.steps, 0
        self.epochs = math.ceil(self.steps / self.batches.per_epoch)
        self.rows: list[EpochRow] = []
        self.best: dict[str, Tensor] = {}
        self.clock = dict.fromkeys(("loss", "samples", "seconds"), 0.0)
        """Sums over the running epoch: of losses over samples, of samples, of the steps' time."""
        self.resumed = 0
        self.saved = time.monotonic()

    # ------------------------------------------------------------------ steps

    def run(self, stop: Stop, state: Path | None, key: str, progress: Progress) -> None:
        """All steps that are left; KeyboardInterrupt if asked to stop."""
        if not self.rows:
            self.end_epoch()  # number 0: the program as it came
        told = 0.0
        todo = range(self.at, self.steps)
        for pieces in ahead(self.batches, todo, threaded=self.network.device.type != "cpu"):
            self.step(pieces)
            if self.at % self.batches.per_epoch == 0 or self.at == self.steps:
                self.end_epoch()
                progress(self.epoch_message(), self.at / self.steps)
                self.save(state, key)
            elif time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                progress(self.step_message(), self.at / self.steps)
            if time.monotonic() - self.saved > SAVE_SECONDS:
                self.save(state, key)
            if anywhere(bool(stop)):
                self.save(state, key)
                raise KeyboardInterrupt(self.farewell(state))

    def step(self, pieces: Sequence[Piece]) -> None:
        """One step of the optimiser."""
        started = time.perf_counter()
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        self.network.seed(noise_seed(self.task.seed, self.at))
        for group in optimizer.param_groups:
            group["lr"] = self.options.rate(self.at, self.steps)
        loss = self.gradients(pieces)
        if not math.isfinite(loss):
            raise DivergedError(
                f"training: found a loss of {loss} at step {self.at + 1} of {self.steps}, expected a finite "
                "one; give lr=auto, or a lower lr, set clip, or check the data"
            )
        if self.options.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip)
        optimizer.step()
        samples = len(self.batches.rows(self.at))
        self.at += 1
        if self.average is not None:
            self.average.update(self.tensors, self.at)
        spent = time.perf_counter() - started
        for name, value in (("loss", loss * samples), ("samples", samples), ("seconds", spent)):
            self.clock[name] += value

    def gradients(self, pieces: Sequence[Piece]) -> float:
        """Leave the gradients of the step's mean loss on the parameters; that loss, over all processes."""
        cast(torch.optim.Optimizer, self.optimizer).zero_grad()
        world, total = distributed.world_size(), torch.zeros((), dtype=torch.float64)
        for i, piece in enumerate(pieces):
            with self.network.unsynchronised() if i + 1 < len(pieces) else nullcontext():
                loss = self.task.loss(self.look(piece))
                (loss * (piece.share * world)).backward()  # type: ignore[no-untyped-call]  # DDP takes the mean
            total += loss.detach().double().cpu() * piece.share
        distributed.all_reduce([total])
        return float(total)

    def look(self, piece: Piece) -> Seen:
        """Run the network, and the teacher, on a piece."""
        inputs = self.network.place(piece.inputs)
        try:
            outputs, watched = self.network(inputs)
        except ValueError as error:
            if len(piece.labels) > 1:
                raise
            raise PassError(
                f"training: found one sample to normalise ({error}), expected more; use a larger batch or a "
                "smaller accumulate"
            ) from error
        labels = piece.labels.to(self.network.device)
        if self.teacher is None:
            return Seen(inputs, labels, outputs, watched, tensors=self.tensors)
        with torch.no_grad():
            return Seen(inputs, labels, outputs, watched, *self.teacher(inputs), tensors=self.tensors)

    # ------------------------------------------------------------------ epochs

    def end_epoch(self) -> None:
        """Score the network, write the epoch's row, and remember the network if it is the best."""
        samples = self.clock["samples"]
        missed = math.nan if self.judges is None else self.judge(self.judges)
        row = EpochRow(
            epoch=len(self.rows),
            steps=self.at,
            rate=self.options.rate(self.at - 1, self.steps) if self.at else None,
            loss=self.clock["loss"] / samples if samples else None,
            held_out=None if self.task.held_out is None else self.score(self.task.held_out),
            held_out_loss=missed if math.isfinite(missed) else None,
            seconds=self.clock["seconds"],
            samples=int(samples),
        )
        self.rows.append(row)
        self.clock = dict.fromkeys(self.clock, 0.0)
        if self.options.keep == "best" and row.held_out is not None and self.kept == row.epoch:
            self.best = {name: t.detach().cpu().clone() for name, t in self.current.items()}

    @property
    def current(self) -> Mapping[str, Tensor]:
        """The tensors that count: the averaged ones if there are any."""
        return self.tensors if self.average is None else self.average.tensors

    @property
    def result(self) -> Mapping[str, Tensor]:
        """The tensors of the epoch that is kept."""
        return self.best or self.current

    @property
    def kept(self) -> int:
        """The number of the best epoch so far, the latest of equals; the last one if nothing is held out.

        Behind a teacher it is the one that is nearest to what that one says: labels of samples that the
        teacher was trained on are met by whoever is anywhere near it.
        """
        if self.options.keep == "last" or self.task.held_out is None:
            return len(self.rows) - 1
        if self.judges is not None:
            losses = [math.inf if row.held_out_loss is None else row.held_out_loss for row in self.rows]
            least = min(losses)
            return max(epoch for epoch, loss in enumerate(losses) if loss == least)
        return max(self.rows, key=lambda row: (row.held_out or 0.0, row.epoch)).epoch

    def score(self, split: Split) -> float:
        """The mean score of the current tensors on a split, in eval mode and the program's own precision."""
        module = self.network.module
        with _lent(self.tensors, self.current):
            module.eval()
            found = mean_score(self.network.predict, split, self.task.metric)
            self.network.learn()
        return found

    @torch.no_grad()
    def judge(self, judges: Batches) -> float:
        """The mean loss of the current tensors on samples as they are, in eval mode; collective."""
        total = torch.zeros((), dtype=torch.float64)
        with _lent(self.tensors, self.current):
            self.network.module.eval()
            for step in range(judges.per_epoch):
                share = len(judges.rows(step)) / len(judges.split)
                for piece in judges(step):
                    if len(piece.labels):
                        total += share * piece.share * self.task.loss(self.look(piece)).double().cpu()
            self.network.learn()
        distributed.all_reduce([total])
        return float(total)

    # ------------------------------------------------------------------ what the user sees

    def step_message(self) -> str:
        """`epoch [2/10], step 120/391, loss 0.412, held-out 0.932, 4:10 left`."""
        done = self.at % self.batches.per_epoch
        of = min(self.batches.per_epoch, self.steps - self.at + done)
        parts = [f"epoch [{len(self.rows)}/{self.epochs}]", f"step {done}/{of}"]
        parts.append(f"loss {self.clock['loss'] / self.clock['samples']:.3f}")
        if self.rows[-1].held_out is not None:
            parts.append(f"held-out {self.rows[-1].held_out:.3f}")
        return ", ".join([*parts, f"{self.remaining()} left"])

    def epoch_message(self) -> str:
        """`epoch [2/10]: loss 0.412, held-out 0.932, 35 s, 4:10 left`."""
        row = self.rows[-1]
        parts = [f"loss {row.loss:.3f}"] if row.loss is not None else []
        parts += [f"held-out {row.held_out:.3f}"] if row.held_out is not None else []
        parts += [f"{row.seconds:.0f} s", f"{self.remaining()} left"]
        return f"epoch [{row.epoch}/{self.epochs}]: " + ", ".join(parts)

    def remaining(self) -> str:
        """Time that the steps to come take, as m:ss or h:mm:ss."""
        spent = self.clock["seconds"] + sum(row.seconds for row in self.rows)
        left = round(spent / max(self.at, 1) * (self.steps - self.at))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def farewell(self, state: Path | None) -> str:
        """What Ctrl-C answers."""
        where = f"stopped after step {self.at} of {self.steps} (epoch {len(self.rows)} of {self.epochs})"
        if state is None:
            return f"{where}; nothing was saved: give a state file, or an output directory, to go on later"
        return f"{where}; its state is in {state}: the same command with --resume goes on from there"

    # ------------------------------------------------------------------ state

    def save(self, state: Path | None, key: str) -> None:
        """Write the state, in the first process only: it is the same in all."""
        self.saved = time.monotonic()
        if state is None or not distributed.is_first():
            return
        facts = {
            "at": self.at,
            "rows": [row.model_dump(mode="json") for row in self.rows],
            "clock": self.clock,
            "mode": [self.mode.precision, self.mode.layout],
            "trials": [trial.model_dump(mode="json") for trial in self.trials],
            "rates": [trial.model_dump(mode="json") for trial in self.rates],
            "found": {name: getattr(self.options, name) for name in FOUND},
            "resumed": self.resumed,
        }
        averaged = self.average.tensors if self.average else {}
        groups = {"net": self.tensors, "average": averaged, "best": self.best, "optimizer": self.momenta}
        tensors = {f"{group}/{n}": t for group, found in groups.items() for n, t in found.items()}
        save_state(state, key, facts, tensors)

    @classmethod
    def restored(cls, task: Task, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Loop":
        """The loop where `save` was called."""
        trials = [ModeTrial.model_validate(trial) for trial in facts["trials"]]
        rates = [RateTrial.model_validate(trial) for trial in facts["rates"]]
        task = replace(task, options=replace(task.options, **facts["found"]))
        loop = cls(task, Mode(*facts["mode"]), trials, rates)
        loop._restore(facts, tensors)
        return loop

    def _restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.at, self.clock = facts["at"], dict(facts["clock"])
        self.rows = [EpochRow.model_validate(row) for row in facts["rows"]]
        self.resumed = facts["resumed"] + 1
        self._restore_momenta({n.removeprefix(OWN): t for n, t in tensors.items() if n.startswith(OWN)})
        for name, value in tensors.items():
            group, _, key = name.partition("/")
            if group == "best":
                self.best[key] = value
            elif not name.startswith(OWN):
                goal = self.tensors if group == "net" or self.average is None else self.average.tensors
                goal[key].data.copy_(value)

    @property
    def momenta(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by `parameter#what`."""
        if self.optimizer is None:
            return {}
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.parameters.items()}
        return {f"{name}#{what}": t for name, held in states.items() for what, t in held.items()}

    def _restore_momenta(self, momenta: Mapping[str, Tensor]) -> None:
        for name, value in momenta.items():
            key, _, what = name.partition("#")
            parameter = self.parameters[key].detach()
            like = parameter if value.shape == parameter.shape else value  # in the parameter's layout
            held = cast(torch.optim.Optimizer, self.optimizer).state[self.parameters[key]]
            held[what] = torch.empty_like(like, dtype=value.dtype).copy_(value)


@torch.no_grad()
def mean_score(predict: Callable[[Batch], Any], split: Split, metric: Metric) -> float:
    """The mean of a metric over a split; the processes share the work and get the same number."""
    sums = torch.zeros(2, dtype=torch.float64)
    mine = split.subset(distributed.share(len(split), SCORE_BATCH))
    for x, y in mine.batches(SCORE_BATCH):
        scores = metric(predict(x), y)
        sums += torch.stack([scores.double().sum().cpu(), torch.tensor(float(len(y)), dtype=torch.float64)])
    distributed.all_reduce([sums])
    if not sums[1]:
        raise DataError("held-out data: found no samples, expected at least one; give more data")
    return float(sums[0] / sums[1])


@contextmanager
def _lent(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """`tensors` with other values for a while."""
    if values is tensors:
        yield
        return
    own = {name: t.detach().clone() for name, t in tensors.items()}
    for name, tensor in tensors.items():
        tensor.data.copy_(values[name])
    yield
    for name, tensor in tensors.items():
        tensor.data.copy_(own[name])


def anywhere(stop: bool) -> bool:
    """Whether any process was asked to stop: all stop after the same step."""
    asked = torch.tensor(float(stop))
    distributed.all_reduce([asked])
    return bool(asked)
