"""Which layers come back since their factors make the network slower; see `budget.restoring`.

Two thin layers take two launches and pass on what is between them, so that neither MACs nor widths say
whether they are faster than one weight: all are looked at. A layer that also reads only a part of its
channels becomes one weight that reads as little; if picking the channels is predicted to cost more than it
saves, the layer becomes what it was.
"""

from collections.abc import Iterable, Sequence

from graphcomp.base import distributed
from graphcomp.budget.factor_times import FactorCost, Factors
from graphcomp.budget.restoring import Paying, Revert, confirm, is_asked, restore
from graphcomp.budget.stopwatch import Clock
from graphcomp.factors import Factor, rank_text, rewrite, simulate
from graphcomp.ir import Program


def paying_factors(
    program: Program, factors: Sequence[Factor], revert: Revert, clock: Clock, multiple: int = 1
) -> Paying[Factors, str]:
    """The factors, by layer, without those that make the network slower; collective (see `distributed`).

    Args:
        program: they are for.
        factors: at most one a layer, each of which fits the program.
        revert: as asked for.
        multiple: as `factors.surgery.rewrite` is going to be told.

    Raises:
        ProviderError: if there is something to measure and the target does not work here.
    """
    planned = {factor.layer: factor for factor in factors}
    if not planned or not is_asked(revert, False, clock):
        return Paying(planned, {})
    return distributed.on_first(lambda: _paying_factors(program, planned, clock, multiple))


def _paying_factors(program: Program, planned: Factors, clock: Clock, multiple: int) -> Paying[Factors, str]:
    cost = FactorCost(program, clock.model(program), planned, multiple)
    restored, slower = restore(planned, list(planned), _instead, cost.parts)
    if not slower:
        return Paying(planned, {})

    def build(chosen: Factors) -> Program:
        listed = list(chosen.values())
        return rewrite(simulate(program, listed), listed, "trial", multiple)

    return confirm(planned, restored, slower, build, clock.stopwatch(program))


def _instead(chosen: Factors, layer: str) -> Iterable[Factors]:
    """One weight that reads the same channels, then the layer as it was."""
    factor = chosen.get(layer)
    if factor is None:
        return
    if factor.rank is not None and factor.keep is not None:
        yield {**chosen, layer: factor.as_one_weight()}
    yield {other: f for other, f in chosen.items() if other != layer}


def layer_left_alone(planned: Factor, left: Factor | None, ratio: float, channels: int) -> str:
    """Why a layer was restored.

    Args:
        planned, left: what it was going to be, and what it is; None: as it was.
        ratio: how many times slower it was predicted to be.
        channels: that arrive at it.
    """
    reads = "" if planned.keep is None else f"{len(planned.keep)} of {channels} channels"
    rank = "" if planned.rank is None else f"rank {rank_text(planned)}"
    slower = f"{' with '.join(filter(None, (rank, reads)))} predicted {ratio:.2f}x slower"
    return f"{slower}; left alone" if left is None else f"{slower}; one weight that reads {reads}"
