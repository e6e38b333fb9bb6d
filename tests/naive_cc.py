"""CC by the letter of METHODS 1.1 to 1.4: whole matrices, a full singular value decomposition at every turn.

Slow, and without any of the closed forms that `passes.cc.units` and `_mshc` rest on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Rates = list[float]


def weights(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with well separated singular values, and a gradient, float64."""
    generator = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return w, g


@dataclass
class Naive:
    """A matrix that units are taken from."""

    weight: Tensor
    gradient: Tensor
    current: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n, c = self.weight.shape[:2]
        self.width = c
        self.current = self.weight.reshape(n, c, -1).clone()
        self.full = min(n, self.current[0].numel())
        self.channels, self.directions = list(range(c)), list(range(self.full))

    @property
    def units(self) -> list[int]:
        return self.channels + [self.width + d for d in self.directions]

    def loss(self, x: Tensor) -> float:
        change = x - self.weight.reshape(x.shape)
        return float((self.gradient.reshape(x.shape) * change).square().sum())

    def without(self, x: Tensor, unit: int, directions: Sequence[int]) -> Tensor:
        """`x` without a unit; `directions` are those that it still has."""
        if unit < self.width:
            x = x.clone()
            x[:, unit] = 0
            return x
        u, s, v = torch.linalg.svd(x.flatten(1), full_matrices=False)
        s[list(directions).index(unit - self.width)] = 0
        return ((u * s) @ v).reshape(x.shape)

    def remove(self, unit: int) -> None:
        self.current = self.without(self.current, unit, self.directions)
        if unit < self.width:
            self.channels.remove(unit)
        else:
            self.directions.remove(unit - self.width)

    def importance(self, unit: int, gamma: float) -> float:
        """(1.4) as it stands."""
        x = self.without(self.current, unit, self.directions)
        directions = [d for d in self.directions if d != unit - self.width]
        others = [u for u in self.units if u != unit]
        nexts = [self.loss(self.without(x, other, directions)) for other in others]
        return self.loss(x) + (gamma / len(nexts) * sum(nexts) if nexts else 0)

    def macs(self) -> int:
        """A position; factored if a direction is gone."""
        n, _, k = self.current.shape
        if len(self.directions) == self.full:
            return n * len(self.channels) * k
        return len(self.directions) * (len(self.channels) * k + n)


def curve(weight: Tensor, gradient: Tensor) -> tuple[Rates, Rates]:
    """GCRO's (R_t, I_t)."""
    state = Naive(weight, gradient)
    dense = state.macs()
    alone = {u: state.loss(state.without(state.current, u, state.directions)) for u in state.units}
    rates, losses = [], []
    for unit in sorted(alone, key=alone.__getitem__):
        state.remove(unit)
        rates.append(1 - state.macs() / dense)
        losses.append(state.loss(state.current))
    return rates, losses


def search(weight: Tensor, gradient: Tensor, step: int, gamma: float = 0.9) -> list[int]:
    """The order in which MSHC removes units, `step` at a time, down to one channel and one direction."""
    state, order = Naive(weight, gradient), list[int]()
    while len(state.channels) > 1 or len(state.directions) > 1:
        importance = {u: state.importance(u, gamma) for u in state.units}
        gone = 0
        for unit in sorted(importance, key=importance.__getitem__):
            if gone < step and len(state.channels if unit < state.width else state.directions) > 1:
                state.remove(unit)
                order.append(unit)
                gone += 1
    return order
