"""Play-and-Prune's pruner: an epoch that empties candidates, a cut that removes those that are (METHODS 3.2).

U_i = the floor(alpha |L_i|) filters of layer i with the smallest |f| of those left, |f| = sum |W|   (3.2)
one epoch on  C(Theta) + lambda_A sum_i sum_{f in U_i} |f|                                           (3.3)
remove { f in U_i : |f| <= W_A,i }                                                                   (3.4)
"""

from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, Lesson, Recovery, RowRemoval, options_of
from graphcomp.channels import Removal, analyse
from graphcomp.ir import Program
from graphcomp.passes.play_and_prune.filters import FilterLayer, candidates, emptied, find_layers, penalised
from graphcomp.pipeline import Context
from graphcomp.records import Plan
from graphcomp.train import TrainOptions, cross_entropy


@dataclass(frozen=True, config=OPTIONS)
class EpochOptions(TrainOptions):
    """How an epoch of the game is trained: options of `finetune` that suit one epoch after the other."""

    schedule: Annotated[
        Literal["constant", "step", "cosine", "one-cycle"], Field(description="within an epoch")
    ] = "constant"
    keep: Annotated[Literal["best", "last"], Field(description="last: the game judges")] = "last"

    @model_validator(mode="after")
    def _one_epoch(self) -> Self:
        fixed = {"epochs": 1, "keep": "last", "ema": None}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"found {name}={getattr(self, name)}, expected {value}: the game is played epoch by epoch"
                )
        if not self.held_out:
            raise ValueError("found held_out=0, expected held-out samples to judge every epoch by")
        return self


@dataclass(frozen=True, config=OPTIONS)
class Epoch(EpochOptions, Recovery):
    """Train one epoch with the l1 term on each layer's smallest filters; with weight 0 without it."""

    name: ClassVar[str] = "afp-epoch"

    weight: Annotated[float, Field(ge=0, description="lambda_A")] = 0.0
    alpha: Annotated[float, Field(gt=0, lt=1, description="fraction of a layer's filters")] = 0.1
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    pressure: Annotated[float, Field(ge=0, description="T_r, in points, that the weight comes from")] = 0.0

    def plan(self, program: Program, context: Context) -> Plan:
        """Also the candidates."""
        plan = super().plan(program, context)
        rows = {
            name: layer.rows_of(candidates(layer.norms, self.alpha))
            for name, layer in (self._layers(program) if self.weight else {}).items()
        }
        rows = {name: chosen for name, chosen in rows.items() if chosen}
        return plan.model_copy(
            update={
                "decisions": {**plan.decisions, "candidates": rows},
                "evidence": {"rate": self.pressure, "weight": self.weight},
            }
        )

    def lesson(self, program: Program, plan: Plan, context: Context) -> Lesson:
        """The labels, and small candidates."""
        rows = plan.decisions["candidates"]
        layers = self._layers(program) if rows else {}
        chosen = {name: (layers[name].axis, rows[name]) for name in rows}
        return Lesson(penalised(cross_entropy(self.label_smoothing), self.weight, chosen))

    def _layers(self, program: Program) -> dict[str, FilterLayer]:
        return find_layers(analyse(program), self.include, self.exclude)


@dataclass(frozen=True, config=OPTIONS)
class Cut(RowRemoval):
    """Remove the candidates whose norm is at most their layer's threshold."""

    name: ClassVar[str] = "afp-cut"

    candidates: dict[str, tuple[int, ...]]
    thresholds: Annotated[dict[str, float], Field(description="W_A by layer")]

    def plan(self, program: Program, context: Context) -> Plan:
        """Compare; removing nothing is no error."""
        channels = analyse(program)
        gone, scores = channels.marks(), np.zeros(len(channels.channel_of))
        layers = find_layers(channels)
        for name, rows in self.candidates.items():
            layer = layers[name]
            scores[layer.channels] = layer.norms
            chosen = np.flatnonzero(np.isin(layer.rows, rows))
            gone[layer.channels[emptied(layer.norms, chosen, self.thresholds[name])]] = True
        removal, _ = Removal(channels, gone).feasible(scores)
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"join": "couple", "rows": removal.rows},
            summary=f"removed {len(removal)} of {sum(map(len, self.candidates.values()))} candidates",
            evidence={"thresholds": self.thresholds},
        )
