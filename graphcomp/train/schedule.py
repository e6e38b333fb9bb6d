"""Learning rates: a function of the step and of nothing else, so that a training resumes without their state.

With t = step / steps, the rate of step 0, 1, …, steps - 1 is

    constant    lr
    step        lr * factor ^ (number of milestones <= t)
    cosine      lr * (1 + cos(pi * (step - w) / (steps - w))) / 2          after w = warmup * steps steps
    one-cycle   lr / 25 -> lr over 30 % of the steps, then lr -> lr / 250,000, both along half a cosine
                (Smith & Topin 2018; the same numbers as torch's OneCycleLR)

and during the warm-up of the first three it is lr * (step + 1) / (w + 1).
"""

import math
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

OPTIONS = ConfigDict(extra="forbid")

CYCLE_RISE = 0.3
CYCLE_START, CYCLE_END = 1 / 25, 1 / 250_000
"""What the one-cycle rate starts and ends with, as fractions of its peak."""

USUAL = 0.01
"""The rate where none was asked for."""

Fraction = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, config=OPTIONS)
class Schedule:
    """Options that decide the learning rate of every step."""

    lr: Annotated[
        Annotated[float, Field(gt=0)] | Literal["auto"] | None,
        Field(
            description="the highest learning rate; auto: found by short trials, and with it `clip` and "
            "`statistics` where those are left open; default: 0.01, and auto behind weights that were fitted "
            "in closed form (`refit`)"
        ),
    ] = None
    schedule: Annotated[
        Literal["constant", "step", "cosine", "one-cycle"], Field(description="how the rate changes")
    ] = "cosine"
    milestones: Annotated[
        tuple[Fraction, ...], Field(description="fractions of the training at which `step` lowers the rate")
    ] = (0.5, 0.75)
    factor: Annotated[float, Field(gt=0, lt=1, description="that `step` lowers the rate by")] = 0.1
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="fraction of the training in which the rate rises from 0")
    ] = 0.0

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.schedule == "one-cycle" and self.warmup:
            raise ValueError("found warmup with schedule=one-cycle, which has its own, expected one of them")
        return self

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step`, 0 to `steps` - 1."""
        lr = self.highest
        warm = round(self.warmup * steps)
        if step < warm:
            return lr * (step + 1) / (warm + 1)
        if self.schedule == "step":
            return float(lr * self.factor ** sum(step >= m * steps for m in self.milestones))
        if self.schedule == "cosine":
            return lr * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        return lr * _cycle(step, steps) if self.schedule == "one-cycle" else lr

    @property
    def highest(self) -> float:
        """The highest rate, where it is known: `train.rates` finds it."""
        if self.lr == "auto":
            raise AssertionError("lr: found auto, expected a rate that was found")
        return USUAL if self.lr is None else self.lr


def _cycle(step: int, steps: int) -> float:
    """The one-cycle rate as a fraction of its peak."""
    top = CYCLE_RISE * steps - 1
    if step <= top:
        return _blend(CYCLE_START, 1.0, step / top if top else 1.0)
    return _blend(1.0, CYCLE_END, (step - top) / (steps - 1 - top))


def _blend(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
