"""Layers on the market: one energy for all, or rung by rung what saves most for the energy lost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphcomp.budget import Step, greedy, largest, rungs
from graphcomp.factors import Factor
from graphcomp.passes.low_rank.layer import Energies, SplitLayer


def one_for_all(layers: Sequence[SplitLayer], meets: Callable[[Energies], bool]) -> Energies | None:
    """The largest energy, the same for all layers, that meets a target; None if none does."""
    every = rungs(shares for layer in layers for shares in layer.preserved)
    index = largest(every, lambda energy: meets(dict.fromkeys(layers, energy)))
    return None if index is None else dict.fromkeys(layers, every[index])


def bought(
    layers: Sequence[SplitLayer], saving: Callable[[SplitLayer, Factor], float], whole: float, goal: float
) -> Energies | None:
    """What saves most for the energy lost, step by step, until the goal is met; None if it cannot be."""
    ladders = _Ladders(layers, saving, whole)
    kept = greedy(dict.fromkeys(layers, 0), ladders.cost, goal, ladders)
    return None if kept is None else {x: float(x.rungs[i - 1]) for x, i in kept.items() if i}


class _Ladders:
    """What can be bought of layers: their rungs, from 1 on; 0 is a layer as it is.

    Args:
        saving: what a layer's factors save.
        whole: what all costs without factors.
    """

    def __init__(
        self, layers: Sequence[SplitLayer], saving: Callable[[SplitLayer, Factor], float], whole: float
    ) -> None:
        self.whole = whole
        self.savings: dict[SplitLayer, NDArray[Any]] = {}
        self.losses: dict[SplitLayer, NDArray[Any]] = {}
        for layer in layers:
            factors = [layer.factor(layer.wanted(energy)) for energy in layer.rungs]
            self.savings[layer] = np.array([0, *(saving(layer, factor) for factor in factors)])
            self.losses[layer] = np.array([0.0, *(layer.lost(factor) for factor in factors)])

    def cost(self, choice: Mapping[SplitLayer, int]) -> float:
        """Of a rung for every layer."""
        return self.whole - float(sum(self.savings[layer][i] for layer, i in choice.items()))

    def steps(self, layer: SplitLayer, choice: Mapping[SplitLayer, int], cost: float) -> Iterator[Step[int]]:
        """The rung that saves most for the energy lost from here."""
        saved = self.savings[layer] - self.savings[layer][choice[layer]]
        lost = np.maximum(self.losses[layer] - self.losses[layer][choice[layer]], 1e-12)
        if (saved > 0).any():
            best = int(np.where(saved > 0, saved / lost, -np.inf).argmax())
            yield Step(best, cost - float(saved[best]), float(lost[best]))

    def taken(self, layer: SplitLayer, before: int, choice: Mapping[SplitLayer, int]) -> None:
        """Nothing: layers save and lose by themselves."""
