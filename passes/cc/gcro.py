"""GCRO, global compression rate optimisation: which share of its MACs every layer gives up (METHODS 1.3).

Per layer, all units are removed one after the other, those first that lose least alone. The points

    R_t = 1 - MACs left / MACs,   I_t = the loss so far, divided by its largest,        where R_t > 0

are fitted by I = a exp(b R): weighted least squares of y = log(I + 1e-10) on R with weights w = sqrt(I),

    b = sum w (R - R') (y - y') / sum w (R - R')^2,   log a = y' - b R',        ' = mean weighted by w.

Then the layers share the global rate C so that dI/dR = x is the same for all of them:

    R_l(x) = clip(log(x / (a_l b_l)) / b_l, 0, ceiling_l),    sum_l F_l R_l(x) = C F_total               (1.3)

The sum grows with x, which is found by bisection of log x.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.errors import PassError
from graphcomp.passes.cc.units import Remainder, WeightShape

Points = NDArray[np.float64]
Slope = Literal["equal", "per_flop"]

OFFICIAL_CLIP = 0.90
"""What the authors' code counts for a layer beyond the ceiling while it solves; it then gets the ceiling."""


@dataclass(frozen=True)
class Fit:
    """I = a exp(b R)."""

    log_a: float
    b: float

    @property
    def a(self) -> float:
        """The loss at rate 0."""
        return math.exp(self.log_a)

    @property
    def log_slope(self) -> float:
        """log(a b): the logarithm of dI/dR at rate 0."""
        return self.log_a + math.log(self.b)


def curve_cost(shape: WeightShape) -> float:
    """Multiplications that a curve takes, roughly: new triples where a direction follows on channels."""
    n, c, r = shape.outputs, shape.channels, shape.directions
    changes = c * r / (c + r)
    return changes * r * r * (10 * r + n + c * shape.kernel) / 4  # 4: the layer shrinks meanwhile


def removal_curve(weight: Tensor, gradient: Tensor) -> tuple[Points, Points]:
    """(R_t, I_t) after each removal, in the order of removal, both of shape (c + r,); I not yet divided."""
    state = Remainder(weight, gradient)
    channel_losses = (state.importance * state.original.square()).sum((0, 2)).tolist()
    losses = np.array(channel_losses + state.parts().sum(1).tolist())
    dense = state.shape.macs()
    rates, total = [], []
    for unit in np.argsort(losses, kind="stable").tolist():
        state.remove(unit)
        whole = len(state.directions) == state.shape.directions
        left = state.shape.macs(len(state.channels), None if whole else len(state.directions))
        rates.append(1 - left / dense)
        total.append(state.loss)
    return np.array(rates), np.array(total)


def fit_exponential(rates: Points, losses: Points) -> Fit | None:
    """The weighted fit; None if fewer than two rates are positive, or if the loss does not rise with them."""
    useful = rates > 0
    rates, losses = rates[useful], losses[useful]
    peak = losses.max(initial=0.0)
    if peak <= 0:
        return None
    losses = np.clip(losses / peak, 0, None)  # rounding can leave -1e-20
    weights, logs = np.sqrt(losses), np.log(losses + 1e-10)
    mean_rate, mean_log = (np.average(v, weights=weights) for v in (rates, logs))
    spread = float((weights * (rates - mean_rate) ** 2).sum())
    if spread <= 1e-12 * weights.sum():
        return None
    b = float((weights * (rates - mean_rate) * (logs - mean_log)).sum()) / spread
    return Fit(float(mean_log - b * mean_rate), b) if b > 0 else None


def solve_rates(
    fits: Sequence[Fit | None],
    macs: Sequence[int],
    total: int,
    rate: float,
    ceilings: Sequence[float],
    *,
    slope: Slope = "equal",
    official_clip: bool = False,
) -> list[float]:
    """The rate of every layer, by (1.3).

    Args:
        fits: of the layers; one without a fit gets rate 0.
        macs: F_l.
        total: F_total, the MACs of the whole network: also of layers that are not compressed.
        rate: C.
        ceilings: the largest rate of each layer.
        slope: "per_flop" makes the slopes proportional to F_l, which minimises the sum of the losses (the
            Lagrange condition of min sum I_l subject to (1.3)); the authors' code takes equal ones.
        official_clip: while solving, count `OFFICIAL_CLIP` for layers beyond their ceiling.

    Raises:
        PassError: naming the largest rate that could be met.
    """
    active = [i for i, fit in enumerate(fits) if fit is not None and ceilings[i] > 0]
    chosen = [fit for i in active if (fit := fits[i]) is not None]
    size = np.array([macs[i] for i in active], dtype=np.float64)
    top = np.array([ceilings[i] for i in active])
    b = np.array([fit.b for fit in chosen])
    start = np.array([fit.log_slope for fit in chosen]) - (np.log(size) if slope == "per_flop" else 0)
    counted = np.minimum(top, OFFICIAL_CLIP) if official_clip else top

    def given_up(log_x: float) -> float:
        raw = (log_x - start) / b
        return float((size * np.where(raw > top, counted, np.clip(raw, 0, None))).sum())

    goal, found = rate * total, [0.0] * len(fits)
    if goal <= 0:
        return found
    most = float((size * counted).sum())
    if goal > most * (1 + 1e-12):
        raise PassError(
            f"rate: found {rate}, expected at most {most / total:.4f}, which is what {len(active)} layers of "
            f"{len(fits)} can give up (they hold {size.sum() / total:.4f} of the MACs); ask for less, "
            "include more layers, or set multiple=1"
        )
    log_x = _bisect(lambda v: given_up(v) >= goal, float(start.min()), float((start + b * top).max()))
    for i, value in zip(active, np.clip((log_x - start) / b, 0, top).tolist(), strict=True):
        found[i] = value
    return found


def _bisect(reached: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest number in [low, high] that reaches the goal, to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
