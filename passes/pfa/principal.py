"""The mathematics of principal filter analysis, on covariance matrices (METHODS 5.2 to 5.5).

    spectrum     l_1 >= ... >= l_n >= 0, sum 1: the normalised eigenvalues of the responses' covariance
    energy       k(tau) = min { k : l_1 + ... + l_k >= tau }
    divergence   KL(l || 1/n) = sum l_i log(n l_i) = log n - H(l),  from 0 to u = log n
                 gamma = psi(KL, u),  k = max(1, ceil(n gamma))                                         (5.1)
    selection    while more than k are left: remove argmax_i sum_j |rho_ij| over those that are left

The spectrum is that of the covariance, not of the correlations: a channel that hardly varies holds little
energy. The selection goes by correlations: a channel is redundant if others vary with it, however much.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from graphcomp.channels import Ints

Bools = NDArray[np.bool_]
Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

DEAD = 1e-8
"""A channel is dead whose variance is below this part of the largest."""

COUNT_TOLERANCE = 1e-9
TIE_TOLERANCE = 1e-12

Map = Literal["linear", "quadratic", "effective-rank"]
ChannelNorm = Literal["l1", "l2"]

MAPS: dict[Map, Callable[[float, float], float]] = {
    "linear": lambda x, u: 1 - x / u,
    "quadratic": lambda x, u: 1 - (x / u) ** 2,
    "effective-rank": lambda x, u: math.exp(-x),
}
"""psi(x, u): divergence x in [0, u] -> fraction of the channels that stays.

`linear` is the paper's, `quadratic` keeps more. `effective-rank` keeps less: exp(-x) = exp(H) / n, where
exp(H) is the effective rank of Roy and Vetterli (2007).
"""


def spectrum(covariance: Matrix) -> Vector:
    """Eigenvalues of a covariance (n, n), largest first, not negative, sum 1; all 0 if nothing varies."""
    with _one_thread():
        values = torch.linalg.eigvalsh(torch.from_numpy(covariance)).flip(0).clamp(min=0).numpy()
    total = float(values.sum())
    return values / total if total > 0 else np.zeros_like(values)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads gain little on matrices of this size, and cost seconds where others use the cores as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def energies(eigenvalues: Vector, dead: int = 0) -> Vector:
    """What share of the energy the first 1, 2, …, n directions hold: the break points of an energy's count.

    Channels that are `dead` preserve nothing: what is left without them counts as all (METHODS 5.5).
    """
    held = np.cumsum(eigenvalues)
    held[max(len(held) - dead, 1) - 1 :] = 1.0
    return held


def divergence(eigenvalues: Vector) -> float:
    """KL(l || uniform) = log n - H(l), with 0 log 0 = 0; natural logarithm."""
    positive = eigenvalues[eigenvalues > 0]
    return math.log(len(eigenvalues)) + float((positive * np.log(positive)).sum())


def gamma_kl(eigenvalues: Vector, psi: Map = "linear") -> float:
    """The fraction of channels that stays (5.1); 1 for a single channel, where the bound log n is 0."""
    n = len(eigenvalues)
    return 1.0 if n == 1 else MAPS[psi](divergence(eigenvalues), math.log(n))


def count_kl(eigenvalues: Vector, dead: int = 0, psi: Map = "linear") -> int:
    """How many channels stay by the divergence (5.1); never a dead one, 1 if nothing varies."""
    n = len(eigenvalues)
    if not eigenvalues.any():
        return 1
    wanted = math.ceil(n * gamma_kl(eigenvalues, psi) - COUNT_TOLERANCE)
    return max(1, min(wanted, n - dead))


def dead_channels(covariance: Matrix) -> Bools:
    """Which channels do not vary, (n,): `C_ii < 1e-8 max_j C_jj`; all of them if none does."""
    variance = np.diagonal(covariance)
    dead: Bools = (variance < DEAD * variance.max()) | (variance <= 0)
    return dead


def pearson(covariance: Matrix) -> Matrix:
    """Correlations (n, n), `C_ij / sqrt(C_ii C_jj)`; 0 on the diagonal and for dead channels."""
    dead = dead_channels(covariance)
    scale = 1 / np.sqrt(np.where(dead, 1.0, np.diagonal(covariance)))
    scale[dead] = 0.0
    rho = covariance * scale[:, None] * scale
    np.fill_diagonal(rho, 0.0)
    return rho


def removal_order(correlation: Matrix, dead: Bools, norm: ChannelNorm = "l1") -> Ints:
    """All channels, first removed first: dead ones, then always the one most correlated with those left.

    Args:
        correlation: (n, n), symmetric; the diagonal and the sign do not matter.
        dead: (n,), channels that have no correlations.
        norm: of a channel's correlations with the others that are left.

    Ties go to the channel with the largest single correlation, then to the smallest index (METHODS 5.5).
    The norms are updated and not computed anew: O(n) a removal. The rounding that n updates of sums below n
    add up to, n^2 eps / 2, stays below the tolerance for ties, 1e-12 n, for all n < 9000.
    """
    n = len(dead)
    weights = np.abs(correlation)
    np.fill_diagonal(weights, 0.0)
    magnitudes, peaks = weights, weights.max(1)
    if norm == "l2":
        weights = weights**2
    sums = weights[:, ~dead].sum(1)
    sums[dead] = -np.inf
    order = np.empty(n, np.int64)
    gone = int(dead.sum())
    order[:gone] = np.flatnonzero(dead)
    for step in range(gone, n):
        tied = np.flatnonzero(sums >= sums.max() - TIE_TOLERANCE * n)
        index = int(tied[0]) if len(tied) == 1 else _most_correlated(magnitudes, peaks, tied, sums > -np.inf)
        order[step] = index
        sums -= weights[index]
        sums[index] = -np.inf
    return order


def _most_correlated(magnitudes: Matrix, peaks: Vector, tied: Ints, left: Bools) -> int:
    """The first of the tied channels with the largest single correlation; `peaks` are bounds of it."""
    first = int(tied[0])
    if magnitudes[first, left].max() >= peaks[tied].max() - TIE_TOLERANCE:
        return first  # where all are tied (perfectly correlated, or not at all), the search is O(n) too
    single = magnitudes[np.ix_(tied, np.flatnonzero(left))].max(1)
    return int(tied[np.argmax(single >= single.max() - TIE_TOLERANCE)])
