"""Least squares from sums: regressions of targets on patches, streamed, in groups.

    C = E (a - m)(a - m)^T,    B = E (a - m)(t - s)^T,    m = E a,  s = E t                    (METHODS 9.5)
    W = W0 + [(C + r I)^-1 (B - C W0^T)]^T,    b = s - W m,        r = ridge * mean diag C

Products in float32, sums and solves in float64. The ridge pulls towards the weights W0 as they were. The rows
are shifted by those of the first batch: without that a large mean would cancel the variance.

C is the largest thing here, so it is held no more often than has to be: sums become C in place, two sets of
rows are pooled in place, and of its halves one is added up. Where there are fewer rows than columns they lie
in a space V of so many dimensions, their coordinates there say as much, and what is fitted to these is W:

    W - W0 = W' V^T,    a' = V^T a,    r = ridge * tr C' / K                                   (`row_space`)
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

BLOCK = 512
"""Columns whose products are taken together."""

COPIES, WEIGHTS = 5, 8
"""So many matrices of the sizes of C and of W are held at once while a regression is solved."""

STEPS, CONVERGED = 200, 1e-16
"""Of conjugate gradients: at most so many, until the squared residual has fallen to this part."""


def bytes_to_solve(groups: int, outputs: int, columns: int) -> int:
    """What the regression of a layer takes at once, its sums included."""
    return 8 * groups * (COPIES * columns**2 + WEIGHTS * outputs * columns)


def row_space(rows: Tensor) -> Tensor:
    """V `[g, K, n]`, float64: orthonormal columns that span rows `[n, g, K]`, n <= K."""
    return cast(Tensor, torch.linalg.qr(rows.permute(1, 2, 0).double()).Q)


@dataclass(eq=False)
class Moments:
    """Sums over rows a `[n, g, K]` and targets t `[n, g, o]`; several add up, also over processes.

    Attributes:
        shift_a, shift_t: `[g, K]`, `[g, o]`, subtracted first; the same everywhere.
        has_products: False: sums of rows and targets alone, without `aa`.
        rows: how many.
        a, t, aa, at, tt: float64 sums `[g, K]`, `[g, o]`, `[g, K, K]`, `[g, K, o]`, `[g, o]` of shifted rows.
            What is right of `aa`'s blocks on the diagonal (`BLOCK`) is left out: it is what is below them.
    """

    shift_a: Tensor
    shift_t: Tensor
    has_products: bool = True
    rows: Tensor = field(init=False)
    a: Tensor = field(init=False)
    t: Tensor = field(init=False)
    aa: Tensor = field(init=False)
    at: Tensor = field(init=False)
    tt: Tensor = field(init=False)

    def __post_init__(self) -> None:
        (g, k), o = self.shift_a.shape, self.shift_t.shape[1]
        square = (g, k, k) if self.has_products else (g, 0, 0)
        shapes = {"rows": (), "a": (g, k), "t": (g, o), "aa": square, "at": (g, k, o), "tt": (g, o)}
        for name, shape in shapes.items():
            setattr(self, name, torch.zeros(shape, dtype=torch.float64, device=self.shift_a.device))

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What adds up."""
        return self.rows, self.a, self.t, self.aa, self.at, self.tt

    def add(self, a: Tensor, t: Tensor) -> None:
        """Count in rows `[n, g, K]` and their targets `[n, g, o]`."""
        a, t = a - self.shift_a, t - self.shift_t
        left, right = a.permute(1, 2, 0), a.transpose(0, 1)
        self.rows += len(a)
        self.a += a.sum(0, dtype=torch.float64)
        for columns in _blocks(self.aa.shape[2]):
            self.aa[:, columns, : columns.stop] += torch.bmm(left[:, columns], right[:, :, : columns.stop])
        self._add_targets(left, t)

    def retarget(self, a: Tensor, t: Tensor) -> None:
        """Add other targets for the same rows: what depends on targets alone."""
        self._add_targets((a - self.shift_a).permute(1, 2, 0), t - self.shift_t)

    def _add_targets(self, left: Tensor, t: Tensor) -> None:
        self.t += t.sum(0, dtype=torch.float64)
        self.at += torch.bmm(left, t.transpose(0, 1))
        self.tt += t.square().sum(0, dtype=torch.float64)

    def without_targets(self) -> "Moments":
        """The same rows, ready for other targets; their products are left out."""
        new = Moments(self.shift_a, self.shift_t, has_products=False)
        new.rows, new.a = self.rows, self.a
        return new

    def all_reduce(self, targets_only: bool = False) -> None:
        """Add up over all processes; collective."""
        distributed.all_reduce((self.t, self.at, self.tt) if targets_only else self.sums)

    def plus(self, other: "Moments") -> "Moments":
        """Both together; of equal shifts."""
        new = Moments(self.shift_a, self.shift_t, self.has_products)
        for name in ("rows", "a", "t", "aa", "at", "tt"):
            setattr(new, name, getattr(self, name) + getattr(other, name))
        return new

    def centred(
        self, intercept: bool = True, *, gram: Tensor | None = None, columns: int | None = None
    ) -> "Normal":
        """The normal equations, around the means; around zero where there is no intercept. Uses up the sums.

        Args:
            intercept: whether there is one.
            gram: C of these rows, where it is known already.
            columns: K of the layer, if the rows are coordinates.
        """
        n = float(self.rows)
        da, dt = self.a / n, self.t / n
        mean_a, mean_t = self.shift_a.double() + da, self.shift_t.double() + dt
        cross = _shifted(self.at.div_(n), da, dt, -1)
        power = (self.tt / n - dt.square()).clamp_(min=0)
        known = gram is not None
        gram = _shifted(_mirrored(self.aa).div_(n), da, da, -1) if gram is None else gram
        if not intercept:
            gram = gram if known else _shifted(gram, mean_a, mean_a, 1)
            cross = _shifted(cross, mean_a, mean_t, 1)
            power += mean_t.square()
        del self.aa, self.at  # no sums any more: nobody takes them for such
        return Normal(n, columns or self.shift_a.shape[1], gram, cross, power, mean_a, mean_t, intercept)


def _blocks(columns: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]


def _mirrored(sums: Tensor) -> Tensor:
    """What was left out of sums of products, in place."""
    for columns in _blocks(sums.shape[2]):
        sums[:, : columns.start, columns] = sums[:, columns, : columns.start].transpose(1, 2)
    return sums


def _shifted(matrices: Tensor, left: Tensor, right: Tensor, times: float) -> Tensor:
    """Products of two vectors added to matrices `[g, n, m]`, in place; none where there are no matrices."""
    if not matrices.numel():
        return matrices
    return matrices.baddbmm_(left.unsqueeze(2), right.unsqueeze(1), alpha=times)


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
        rows: how many they are of.
        columns: K of the layer: more than C has, if that is of coordinates.
        gram, cross, power: C `[g, K, K]`, B `[g, K, o]` and E (t - s)^2 `[g, o]`.
        mean_a, mean_t: m `[g, K]` and s `[g, o]`.
        intercept: whether there is one; False: all is around zero, and b is 0.
    """

    rows: float
    columns: int
    gram: Tensor
    cross: Tensor
    power: Tensor
    mean_a: Tensor
    mean_t: Tensor
    intercept: bool

    def pooled(self, other: "Normal") -> "Normal":
        """Of both sets of rows (Chan, Golub & LeVeque 1983). Uses up this one."""
        p, q = (x.rows / (self.rows + other.rows) for x in (self, other))
        gram = self.gram.mul_(p).add_(other.gram, alpha=q)
        cross = self.cross.mul_(p).add_(other.cross, alpha=q)
        power = p * self.power + q * other.power
        if self.intercept:
            da, dt = other.mean_a - self.mean_a, other.mean_t - self.mean_t
            gram, cross = _shifted(gram, da, da, p * q), _shifted(cross, da, dt, p * q)
            power += p * q * dt.square()
        mean_a, mean_t = p * self.mean_a + q * other.mean_a, p * self.mean_t + q * other.mean_t
        rows = self.rows + other.rows
        return Normal(rows, self.columns, gram, cross, power, mean_a, mean_t, self.intercept)

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
        level = self._level(ridge)
        damped = self.gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(level.unsqueeze(1))
        return root(damped)

    def _level(self, ridge: float) -> Tensor:
        """What is added to the diagonal, `[g]`."""
        mean = self.gram.diagonal(dim1=1, dim2=2).sum(1) / self.columns
        return (ridge * mean).clamp_(min=FLOOR)

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
        level = self._level(ridge).reshape(-1, 1, 1)
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
