"""How a network is trained, and what a loss may look at."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch.nn.functional as F
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as options_dataclass
from torch import Tensor

from graphcomp.base import cache, sha256, tensor_parts
from graphcomp.data import Augmentation, Name, Split
from graphcomp.ir import Batch, Program
from graphcomp.measure import absolute_errors, values_like
from graphcomp.train.network import Mode, Statistics
from graphcomp.train.schedule import OPTIONS, Schedule


@options_dataclass(frozen=True, config=OPTIONS)
class TrainOptions(Schedule):
    """How a network is trained; the fields' descriptions say what each does."""

    epochs: Annotated[int, Field(ge=0, description="passes over the training data")] = 1
    max_steps: Annotated[
        int | None, Field(ge=1, description="end after this many steps, for short budgets")
    ] = None
    batch: Annotated[int, Field(ge=1, description="samples a step, over all processes")] = 128
    accumulate: Annotated[
        int, Field(ge=1, description="pieces that a step's samples go through the network in, to save memory")
    ] = 1
    optimizer: Annotated[Literal["sgd", "adamw"], Field(description="SGD with momentum, or AdamW")] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd")] = 0.9
    weight_decay: Annotated[float, Field(ge=0, description="pulls weights towards zero")] = 1e-4
    decay: Annotated[
        Literal["all", "weights"],
        Field(description="what decays: `weights` spares biases and the scales of normalisations"),
    ] = "all"
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="share of the target that goes to all classes alike")
    ] = 0.0
    augment: Annotated[
        Name, Field(description="random changes of images; auto: what suits the data source")
    ] = "auto"
    crop_padding: Annotated[
        int | None, Field(ge=0, description="of augment=cifar, in pixels; default: 1/8 of the side")
    ] = None
    clip: Annotated[
        float | None,
        Field(gt=0, description="largest norm of all gradients together; found together with lr=auto"),
    ] = None
    statistics: Annotated[
        Literal["auto"] | Statistics,
        Field(
            description="of normalisations in training: `batch`, or `frozen`: the running ones, which then "
            "stay as they are; auto: tried together with lr=auto, else batch"
        ),
    ] = "auto"
    ema: Annotated[
        float | None, Field(gt=0, lt=1, description="decay of an average of the weights, which is the result")
    ] = None
    bn_reestimate: Annotated[
        int,
        Field(
            ge=0,
            description="samples to estimate normalisation statistics from at the end, 0: none; "
            "of use after few steps",
        ),
    ] = 0
    held_out: Annotated[
        float, Field(ge=0, lt=1, description="fraction of the training data to choose the best epoch by")
    ] = 0.1
    keep: Annotated[
        Literal["best", "last"],
        Field(
            description="which epoch is the result; 0 is the program as it came. The best has the highest "
            "score on held-out samples, behind a teacher the lowest loss"
        ),
    ] = "best"
    precision: Annotated[
        Literal["auto", "float32", "bf16"], Field(description="auto: measured where the training is long")
    ] = "auto"
    layout: Annotated[
        Literal["auto", "contiguous", "channels_last"],
        Field(description="of images in memory; auto: measured together with the precision"),
    ] = "auto"
    seed: Annotated[int | None, Field(ge=0, lt=2**32, description="default: the run's")] = None

    @property
    def known_statistics(self) -> Statistics:
        """Those of the batch where nothing else was asked for or found."""
        return "batch" if self.statistics == "auto" else self.statistics

    def steps(self, samples: int) -> int:
        """How many steps a training on `samples` samples has."""
        whole = self.epochs * math.ceil(samples / self.batch)
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def modes(self) -> list[Mode]:
        """The kinds of arithmetic to choose from, the plainest first."""
        every = [Mode(), Mode(layout="channels_last"), Mode("bf16", "channels_last"), Mode("bf16")]
        fitting = [m for m in every if self.precision in ("auto", m.precision)]
        fitting = [m for m in fitting if self.layout in ("auto", m.layout)]
        return fitting[:3]  # all but bf16, contiguous where there is a choice: no kernel is faster there


@dataclass(frozen=True, eq=False)
class Seen:
    """What a loss may look at: some samples and what became of them.

    Attributes:
        inputs, labels: of n samples.
        outputs: the network's.
        watched: outputs of the nodes that `fit` was asked to watch, by node name.
        teacher_outputs, teacher_watched: the same of the teacher, without gradients.
        tensors: parameters and buffers of the network in training by dotted name, for penalties.
    """

    inputs: Batch
    labels: Tensor
    outputs: Any
    watched: Mapping[str, Tensor]
    teacher_outputs: Any = None
    teacher_watched: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


Loss = Callable[[Seen], Tensor]
"""A scalar, the mean over the samples (plus penalties that do not depend on them)."""

Metric = Callable[[Any, Tensor], Tensor]
"""From outputs and labels the score of each sample, shape (n,); larger is better."""


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """The usual loss of a classifier."""
    return lambda seen: F.cross_entropy(seen.outputs, seen.labels, label_smoothing=label_smoothing)


def is_correct(outputs: Any, labels: Tensor) -> Tensor:
    """1 where the largest logit is the label's: its mean is top-1 accuracy."""
    return cast(Tensor, outputs.argmax(1) == labels).double()


Distance = Literal["l1", "smooth-l1", "mse"]
DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "smooth-l1": F.smooth_l1_loss,
    "mse": F.mse_loss,
}


def value_loss(distance: Distance = "l1") -> Loss:
    """The distance of outputs and labels that are values: the mean over all of them."""
    compare = DISTANCES[distance]
    return lambda seen: compare(seen.outputs, values_like(seen.outputs, seen.labels))


def closeness(outputs: Any, labels: Tensor) -> Tensor:
    """Minus the mean absolute error of each sample: larger is better, 0 is perfect."""
    return -absolute_errors(outputs, labels).double()


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that decides what a training computes; see `train.training.fit`."""

    program: Program
    train: Split
    options: TrainOptions
    held_out: Split | None
    loss: Loss
    metric: Metric
    watch: Sequence[str]
    teacher: Program | None
    augmentation: Augmentation
    seed: int
    momenta: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.options.steps(len(self.train))

    def key(self) -> str:
        """Identifies the training, but for the loss: that is the caller's to keep the same."""
        plain = TypeAdapter(type(self.options)).dump_python(self.options, mode="json")
        return cache.identity(
            program=self.program.fingerprint(),
            teacher=self.teacher.fingerprint() if self.teacher else None,
            train=self.train.fingerprint(),
            held_out=self.held_out.fingerprint() if self.held_out else None,
            options={type(self.options).__qualname__: plain},
            augmentation=repr(self.augmentation),
            watch=list(self.watch),
            seed=self.seed,
            **({"momenta": sha256(tensor_parts(self.momenta))} if self.momenta else {}),
        )
