"""finetune: train on, so that accuracy that compression cost comes back.

    minimise over the weights   (1 / N) sum_n  CE(f(a(x_n)), y_n) + weight decay,      a: augmentation

with cross-entropy CE (labels smoothed if asked for), by SGD with momentum or AdamW, at the rates of
`graphcomp.schedule`. Shapes stay, frozen parameters and integers too; normalisations track new statistics.

With epochs=0 and bn_reestimate=N only the normalisations' statistics are measured again, on N samples without
labels: the cheapest repair of a network whose activations have changed.
"""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from graphcomp.pipeline import Context
from graphcomp.program import Program
from graphcomp.recovery import Lesson, Recovery
from graphcomp.schedule import OPTIONS
from graphcomp.train import cross_entropy


@dataclass(frozen=True, config=OPTIONS)
class Finetune(Recovery):
    """Train on labelled data; the best epoch by held-out training samples is the result."""

    name: ClassVar[str] = "finetune"

    def lesson(self, program: Program, context: Context) -> Lesson:
        """The labels."""
        return Lesson(cross_entropy(self.label_smoothing))
