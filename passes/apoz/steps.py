"""`apoz` over several steps: remove, fine-tune, and again while the accuracy allows (METHODS 2.4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.measure import is_classifier
from graphcomp.passes.finetune import Finetune
from graphcomp.pipeline import Context, Course, Outlook, Pass, lost_points, require_trained
from graphcomp.records import Plan


@dataclass(frozen=True)
class Steps:
    """Rounds 1, 3, … remove, rounds 2, 4, … fine-tune.

    Attributes:
        options: of the pass as it was asked for.
        removal, finetune: one step.
        steps: at most.
        tolerance: points of accuracy that may be lost.
    """

    name: ClassVar[str] = "apoz"
    keeps_momenta: ClassVar[bool] = False  # every fine-tuning has a schedule of its own

    options: Mapping[str, Any]
    removal: Pass
    finetune: Finetune
    steps: int
    tolerance: float

    @property
    def held_out(self) -> float:
        """What the trainings hold out anyway."""
        return self.finetune.held_out

    @property
    def most_rounds(self) -> int:
        """Two a step."""
        return 2 * self.steps

    def plan(self, program: Program, context: Context) -> Plan:
        """Check now that the network can be trained, rather than after the first removal."""
        self.require(Outlook(program, context))
        return Plan(name=self.name, options=dict(self.options))

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
        return self.removal

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
            return f"all {self.steps} steps done"
        lost = lost_points(course, done)
        return f"step {done // 2} lost {lost:.2f} points of accuracy, more than {self.tolerance:g}"
