"""Play-and-Prune's pruner: an epoch that empties candidates, a cut that removes those that are (METHODS 3.2).

U_i = the floor(alpha |L_i|) filters of layer i with the smallest |f| of those left, |f| = sum |W|   (3.2)
one epoch on  C(Theta) + lambda_A sum_i sum_{f in U_i} |f|                                           (3.3)
remove { f in U_i : |f| <= W_A,i }                                                                   (3.4)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from graphcomp.bases import OPTIONS, Lesson, Recovery, RowRemoval, filter_norms, filters, matches, options_of
from graphcomp.budget import Scores
from graphcomp.channels import Axis, Channels, Ints, analyse, dropped_rows, feasible, layer_name, no_drop
from graphcomp.ir import Program
from graphcomp.pipeline import Context
from graphcomp.records import Plan
from graphcomp.train import Loss, Seen, TrainOptions, cross_entropy


@plain_dataclass(frozen=True, eq=False)
class FilterLayer:
    """The filters of a layer that can go one by one: no other layer shares their channels.

    Attributes:
        axis: the layer's output.
        rows: which of its filters.
        channels: theirs, aligned with `rows`.
        norms: |f|, aligned with `rows`.
    """

    axis: Axis
    rows: Ints
    channels: Ints
    norms: Scores

    def rows_of(self, positions: Ints) -> list[int]:
        """Rows of the filters at `positions`, ascending."""
        return [int(row) for row in sorted(self.rows[positions])]


def find_layers(
    channels: Channels, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, FilterLayer]:
    """The layers that the game is played on, by name: globs on module paths."""
    alone: dict[str, list[Ints]] = {}
    for group in channels.removable:
        for layer, rows in group.producers.items():
            is_alone = len(group.producers) == 1 and len(rows) == len(group.channels)
            if is_alone and matches((layer,), include) and not matches((layer,), exclude):
                alone.setdefault(layer, []).append(rows)
    found = {}
    for axis in channels.axes:
        name = layer_name(axis)
        if axis.role == "out" and name in alone:
            rows = np.sort(np.concatenate(alone[name]))
            norms = filter_norms(channels.program.tensors[axis.tensors[0][0]], axis)
            found[name] = FilterLayer(axis, rows, axis.channels[rows], norms[rows])
    return found


def candidates(norms: Scores, alpha: float) -> Ints:
    """Positions of U: the floor(alpha n) smallest of n norms (3.2)."""
    return np.argsort(norms, kind="stable")[: math.floor(alpha * len(norms) + 1e-9)]


def emptied(norms: Scores, chosen: Ints, threshold: float) -> Ints:
    """Positions of the candidates that go: |f| <= threshold (3.4)."""
    return chosen[norms[chosen] <= threshold]


def penalised(loss: Loss, weight: float, chosen: Mapping[str, tuple[Axis, Sequence[int]]]) -> Loss:
    """A loss with the l1 term on the chosen filters, and on no others (3.3).

    Args:
        loss: of the task.
        weight: lambda_A.
        chosen: layer -> its output axis and rows of filters.
    """

    def with_term(seen: Seen) -> Tensor:
        norms = [
            filters(seen.tensors[axis.tensors[0][0]], axis)[list(rows)].abs().sum()
            for axis, rows in chosen.values()
        ]
        return loss(seen) + weight * torch.stack(norms).sum() if norms else loss(seen)

    return with_term


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
        drop, scores = no_drop(channels), np.zeros(len(channels.channel_of))
        layers = find_layers(channels)
        for name, rows in self.candidates.items():
            layer = layers[name]
            scores[layer.channels] = layer.norms
            chosen = np.flatnonzero(np.isin(layer.rows, rows))
            drop[layer.channels[emptied(layer.norms, chosen, self.thresholds[name])]] = True
        drop, _ = feasible(channels, drop, scores)
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"join": "couple", "rows": dropped_rows(channels, drop)},
            summary=f"removed {int(drop.sum())} of {sum(map(len, self.candidates.values()))} candidates",
            evidence={"thresholds": self.thresholds},
        )
