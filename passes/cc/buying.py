"""Which form every layer takes: MACs are bought greedily for what they lose."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from graphcomp.budget import Step, greedy
from graphcomp.errors import PassError
from graphcomp.factors import Factor
from graphcomp.ir import Program
from graphcomp.measure import macs
from graphcomp.passes.cc.decided import Allocated
from graphcomp.passes.cc.responses import LEAST, Form, Forms


def bought(program: Program, layers: Sequence[Forms], rate: float) -> list[Allocated]:
    """A row a layer, such that a rate of the network's MACs goes; PassError if it cannot."""
    whole = macs(program)
    market = _Market(whole)
    start = dict.fromkeys(layers, 0)
    kept = greedy(start, market.cost, (1 - rate) * whole, market)
    if kept is None:
        most = sum(float(x.saved.max()) for x in layers) / whole
        raise PassError(
            f"rate: found {rate}, expected at most {most:.4f}, which is what {len(layers)} layers can give "
            "up; ask for less, include more layers, or set multiple=1"
        )
    return [_row(x, x.forms[i]) for x, i in kept.items()]


def _row(x: Forms, form: Form) -> Allocated:
    keep = None if len(form.keep) == x.shape.channels else list(form.keep)
    reached = 1 - form.macs / x.shape.macs()
    return Allocated(
        factor=Factor(layer=x.layer, keep=keep, rank=form.rank),
        reason=None if reached else "the others lose less for what they give up",
        rate=reached,
        reached=reached,
        macs=x.macs,
        channels=x.shape.channels,
        full_rank=x.shape.directions,
        fit=None,
        exact=True,
        removed=[],
    )


class _Market:
    """Forms of layers; a state is the number of one."""

    def __init__(self, whole: float) -> None:
        self.whole = whole

    def cost(self, choice: Mapping[Forms, int]) -> float:
        """MACs of the network."""
        return self.whole - float(sum(x.saved[i] for x, i in choice.items()))

    def steps(self, item: Forms, choice: Mapping[Forms, int], cost: float) -> Iterator[Step[int]]:
        """The form that saves most for what it loses from here."""
        now = choice[item]
        saved, lost = item.saved[now + 1 :] - item.saved[now], item.lost[now + 1 :] - item.lost[now]
        if len(saved):
            best = int((saved / np.maximum(lost, LEAST)).argmax())
            yield Step(now + 1 + best, cost - float(saved[best]), max(float(lost[best]), LEAST))

    def taken(self, item: Forms, before: int, choice: Mapping[Forms, int]) -> None:
        """Nothing: layers save and lose by themselves."""
