"""distil: learn from a larger network instead of from labels.

loss=cosine (Aghli & Ribeiro 2021; METHODS 2.6). With the angle between two outputs of one sample

    D(a, b) = 1 - <a, b> / (||a|| ||b||)      over all values of a sample; the mean over samples       (2.3)

teacher T and student S, and h running over the hint layers, minimise

    L = (1 - p) * (1 / M) sum_h D(T_h(x), S_h(x)) + p * D(T(x), S(x)),         p = prediction          (2.4)

(reduction=sum: without 1 - p and 1 / M). Hint layers are the ReLUs behind prunable layers, whose channels no
addition touches: `student` leaves them alone, so they have one shape in both networks. Angles know no scale:
a student that predicts twice the right values has D = 0. Where outputs are values, the mean of
mse * (T(x) - S(x))^2 is added.

loss=kl (Hinton et al. 2015), softened by a temperature t, for classifiers:

    L = alpha * t^2 * KL(softmax(T(x) / t) || softmax(S(x) / t)) + (1 - alpha) * CE(S(x), y)

The method's teacher is the partially pruned network and not the baseline, whose layers have other shapes. It
is never changed. Epochs are scored by labels if there are any; without, the last one is the result.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from graphcomp.bases import (
    Globs,
    Lesson,
    Recovery,
    find_step,
    load_saved,
    load_step,
    no_such_step,
    prunable_relus,
)
from graphcomp.channels import analyse
from graphcomp.compiler import is_program_dir
from graphcomp.errors import PassError
from graphcomp.ir import Program, output_tensors
from graphcomp.measure import is_classifier
from graphcomp.pipeline import Context, Outlook
from graphcomp.records import Plan
from graphcomp.train import OPTIONS, Loss, Seen, cross_entropy

STUDENT = "student"
"""The pass whose input is the teacher by default."""

EPSILON = 1e-8
"""Vectors whose norms' product is not larger have no direction: D = 1, and no gradient."""


@dataclass(frozen=True, config=OPTIONS)
class Distil(Recovery):
    """Train a network to do what a larger one does, layer by layer and in its predictions."""

    name: ClassVar[str] = "distil"

    teacher: Annotated[
        str | int | None,
        Field(
            description="whom to learn from: a step of the run by its name (the last one of that name) or "
            "number, `input` (or 0): what the run began with, or the directory of a saved program; default: "
            "what the last `student` was made from"
        ),
    ] = None
    loss: Annotated[Literal["cosine", "kl"], Field(description="what to minimise")] = "cosine"
    prediction: Annotated[
        float, Field(ge=0, le=1, description="of cosine: lambda, the weight of the predictions")
    ] = 0.5
    reduction: Annotated[Literal["mean", "sum"], Field(description="of cosine: over the hint layers")] = (
        "mean"
    )
    hints: Annotated[Globs, Field(description="of cosine: globs on prunable layers to compare")] = ("*",)
    mse: Annotated[
        float | None,
        Field(
            ge=0,
            description="of cosine: weight of the squared difference of the outputs; default: 1 where labels "
            "are values or the network is no classifier, else 0",
        ),
    ] = None
    temperature: Annotated[float, Field(gt=0, description="of kl")] = 4.0
    alpha: Annotated[float, Field(ge=0, le=1, description="of kl: weight of the teacher against labels")] = (
        0.9
    )

    @property
    def needs_labels(self) -> bool:
        """Only if they have a weight in the loss."""
        return self.loss == "kl" and self.alpha < 1

    def plan(self, program: Program, context: Context) -> Plan:
        """See `Recovery.plan`; also name the teacher and the hint layers, and compare their shapes.

        Raises:
            PassError: no such teacher, or one whose layers or outputs have other shapes.
        """
        plan = super().plan(program, context)
        label, teacher = self._teacher(context)
        hints = self._hints(program, teacher)
        decided = {"teacher": label, "teacher_fingerprint": teacher.fingerprint(), "hints": hints}
        summary = "; ".join([plan.summary, f"teacher: {label}", f"{len(hints)} hint layers"])
        return plan.model_copy(update={"decisions": {**plan.decisions, **decided}, "summary": summary})

    def require(self, outlook: Outlook) -> None:
        """Also a teacher, and one that has something to teach."""
        super().require(outlook)
        names = [earlier.name for earlier in outlook.context.earlier]
        index = self._step(names)
        if index is None:
            self._named(names)
        elif index in outlook.untrained:
            raise PassError(
                f"teacher: found step {index} ({names[index]}) with random weights, expected a network "
                "that was trained; give --weights, or train it first (finetune)"
            )
        if self.loss == "kl" and not is_classifier(outlook.program):
            raise _no_classifier()

    def lesson(self, program: Program, plan: Plan, context: Context) -> Lesson:
        """The teacher's outputs."""
        label, teacher = self._teacher(context)
        hints = list(plan.decisions["hints"].values())
        if self.loss == "kl":
            loss = hinton(self.temperature, self.alpha, self.label_smoothing)
        else:
            values = not is_classifier(program) or (context.data is not None and context.data.regression)
            mse = float(values) if self.mse is None else self.mse
            loss = cosine_loss(hints, self.prediction, self.reduction, mse)
        return Lesson(loss, hints, teacher, label)

    def _teacher(self, context: Context) -> tuple[str, Program]:
        """Who it is, for people, and the program."""
        names = [earlier.name for earlier in context.earlier]
        index = self._step(names)
        if index is not None:
            return load_step(context, index)
        place = self._named(names)
        return place, load_saved(place)

    def _named(self, names: Sequence[str]) -> str:
        """The directory of the teacher; PassError if there is none."""
        if isinstance(self.teacher, str) and is_program_dir(self.teacher):
            return self.teacher
        asked = f"a step {STUDENT!r}" if self.teacher is None else repr(self.teacher)
        advice = "; the method's is the pruned network, not the baseline"
        raise no_such_step(asked, names, advice)

    def _step(self, names: Sequence[str]) -> int | None:
        """The number of the step that the teacher is the result of; None if it is no step."""
        if self.teacher is not None:
            return find_step(self.teacher, names)
        last = find_step(STUDENT, names)
        return None if last is None else last - 1

    def _hints(self, program: Program, teacher: Program) -> dict[str, str]:
        """Prunable layer -> node of its ReLU, in both networks; PassError if shapes differ."""
        _require_same_outputs(program, teacher)
        if self.loss == "kl":
            if not is_classifier(program):
                raise _no_classifier()
            return {}
        if self.prediction == 1:
            return {}
        relus = prunable_relus(analyse(program))
        chosen = {n: relu.name for n, relu in relus.items() if any(fnmatch(n, g) for g in self.hints)}
        if not chosen:
            raise PassError(
                "hints: found no prunable layer with a ReLU that they match, expected at least one; set "
                "prediction=1 to learn from predictions alone"
            )
        theirs = {node.name: teacher.shape(node) for node in teacher.graph.nodes}
        for layer, node in chosen.items():
            own = program.shape(relus[layer])
            if theirs.get(node) != own:
                raise PassError(
                    f"{layer}: found the shape {theirs.get(node)} in the teacher, expected {own} as here; "
                    "learn from the network that this one was made from, leave the layer out of hints, or "
                    "set prediction=1"
                )
        return chosen


def _no_classifier() -> PassError:
    return PassError("loss=kl: found no (batch, classes) output, expected a classifier; use cosine")


def _require_same_outputs(program: Program, teacher: Program) -> None:
    found, expected = ([tuple(t.shape) for t in output_tensors(p.output)] for p in (teacher, program))
    if found != expected:
        raise PassError(f"teacher: found outputs of shape {found}, expected {expected} as the student's")


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - the cosine of the angle between a sample's values in `a` and in `b`; shape (n,). (METHODS 2.3)

    Args:
        a, b: `[n, …]` of one shape: nothing is broadcast.

    Raises:
        PassError: if the shapes differ.
    """
    if a.shape != b.shape:
        raise PassError(f"distance: found shapes {tuple(a.shape)} and {tuple(b.shape)}, expected one shape")
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    norms = _norm(a) * _norm(b)
    known = norms > EPSILON
    cosines = (a * b).sum(1) / torch.where(known, norms, 1)
    return 1 - torch.where(known, cosines, 0)


def _norm(rows: Tensor) -> Tensor:
    """Of every row; with gradient 0 instead of NaN at 0."""
    squares = rows.square().sum(1)
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


def cosine_loss(hints: Sequence[str], prediction: float, reduction: str = "mean", mse: float = 0.0) -> Loss:
    """The loss (2.4) over the watched nodes `hints`, plus `mse` times the squared error of the outputs."""

    def loss(seen: Seen) -> Tensor:
        theirs, own = output_tensors(seen.teacher_outputs), output_tensors(seen.outputs)
        total = prediction * _mean(cosine_distance, theirs, own)
        if hints and prediction < 1:
            a, b = [seen.teacher_watched[h] for h in hints], [seen.watched[h] for h in hints]
            scale = 1 - prediction if reduction == "mean" else len(hints)
            total = total + scale * _mean(cosine_distance, a, b)
        return total + mse * _mean(F.mse_loss, theirs, own) if mse else total

    return loss


def _mean(
    compare: Callable[[Tensor, Tensor], Tensor], theirs: Sequence[Tensor], own: Sequence[Tensor]
) -> Tensor:
    """The mean over pairs of tensors, and over samples."""
    return torch.stack([compare(a, b).mean() for a, b in zip(theirs, own, strict=True)]).mean()


def hinton(temperature: float, alpha: float, label_smoothing: float = 0.0) -> Loss:
    """Softened predictions of the teacher with weight alpha, labels with the rest."""
    labels = cross_entropy(label_smoothing)

    def loss(seen: Seen) -> Tensor:
        theirs, own = (F.log_softmax(x / temperature, 1) for x in (seen.teacher_outputs, seen.outputs))
        soft = temperature**2 * F.kl_div(own, theirs, reduction="batchmean", log_target=True)
        return alpha * soft + (1 - alpha) * labels(seen) if alpha < 1 else soft

    return loss
