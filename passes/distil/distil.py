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
is never changed. Where there are labels, samples are held out, and the epoch that loses least on them is the
result: labels of samples that the teacher learned by heart are met by whoever is anywhere near it. Without
labels it is the last one.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from graphcomp.bases import Globs, Lesson, Recovery, find_step, load_saved, load_step, no_such_step
from graphcomp.compiler import is_program_dir
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.measure import is_classifier
from graphcomp.passes.distil.hints import hint_layers, no_classifier, require_same_outputs
from graphcomp.passes.distil.losses import cosine_loss, hinton
from graphcomp.pipeline import Context, Outlook
from graphcomp.records import Plan
from graphcomp.train import OPTIONS

STUDENT = "student"
"""The pass whose input is the teacher by default."""


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
            raise no_classifier()

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
        """Prunable layer -> node of its ReLU, in both networks; none where predictions alone are compared."""
        require_same_outputs(program, teacher)
        if self.loss == "kl" and not is_classifier(program):
            raise no_classifier()
        if self.loss == "kl" or self.prediction == 1:
            return {}
        return hint_layers(program, teacher, self.hints)
