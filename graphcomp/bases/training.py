"""What all passes that train share: the options, the data, and their place among the three verbs.

A pass that trains changes values and no shapes, as `simulate` does; but it needs data for that, so the
pipeline calls `train` instead (see `pipeline.TrainingPass`), and there is nothing to rewrite. What
is learned, and from whom, is all that a method adds: its `Lesson`.

The best epoch is chosen by samples held out from the training data. The evaluation data is not touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass as options_dataclass

from graphcomp.bases.learning import Learning
from graphcomp.bases.options import options_of
from graphcomp.data import Augmentation, Data, Split, find_augmentation
from graphcomp.errors import DataError, PassError
from graphcomp.ir import Program
from graphcomp.measure import is_classifier, values_like
from graphcomp.pipeline import NEED_NO_LABELS, Concern, Context, Outlook
from graphcomp.records import Plan, Training
from graphcomp.train import (
    OPTIONS,
    Loss,
    Metric,
    TrainOptions,
    check_training,
    closeness,
    fit,
    is_correct,
    normalisations,
)

STATE = "training.safetensors"
"""Name of the state file in the working directory."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a program is to learn; the fields are arguments of `train.training.fit`, but for the last.

    Attributes:
        loss, watch, teacher: see there.
        taught_by: which program the teacher is, for people.
    """

    loss: Loss
    watch: Sequence[str] = ()
    teacher: Program | None = None
    taught_by: str | None = None


@options_dataclass(frozen=True, config=OPTIONS)
class Recovery(Learning, TrainOptions):
    """Base of the passes that train; `lesson` is theirs to write."""

    name: ClassVar[str]
    concern: ClassVar[Concern] = "parameters"

    @property
    def needs_labels(self) -> bool:
        """Whether the loss looks at labels."""
        return True

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not self.epochs and not self.bn_reestimate:
            raise ValueError("found epochs=0 without bn_reestimate, expected something to do, e.g. epochs=1")
        return self

    def lesson(self, program: Program, plan: Plan, context: Context) -> Lesson:
        """What to learn, as planned."""
        raise NotImplementedError

    def plan(self, program: Program, context: Context) -> Plan:
        """Check that the program can be trained on the data, and count the steps.

        Raises:
            DataError: no data, no labels, labels that the network has no output for, too few samples.
            PassError: a network that is no classifier, or has no normalisation to estimate anew.
        """
        self.require(Outlook(program, context))  # fails now rather than after the training
        data = self._data(program, context)
        train, held_out = self._split(program, data)
        steps, lr = self.steps(len(train)), self._ready(program).lr
        rate = lr if lr == "auto" else self.highest
        parts = [f"{steps} steps of up to {self.batch} samples at lr {rate}"] if steps else []
        parts += [f"statistics from {self.bn_reestimate} samples"] if self.bn_reestimate else []
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={
                "seed": self._seed(context),
                "samples": len(train),
                "held_out": len(held_out) if held_out else 0,
                "steps": steps,
                "augmentation": repr(self._augmentation(program, data)),
            },
            summary="; ".join(parts),
        )

    def require(self, outlook: Outlook) -> None:
        """Data, labels, samples, and something to train: see `plan`."""
        program = outlook.program
        train, held_out = self._split(program, self._data(program, outlook.context))
        check_training(program, train, self, held_out)
        if self.bn_reestimate:
            normalisations(program.module)

    def train(self, program: Program, plan: Plan, context: Context) -> tuple[Program, Training]:
        """Train; see `train.training.fit` for what it raises."""
        data, lesson = self._data(program, context), self.lesson(program, plan, context)
        train, held_out = self._split(program, data)
        fitted = fit(
            program,
            train,
            self._ready(program),
            held_out=held_out,
            loss=lesson.loss,
            metric=metric_of(program, data) or is_correct,
            watch=lesson.watch,
            teacher=lesson.teacher,
            augmentation=self._augmentation(program, data),
            momenta=context.momenta,
            seed=self._seed(context),
            state=None if context.workdir is None else context.workdir / STATE,
            progress=context.progress,
        )
        if context.momenta is not None:
            context.momenta.clear()
            context.momenta.update(fitted.momenta)
        return fitted.program, fitted.record.model_copy(update={"teacher": lesson.taught_by})

    def _ready(self, program: Program) -> Self:
        """With the rate that this network bears: what was fitted in closed form is sharp (`train.rates`)."""
        is_fitted = any(plan.get("fitted", False) for plan in program.history)
        return replace(self, lr="auto") if self.lr is None and is_fitted else self

    def _seed(self, context: Context) -> int:
        return context.seed if self.seed is None else self.seed

    def _augmentation(self, program: Program, data: Data) -> Augmentation:
        samples = [tuple(x.shape[1:]) for x in program.example_inputs]
        return find_augmentation(self.augment, data.spec, samples, self.crop_padding)

    def _data(self, program: Program, context: Context) -> Data:
        data = context.data
        if data is None:
            raise DataError(f"{self.name}: found no data, expected samples to learn from; give --data")
        if not self.epochs or not self.needs_labels:
            return data
        if not data.labelled:
            raise DataError(
                f"{self.name}: found data without labels, expected a class for every sample; give labelled "
                f"--data (epochs=0 with bn_reestimate needs none; {NEED_NO_LABELS})"
            )
        if metric_of(program, data) is None:
            raise PassError(
                f"{self.name}: found no (batch, classes) output, expected a classifier (or values as labels)"
            )
        return data

    def _split(self, program: Program, data: Data) -> tuple[Split, Split | None]:
        if not (self.epochs and self.held_out) or metric_of(program, data) is None:
            return data.train, None
        train, held_out = data.train.hold_out(self.held_out)
        if not len(held_out) or not len(train):
            raise DataError(
                f"{self.name}: found {len(data.train)} samples, expected enough to hold out "
                f"{self.held_out:g} of them; give more data, another held_out, or held_out=0"
            )
        return train, held_out


def metric_of(program: Program, data: Data) -> Metric | None:
    """What an epoch of a program is scored by: top-1 accuracy; minus the mean error where labels are values.

    None if the data have no labels, or classes that the program is no classifier of.

    Raises:
        DataError: labels that the network has no outputs for.
    """
    if not data.labelled:
        return None
    output = program.output
    if data.regression:
        values_like(output, data.train.labels[:1])
        return closeness
    if not is_classifier(program):
        return None
    _check_classes(output.shape[1], data.train)
    return is_correct


def _check_classes(classes: int, split: Split) -> None:
    largest = int(split.labels.max())
    if largest >= classes:
        raise DataError(
            f"labels: found class {largest}, expected classes below {classes}, the number of the network's "
            "outputs; check that the data belongs to this network"
        )
