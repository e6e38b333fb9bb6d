"""What every layer becomes: the form that meets its rate, what is handed back, and what it is on record."""

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any

from pydantic import Field

from graphcomp.budget import (
    Factors,
    Paying,
    give_back,
    layer_left_alone,
)
from graphcomp.factors import Factor
from graphcomp.passes.cc.analysis import Analysis
from graphcomp.passes.cc.forms import Compression, least_macs
from graphcomp.passes.cc.units import Unit
from graphcomp.records import LeftAlone, Record


class Allocated(Record):
    """What was decided for one layer; `evidence["layers"]` of a plan is a list of them."""

    factor: Factor = Field(description="the layer, the input channels that it reads, the rank of its factors")
    reason: str | None = Field(description="why the layer stays as it is all the same; null if it does not")
    rate: float = Field(description="of its MACs, that it was to give up")
    reached: float = Field(description="of its MACs, that it gives up; before channels that nobody reads go")
    macs: int = Field(description="for one sample, before")
    channels: int = Field(description="input channels before")
    full_rank: int = Field(description="singular directions before")
    fit: tuple[float, float] | None = Field(
        description="(a, b) of loss = a exp(b rate); null if there is none"
    )
    exact: bool = Field(description="whether the lookahead is exact")
    removed: list[Unit] = Field(
        description="units in order of removal: j < channels is channel j, channels + d is direction d"
    )


@plain_dataclass(frozen=True, eq=False)
class CompressibleLayer:
    """A layer with what it may become.

    Attributes:
        name: module path.
        analysis: of its weight.
        macs: of all its calls, for one sample.
        multiple: that widths and ranks are rounded up to.
    """

    name: str
    analysis: Analysis
    macs: int
    multiple: int

    @property
    def positions(self) -> int:
        """Output positions of all calls; `WeightShape.macs` counts one."""
        return self.macs // self.analysis.shape.macs()

    @property
    def most(self) -> float:
        """The largest rate that it can reach."""
        return 1 - least_macs(self.analysis.shape, self.multiple) / self.analysis.shape.macs()

    def form(self, goal: float) -> Compression:
        """The first form of at most `goal` MACs."""
        return self.analysis.form(goal / self.positions, self.multiple)

    def factor(self, form: Compression) -> Factor:
        """The form as data; two factors only where they are cheaper than one weight that reads as little."""
        shape = self.analysis.shape
        keep = None if len(form.keep) == shape.channels else list(form.keep)
        cheaper = form.rank is not None and form.macs < shape.macs(len(form.keep))
        return Factor(layer=self.name, keep=keep, rank=form.rank if cheaper else None)

    def reason(self, rate: float) -> str:
        """Why it stays whole."""
        shape = self.analysis.shape
        if self.most <= 0:
            least = least_macs(shape, self.multiple)
            return (
                f"in multiples of {self.multiple} every form costs {least * self.positions:,} MACs or more, "
                f"one weight {self.macs:,}"
            )
        if self.analysis.fit is None:
            return "its loss does not rise with the rate: the gradient says nothing about it"
        if rate > 0:
            return "the others give up enough, since they are rounded"
        return "every rate would lose more than the other layers do for theirs"


def settled(rows: Sequence[Allocated], paid: Paying[Factors, str]) -> tuple[list[Allocated], list[LeftAlone]]:
    """What was decided, with what became of layers that do not pay; and why some of them are one weight."""
    found: list[Allocated] = []
    kept: list[LeftAlone] = []
    for row in rows:
        layer = row.factor.layer
        left, change = paid.choice.get(layer), dict[str, Any]()
        if layer in paid.slower:
            reason = layer_left_alone(row.factor, left, paid.slower[layer], row.channels)
            if left is None or left.keep is None:
                change = {"reason": reason}
            else:
                kept.append(LeftAlone(where=layer, reason=reason))
                change = {"factor": left, "reached": 1 - len(left.keep) / row.channels}
        found.append(row.model_copy(update=change))
    return found, kept


def hand_back(
    layers: Sequence[CompressibleLayer], goals: Sequence[float], forms: Sequence[Compression]
) -> list[Compression]:
    """Forms with more MACs, but in total no more than the goals of all layers together.

    Rounded forms are below their goals. Of what there is to spare, the layers that are furthest below theirs
    get back first, one step each.
    """
    choice = dict(zip(layers, forms, strict=True))
    spare = {x: (goal - choice[x].macs * x.positions) / x.macs for x, goal in zip(layers, goals, strict=True)}
    furthest = sorted(layers, key=spare.__getitem__, reverse=True)
    earlier = ((x, x.analysis.step_back(choice[x], x.multiple)) for x in furthest)
    goal = sum(goals)
    kept = give_back(choice, earlier, lambda t: sum(f.macs * x.positions for x, f in t.items()) <= goal)
    return list(kept.values())
