"""apoz: average percentage of zeros (Hu et al. 2016, "Network Trimming"; rule: Aghli & Ribeiro 2021).

    APoZ_c = share of entries of channel c, after convolution, normalisation and ReLU, that are exactly 0
             over all samples and positions                                                  (METHODS 2.1)
    remove { c : APoZ_c > mu + sigma },  mu and sigma over the layer's channels, sigma with ddof = 0     (2.2)

Only layers whose channels no other layer shares (no residual addition) and that feed a ReLU or ReLU6 are
judged. With `ratio` or `target` the order is the same and the count is theirs.

With `steps` the rule is applied again and again, to what is left and has recovered (METHODS 2.4):

    repeat `steps` times:  measure all layers, remove, fine-tune
    until the accuracy has dropped by more than `tolerance` points; then the last good network is the result
"""

import dataclasses
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, RatioRemoval, options_of
from graphcomp.budget import Scores
from graphcomp.channels import ChannelGroup, Channels
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.measure import is_classifier
from graphcomp.passes.apoz.zeros import activity, beyond_sigma
from graphcomp.passes.finetune import Finetune
from graphcomp.pipeline import Context, Course, Outlook, Pass, lost_points, require_data, require_trained
from graphcomp.records import Plan


@dataclass(frozen=True, config=OPTIONS)
class APoZ(RatioRemoval):
    """Remove the channels that are most often zero after their ReLU: one step, or several with training."""

    name: ClassVar[str] = "apoz"
    needs_amount: ClassVar[bool] = False

    samples: Annotated[int, Field(ge=1, description="calibration samples")] = 1000
    max_fraction: Annotated[
        float, Field(gt=0, lt=1, description="of a layer and step, at most, by the sigma rule")
    ] = 0.5
    steps: Annotated[
        int,
        Field(
            ge=1,
            description="1: remove once and train nothing; more: remove, fine-tune, and again, at most this "
            "often (then kept counts are not rounded up unless `multiple` says so)",
        ),
    ] = 1
    tolerance: Annotated[
        Annotated[float, Field(ge=0)] | None,
        Field(
            description="with steps: points of accuracy on held-out training samples that may be lost; "
            "default 1"
        ),
    ] = None
    finetune: Annotated[
        Finetune | None,
        Field(description="with steps: options of the training after each, as of the pass; default: its own"),
    ] = None

    @model_validator(mode="after")
    def _steps_have_their_own_amount(self) -> Self:
        if self.steps == 1:
            given = [n for n in ("tolerance", "finetune") if getattr(self, n) is not None]
            if given:
                raise ValueError(f"found {given[0]} with one step, expected more, e.g. steps=6")
            return self
        given = [n for n in ("ratio", "target") if getattr(self, n) is not None]
        if given:
            raise ValueError(
                f"found {given[0]} with steps, expected one of them: the tolerance ends the steps"
            )
        if self.finetune is not None and not self.finetune.held_out:
            raise ValueError("found finetune.held_out=0, expected held-out samples to judge every step by")
        return self

    def require(self, outlook: Outlook) -> None:
        """Also data; with steps, what the training needs, and an accuracy that says something."""
        super().require(outlook)
        require_data("calibration", outlook.context)
        if self.iteration is not None:
            self.iteration.require(outlook)

    @property
    def iteration(self) -> "Steps | None":
        """None for one step."""
        return Steps(self) if self.steps > 1 else None

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """1 - APoZ."""
        return activity(channels, context, self.samples)

    def own_count(self, scores: Scores, group: ChannelGroup) -> int:
        """The sigma rule."""
        gone = beyond_sigma(1 - scores[group.channels])
        return len(group.channels) - min(len(gone), int(self.max_fraction * len(group.channels)))


@dataclasses.dataclass(frozen=True)
class Steps:
    """apoz over several steps: rounds 1, 3, … remove, rounds 2, 4, … fine-tune."""

    apoz: APoZ
    name: ClassVar[str] = APoZ.name
    keeps_momenta: ClassVar[bool] = False  # every fine-tuning has a schedule of its own

    @property
    def finetune(self) -> Finetune:
        """The training of each step."""
        return self.apoz.finetune or Finetune()

    @property
    def tolerance(self) -> float:
        """In points."""
        return 1.0 if self.apoz.tolerance is None else self.apoz.tolerance

    @property
    def held_out(self) -> float:
        """What the trainings hold out anyway."""
        return self.finetune.held_out

    @property
    def most_rounds(self) -> int:
        """Two a step."""
        return 2 * self.apoz.steps

    def plan(self, program: Program, context: Context) -> Plan:
        """Check now that the network can be trained, rather than after the first removal."""
        self.require(Outlook(program, context))
        return Plan(name=self.name, options=options_of(self.apoz))

    def require(self, outlook: Outlook) -> None:
        """A classifier that can be trained, and whose accuracy says something."""
        if not is_classifier(outlook.program):
            raise PassError(f"{self.name}: found no (batch, classes) output, expected a classifier")
        require_trained(self.name, outlook, "accuracy decides how many steps there are")
        self.finetune.require(outlook)

    def next_pass(self, course: Course) -> Pass | None:
        """Remove; train what something was removed from; again, while the last training made up for it."""
        done = len(course.rounds)
        if done % 2:
            return self.finetune if course.rounds[-1].plan.decisions["rows"] else None
        if done == self.most_rounds or self.result(course) != done:
            return None
        return dataclasses.replace(
            self.apoz,
            steps=1,
            tolerance=None,
            finetune=None,
            multiple=self.apoz.multiple or 1,
        )

    def result(self, course: Course) -> int:
        """The last step that is within the tolerance."""
        ends = range(2, len(course.rounds) + 1, 2)
        return max((k for k in ends if lost_points(course, k) <= self.tolerance), default=0)

    def ending(self, course: Course) -> str:
        """Steps, tolerance, or nothing beyond the rule."""
        done = len(course.rounds)
        if done % 2:
            return f"step {done // 2 + 1} found nothing beyond the rule"
        if self.result(course) == done:
            return f"all {self.apoz.steps} steps done"
        lost = lost_points(course, done)
        return f"step {done // 2} lost {lost:.2f} points of accuracy, more than {self.tolerance:g}"
