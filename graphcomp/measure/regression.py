"""Least squares from sums: regressions of targets on patches, streamed, in groups.

    C = E (a - m)(a - m)^T,    B = E (a - m)(t - s)^T,    m = E a,  s = E t                    (METHODS 9.5)
    W = W0 + [(C + r I)^-1 (B - C W0^T)]^T,    b = s - W m,        r = ridge * mean diag C

Products in float32, sums and solves in float64. The ridge pulls towards the weights W0 as they were. The rows
are shifted by those of the first batch: without that a large mean would cancel the variance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from graphcomp.base import distributed
from graphcomp.errors import AnalysisError

FLOOR = 1e-12
"""Least ridge, absolute: where all inputs are constant nothing is learned, and nothing divided by zero."""

LEAST = 1e-12
"""Of a matrix's largest entry: added first where rounding left it indefinite; then ten times that, …"""

STEPS, CONVERGED = 200, 1e-16
"""Of conjugate gradients: at most so many, until the squared residual has fallen to this part."""


@dataclass(eq=False)
class Moments:
    """Sums over rows a `[n, g, K]` and targets t `[n, g, o]`; several add up, also over processes.

    Attributes:
        shift_a, shift_t: float32 `[g, K]`, `[g, o]`, subtracted first; the same everywhere.
        rows: how many.
        a, t, aa, at, tt: float64 sums `[g, K]`, `[g, o]`, `[g, K, K]`, `[g, K, o]`, `[g, o]` of shifted rows.
    """

    shift_a: Tensor
    shift_t: Tensor
    rows: Tensor = field(init=False)
    a: Tensor = field(init=False)
    t: Tensor = field(init=False)
    aa: Tensor = field(init=False)
    at: Tensor = field(init=False)
    tt: Tensor = field(init=False)

    def __post_init__(self) -> None:
        (g, k), o = self.shift_a.shape, self.shift_t.shape[1]
        shapes = {"rows": (), "a": (g, k), "t": (g, o), "aa": (g, k, k), "at": (g, k, o), "tt": (g, o)}
        for name, shape in shapes.items():
            setattr(self, name, torch.zeros(shape, dtype=torch.float64, device=self.shift_a.device))

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What adds up."""
        return self.rows, self.a, self.t, self.aa, self.at, self.tt

    def add(self, a: Tensor, t: Tensor) -> None:
        """Count in rows `[n, g, K]` and their targets `[n, g, o]`."""
        a, t = a - self.shift_a, t - self.shift_t
        by_group = a.permute(1, 2, 0)
        self.rows += len(a)
        self.a += a.sum(0, dtype=torch.float64)
        self.t += t.sum(0, dtype=torch.float64)
        self.aa += torch.bmm(by_group, a.transpose(0, 1)).double()
        self.at += torch.bmm(by_group, t.transpose(0, 1)).double()
        self.tt += t.square().sum(0, dtype=torch.float64)

    def retarget(self, a: Tensor, t: Tensor) -> None:
        """Add other targets for the same rows: what depends on targets alone."""
        a, t = a - self.shift_a, t - self.shift_t
        self.t += t.sum(0, dtype=torch.float64)
        self.at += torch.bmm(a.permute(1, 2, 0), t.transpose(0, 1)).double()
        self.tt += t.square().sum(0, dtype=torch.float64)

    def without_targets(self) -> "Moments":
        """The same rows, ready for other targets."""
        new = Moments(self.shift_a, self.shift_t)
        new.rows, new.a, new.aa = self.rows, self.a, self.aa
        return new

    def all_reduce(self, targets_only: bool = False) -> None:
        """Add up over all processes; collective."""
        distributed.all_reduce((self.t, self.at, self.tt) if targets_only else self.sums)

    def plus(self, other: "Moments") -> "Moments":
        """Both together; of equal shifts."""
        new = Moments(self.shift_a, self.shift_t)
        for name in ("rows", "a", "t", "aa", "at", "tt"):
            setattr(new, name, getattr(self, name) + getattr(other, name))
        return new

    def centred(self, intercept: bool = True) -> "Normal":
        """The normal equations, around the means; around zero where there is no intercept."""
        n = float(self.rows)
        da, dt = self.a / n, self.t / n
        gram = self.aa / n - da.unsqueeze(2) * da.unsqueeze(1)
        cross = self.at / n - da.unsqueeze(2) * dt.unsqueeze(1)
        power = (self.tt / n - dt.square()).clamp_(min=0)
        mean_a, mean_t = self.shift_a.double() + da, self.shift_t.double() + dt
        if not intercept:
            gram += mean_a.unsqueeze(2) * mean_a.unsqueeze(1)
            cross += mean_a.unsqueeze(2) * mean_t.unsqueeze(1)
            power += mean_t.square()
        return Normal(gram, cross, power, mean_a, mean_t, intercept)


def root(matrices: Tensor) -> Tensor:
    """Cholesky factors of symmetric matrices `[…, K, K]`.

    One that rounding left indefinite gets as much more on its diagonal as it takes: `LEAST` of its largest
    entry, then ten times that, …

    Raises:
        AnalysisError: a value that is not finite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrices)
    share = LEAST
    while bool(failed.any()):
        size = matrices.abs().amax((-2, -1)).clamp(min=FLOOR).unsqueeze(-1)
        if not bool(size.isfinite().all()):
            raise AnalysisError("regression: found a value that is not finite, expected none")
        damped = matrices.clone()
        more = torch.where(failed.unsqueeze(-1) > 0, share * size, 0)
        damped.diagonal(dim1=-2, dim2=-1).add_(more)
        factor, failed = torch.linalg.cholesky_ex(damped)
        share *= 10
    return cast(Tensor, factor)


@dataclass(eq=False)
class Normal:
    """The normal equations of a regression; all float64.

    Attributes:
        gram, cross, power: C `[g, K, K]`, B `[g, K, o]` and E (t - s)^2 `[g, o]`.
        mean_a, mean_t: m `[g, K]` and s `[g, o]`.
        intercept: whether there is one; False: all is around zero, and b is 0.
    """

    gram: Tensor
    cross: Tensor
    power: Tensor
    mean_a: Tensor
    mean_t: Tensor
    intercept: bool

    def bias(self, w: Tensor) -> Tensor:
        """b `[g, o]` of the least error for a given W `[g, o, K]`."""
        if not self.intercept:
            return torch.zeros_like(self.mean_t)
        return self.mean_t - torch.einsum("gok,gk->go", w, self.mean_a)

    def error(self, w: Tensor, b: Tensor) -> Tensor:
        """E (t - W a - b)^2 `[g, o]`; b is ignored without an intercept."""
        half = w @ self.gram
        quadratic = (half * w).sum(2) - 2 * (w * self.cross.transpose(1, 2)).sum(2)
        found = (self.power + quadratic).clamp_(min=0)
        return found + (self.bias(w) - b).square() if self.intercept else found

    def factor(self, ridge: float) -> Tensor:
        """The Cholesky factor of C + ridge * mean diag C I, at least `FLOOR`, and what rounding asks for."""
        level = (ridge * self.gram.diagonal(dim1=1, dim2=2).mean(1)).clamp_(min=FLOOR)
        damped = self.gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(level.unsqueeze(1))
        return root(damped)

    def solve(self, w0: Tensor, factor: Tensor) -> Tensor:
        """W `[g, o, K]`: the ridge regression that is pulled towards W0."""
        right = self.cross - self.gram @ w0.transpose(1, 2)
        return w0 + torch.cholesky_solve(right, factor).transpose(1, 2)

    def solve_within(self, w0: Tensor, ridge: float, nearest: Callable[[Tensor], Tensor]) -> Tensor:
        """`solve` where W - W0 must lie in a subspace, by conjugate gradients.

        Args:
            w0: in the subspace.
            ridge: as `factor` takes it.
            nearest: the orthogonal projection onto the subspace.
        """
        level = (ridge * self.gram.diagonal(dim1=1, dim2=2).mean(1)).clamp_(min=FLOOR).reshape(-1, 1, 1)
        change = torch.zeros_like(w0)
        rest = nearest(self.cross.transpose(1, 2) - w0 @ self.gram)
        step, square = rest.clone(), rest.square().sum()
        start = float(square)
        for _ in range(STEPS):
            if not float(square) > CONVERGED * start:
                break
            moved = nearest(step @ self.gram + level * step)
            length = square / (step * moved).sum()
            change += length * step
            rest -= length * moved
            square, before = rest.square().sum(), square
            step = rest + (square / before) * step
        return w0 + change
