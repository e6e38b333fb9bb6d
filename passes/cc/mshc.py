"""MSHC, multi-step heuristic compression: in which order the units of a layer go, and where to stop.

A unit counts what its removal loses, plus what the next removal would then lose on average:

    P_o = I(X_o) + gamma / (N - 1) * sum_{i != o} I(X_o minus i),     N units are left           (METHODS 1.4)
    the sum = (N - 1) I(X_o) - 4 S[G2 D_o X_o] + S[G2 X_o^2] + S[G2 * sum_i s_i^2 (u_i^2) (v_i^2)^T]    (1.5)

with G2 = G * G, D_o = X_o - W and the triples of X_o. For a direction these are those of X without one. For a
channel they are new: with X = U Y they come from the eigenvectors Q of Y Y^T - Y_o Y_o^T, which is R x R,

    last term = sum_i sum_ax (U Q)_ai^2 G2_ax (Q^T Y)_ix^2    over the columns x of the other channels.

All candidates are evaluated at once. A layer takes O((c + r) / T) steps of O(c (R^3 + n R c k)) each, where
(1.4) as it stands takes O((c + r)^2) singular value decompositions a step.

"held" keeps the triples of X for the channels' last term, which is then as cheap as all other terms together,
O(n R c k) a step. It is for layers so large that the exact term would take hours. On a trained ResNet-56 at
rate 0.5, where both can be had, it changes the order in most layers and the loss of all together by 0.02 %.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from graphcomp.passes.cc.lookahead import importances
from graphcomp.passes.cc.units import Remainder, Unit, WeightShape

Lookahead = Literal["auto", "exact", "held"]

AUTO_LIMIT = 1e12
"""Multiplications that the exact lookahead of a layer may take, about a minute, before "auto" holds."""


def step_size(shape: WeightShape, step: int | None) -> int:
    """T, the units that go after one evaluation: by default 1 % of all, at least 1."""
    return step or max(1, shape.units // 100)


def is_exact(shape: WeightShape, lookahead: Lookahead, step: int | None) -> bool:
    """Whether the channels' last term is computed exactly for a layer of this shape."""
    if lookahead != "auto":
        return lookahead == "exact"
    n, c, r = shape.outputs, shape.channels, shape.directions
    once = c * r * (10 * r * r + n * r + r * c * shape.kernel + n * c * shape.kernel)
    return once * shape.units / (3 * step_size(shape, step)) <= AUTO_LIMIT  # 3: the layer shrinks meanwhile


class Search:
    """The order in which the units of one layer go; it does not depend on how many will.

    Args:
        weight, gradient: (n, c, ...), of equal shapes.
        gamma: weight of the lookahead.
        step: T; None for the default.
        lookahead: see the module.
        units: what an earlier search over the same layer found; this one goes on from there.
    """

    def __init__(
        self,
        weight: Tensor,
        gradient: Tensor,
        gamma: float = 0.9,
        step: int | None = None,
        lookahead: Lookahead = "auto",
        units: Sequence[Unit] = (),
    ) -> None:
        self.state = Remainder(weight, gradient, units)
        self.units = list(units)
        self.gamma, self.step = gamma, step_size(self.state.shape, step)
        self.exact = is_exact(self.state.shape, lookahead, step)

    def advance(self) -> bool:
        """Remove the next T units; False if only one channel and one direction are left, which stay."""
        state, before = self.state, len(self.units)
        candidates = [u for u in state.units if state.removable(u)]
        if not candidates:
            return False
        scores = importances(state, self.gamma, self.exact).tolist()
        by_unit = dict(zip(state.units, scores, strict=True))
        for unit in sorted(candidates, key=by_unit.__getitem__):  # stable: channels before directions
            if state.removable(unit):
                state.remove(unit)
                self.units.append(unit)
            if len(self.units) - before == self.step:
                break
        return True
