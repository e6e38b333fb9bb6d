"""finetune: train on, so that accuracy that compression cost comes back.

    minimise over the weights   (1 / N) sum_n  l(f(a(x_n)), y_n) + weight decay + sparsity * sum |gamma|

with augmentation a, by SGD with momentum or AdamW, at the rates of `train.schedule`. The loss l is
cross-entropy (labels smoothed if asked for) for classes, and a distance, l1 by default, for labels that are
values. Shapes stay, frozen parameters and integers too; normalisations track new statistics.

With sparsity > 0 the scales gamma of all batch normalisations carry an l1 term, so that the network learns
which channels it can do without (Liu et al. 2017; their value is 1e-4). `slimming` then removes these. The
last epoch is then the result (keep=last): the best by accuracy may be the one before the scales shrank.

With epochs=0 and bn_reestimate=N only the normalisations' statistics are measured again, on N samples without
labels: the cheapest repair of a network whose activations have changed.
"""

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from graphcomp.bases import Lesson, Recovery
from graphcomp.errors import DataError, PassError
from graphcomp.ir import FrozenBatchNorm2d, Program
from graphcomp.pipeline import Context, Outlook
from graphcomp.records import Plan
from graphcomp.train import OPTIONS, BatchNorm, Distance, Loss, Seen, cross_entropy, value_loss


@dataclass(frozen=True, config=OPTIONS)
class Finetune(Recovery):
    """Train on labelled data; the best epoch by held-out training samples is the result."""

    name: ClassVar[str] = "finetune"

    loss: Annotated[
        Literal["auto", "cross-entropy"] | Distance,
        Field(description="auto: cross-entropy for classes, l1 for labels that are values"),
    ] = "auto"
    sparsity: Annotated[
        float, Field(ge=0, description="of the l1 term on the scales of batch normalisations, e.g. 1e-4")
    ] = 0.0

    @model_validator(mode="after")
    def _sparsity_is_kept(self) -> Self:
        if self.sparsity and self.keep == "best":
            raise ValueError(
                "found sparsity with keep=best, which may take back the epochs that made scales small, "
                "expected keep=last"
            )
        return self

    def require(self, outlook: Outlook) -> None:
        """Also scales, for `sparsity`, and labels that suit the loss."""
        super().require(outlook)
        if self.epochs:
            self.lesson(outlook.program, Plan(name=self.name), outlook.context)

    def lesson(self, program: Program, plan: Plan, context: Context) -> Lesson:
        """The labels."""
        values = context.data is not None and context.data.regression
        learn = self._loss(values)
        return Lesson(learn if not self.sparsity else with_sparsity(learn, program, self.sparsity))

    def _loss(self, values: bool) -> Loss:
        if self.loss == "auto":
            return value_loss() if values else cross_entropy(self.label_smoothing)
        if (self.loss == "cross-entropy") == values:
            found, expected = ("values", "classes") if values else ("classes", "values")
            raise DataError(
                f"finetune: loss={self.loss}: found {found} as labels, expected {expected}; use auto"
            )
        return cross_entropy(self.label_smoothing) if self.loss == "cross-entropy" else value_loss(self.loss)


def with_sparsity(loss: Loss, program: Program, strength: float) -> Loss:
    """A loss plus `strength * sum |gamma|` over the scales of all batch normalisations (Liu et al. 2017).

    Raises:
        PassError: if there is no batch normalisation.
    """
    norms = [
        name
        for name, module in program.modules.items()
        if isinstance(module, BatchNorm) and not isinstance(module, FrozenBatchNorm2d)
    ]
    scales = [f"{name}.weight" for name in norms if f"{name}.weight" in program.tensors]
    if not scales:
        raise PassError(
            "sparsity: found no batch normalisation with scales, expected at least one; fold-bn removes "
            "them: run it later; files have them folded mostly: refit, and l1 with ratio, work without"
        )

    def penalised(seen: Seen) -> Tensor:
        return loss(seen) + strength * torch.stack([seen.tensors[s].abs().sum() for s in scales]).sum()

    return penalised
