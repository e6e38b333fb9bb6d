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

from dataclasses import replace
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, RatioRemoval, options_of
from graphcomp.budget import Scores
from graphcomp.channels import ChannelGroup, Channels
from graphcomp.passes.apoz.steps import Steps
from graphcomp.passes.apoz.zeros import activity, beyond_sigma
from graphcomp.passes.finetune import Finetune
from graphcomp.pipeline import Context, Outlook, require_data


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
    def iteration(self) -> Steps | None:
        """None for one step."""
        if self.steps == 1:
            return None
        once = replace(self, steps=1, tolerance=None, finetune=None, multiple=self.multiple or 1)
        tolerance = 1.0 if self.tolerance is None else self.tolerance
        return Steps(options_of(self), once, self.finetune or Finetune(), self.steps, tolerance)

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        """1 - APoZ."""
        return activity(channels, context, self.samples)

    def own_count(self, scores: Scores, group: ChannelGroup) -> int:
        """The sigma rule."""
        gone = beyond_sigma(1 - scores[group.channels])
        return len(group.channels) - min(len(gone), int(self.max_fraction * len(group.channels)))
