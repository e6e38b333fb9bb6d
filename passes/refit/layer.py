"""One layer: the regression of what it lacks on what it reads, and its new tensors.

With u = W a + b what the layer computes, z = s u + v what is compared (behind a normalisation s, v, and with
the other operand of an addition in v), and D the original's value of z:

    dW, db = argmin E (dW a + db - r)^2 + ridge * |dW|^2,        r = (D - z) / s              (METHODS 9.5)

and again, where a ReLU follows, with min(z, 0) in the place of D where D < 0 and z is what the last fit
yields (and max(z, 6) where D > 6, of ReLU6): on the far side of the bend only the side matters. What a layer
lacks is small where it computes the original's values already: there rounding hides nothing.

A factor in front is fitted with its layer: both as one product W, of which what matters most of the outputs
is kept, with U the leading eigenvectors of W C W^T, in units of z: W ~ U (U^T W)             (METHODS 9.6)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.base import distributed
from graphcomp.channels import batch_norm_affine
from graphcomp.errors import PassError
from graphcomp.ir import DctLayer, decode, encode
from graphcomp.measure import Moments, Normal, as_weight, matrix, matrix_shape, patches_at
from graphcomp.passes.refit.units import BatchNorm, Unit
from graphcomp.records import FittedLayer

RIDGES = 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0
"""Of which the one with the least error on samples that the fit does not see is taken."""

FEW = 1e-2
"""The ridge where there are too few samples to choose by."""

ENOUGH = 4
"""Rows a column that a fit needs where nothing is held out (T9.1)."""

COPIES, SOLVER = 6, 2 << 30
"""So many matrices of columns x columns in float64 are held at once; bytes that they may take in any case."""

EXACT = 1e-10
"""Relative error below which a layer computes what the original does, and stays bit for bit."""

BENDS = 3
"""Times that targets beyond a bend are taken from what the last fit yields there; each lowers the error."""

WEAK = 1e-3
"""Normalisations that scale a channel by less than this part of their largest scale hide what it computes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A layer's rows over some samples.

    Attributes:
        layer: reads `x`.
        call: of the layer that is fitted.
        x, at: its input, and the positions of its output that are looked at.
        target: D at these, `[rows, channels]`.
        other: what is added behind the layer, at these; None for nothing.
        is_held_out: whether they only judge.
    """

    layer: nn.Module
    call: Unit
    x: Tensor
    at: Tensor
    target: Tensor
    other: Tensor | None
    is_held_out: bool

    def patches(self) -> Tensor:
        """a, `[rows, g, K]`."""
        return patches_at(self.layer, self.x, self.at)


@dataclass(frozen=True, eq=False)
class _Affine:
    """z = scale * u + shift, a channel; `strong`: where u can be told from z."""

    scale: Tensor
    shift: Tensor
    strong: Tensor


def _behind(module: fx.GraphModule, unit: Unit, width: int, like: Tensor) -> _Affine:
    if unit.norm is None:
        ones = like.new_ones(width, dtype=torch.float64)
        return _Affine(ones, 0 * ones, ones > 0)
    norm = cast(BatchNorm, module.get_submodule(unit.norm))
    held = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    gamma, beta, mean, var = (None if t is None else t.double() for t in held)
    scale, shift = cast(tuple[Tensor, Tensor], batch_norm_affine(gamma, beta, mean, var, norm.eps))
    return _Affine(scale, shift, scale.abs() > WEAK * scale.abs().max())


@dataclass(frozen=True)
class Choice:
    """How a layer may be fitted.

    Attributes:
        ridge: None: what is best on samples that are held out.
        bias_only: no weights.
        memory: bytes.
    """

    ridge: float | None
    bias_only: bool
    memory: int


def fit_layer(
    module: fx.GraphModule, unit: Unit, rows: Sequence[Rows], choice: Choice
) -> tuple[FittedLayer, dict[str, Tensor]]:
    """Fit one layer of `module` in place; collective.

    Returns:
        What came of it, and all tensors that changed, by name.

    Raises:
        PassError: a value that is not finite.
    """
    return _Fit(module, unit, rows, choice).run()


Change = tuple[Tensor, Tensor]
"""dW `[g, o, K]` and db `[g, o]`."""


class _Fit:
    def __init__(self, module: fx.GraphModule, unit: Unit, rows: Sequence[Rows], choice: Choice) -> None:
        self.module, self.unit, self.rows, self.choice = module, unit, rows, choice
        self.layer = module.get_submodule(unit.layer)
        self.first = None if unit.factor is None else module.get_submodule(unit.factor[0])
        self.factors: tuple[Tensor, Tensor] | None = None
        self.w = matrix(self.layer) if self.first is None else matrix(self.layer) @ matrix(self.first)
        self.groups, outputs, self.columns = self.w.shape
        self.behind = _behind(module, unit, self.groups * outputs, self.w)
        self.bias = cast(Tensor | None, getattr(self.layer, "bias", None))
        self.has_intercept = self.bias is not None or unit.norm is not None
        zeros = self.w.new_zeros(self.groups, outputs)
        # the mean of a normalisation takes the place of a bias: there it counts from zero
        self.b = zeros if self.bias is None else self.bias.double().reshape(zeros.shape)
        self.scale = self.behind.scale.reshape(zeros.shape)
        self.count = self.total(rows)
        self.judging = self.total([r for r in rows if r.is_held_out])
        self.note = self.obstacle()
        self.fits_weights = self.note is None and not choice.bias_only

    def total(self, rows: Sequence[Rows]) -> int:
        """How many rows all processes have together."""
        count = self.w.new_tensor(sum(r.at.numel() for r in rows))
        distributed.all_reduce([count])
        return int(count)

    def obstacle(self) -> str | None:
        """Why no weights are fitted."""
        few = f"{self.count} rows for {self.columns} columns"
        if self.count < ENOUGH * self.columns and (not self.judging or self.choice.ridge is not None):
            return f"{few} are too few: only its bias was fitted"
        if COPIES * 8 * self.groups * self.columns**2 > max(self.choice.memory, SOLVER):
            return f"no memory for {self.columns} columns: only its bias was fitted"
        return None

    def missing(self, rows: Rows, w: Tensor, b: Tensor, *, bent: bool = False) -> tuple[Tensor, Tensor]:
        """a, `[rows, g, K]` (no columns where no weights are fitted), and r, `[rows, g, o]`."""
        a = rows.patches()
        a = a if a.dtype is torch.float64 else a.float()
        u = (torch.einsum("ngk,gok->ngo", a, w.to(a.dtype)) + b.to(a.dtype)).flatten(1)
        z = self.behind.scale.to(a.dtype) * u + self.behind.shift.to(a.dtype)
        z = z if rows.other is None else z + rows.other
        d = rows.target.to(a.dtype)
        if bent:
            low, high = rows.call.low, rows.call.high
            d = torch.where(d < low, z.clamp(max=low), d)
            d = torch.where(d > high, z.clamp(min=high), d)
        strong = self.behind.strong
        r = torch.where(strong, (d - z) / torch.where(strong, self.behind.scale, 1).to(a.dtype), 0)
        return a if self.fits_weights else a[:, :, :0], r.reshape(len(r), *self.b.shape)

    def run(self) -> tuple[FittedLayer, dict[str, Tensor]]:
        seen, judge = self.moments()
        everything = seen.plus(judge)
        if not all(bool(x.isfinite().all()) for x in everything.sums):
            raise PassError(
                f"{self.unit.layer}: found a value that is not finite in what it reads or is to yield, "
                "expected none"
            )
        normal = everything.centred(self.has_intercept)
        jury = judge.centred(self.has_intercept) if self.judging else normal
        stay = torch.zeros_like(self.w), torch.zeros_like(self.b)
        power = self.power()
        before = self.error(jury, stay) / power
        if self.error(normal, stay) / power < EXACT:
            return self.record(None, before, before), {}
        basis = seen.centred(self.has_intercept) if self.judging else normal
        tried = {ridge: self.change(basis, ridge) for ridge in self.ridges()}
        errors = {ridge: self.error(jury, change) / power for ridge, change in tried.items()}
        chosen = min(errors, key=lambda ridge: errors[ridge])
        if self.judging and errors[chosen] >= before:
            self.note = "nothing fits better samples that were held out: it stayed as it was"
            return self.record(None, before, before), {}
        if chosen is None and self.note is None and not self.choice.bias_only:
            self.note = "no weights fit better samples that were held out: only its bias was fitted"
        start, after = (self.w, self.b), errors[chosen]
        self.apply(normal, chosen)
        for _ in range(BENDS if chosen is not None and self.is_bent else 0):
            self.apply(self.bent(everything), chosen)
        if chosen is not None and self.first is not None:
            after = self.error(jury, (self.w - start[0], self.b - start[1])) / power
            if after >= before:
                self.note = (
                    "no factors of its rank fit better samples that were held out: it stayed as it was"
                )
                return self.record(None, before, before), {}
        return self.record(chosen, before, after), self.write(weights=chosen is not None)

    def cut(self, first: nn.Module, normal: Normal) -> None:
        """Keep what matters most of the outputs, as much as the factor in front has outputs."""
        rank = matrix_shape(first)[1]
        scale = self.scale[0].abs().clamp(min=float(self.scale.abs().max()) * WEAK).unsqueeze(1)
        scaled = scale * self.w[0]
        directions = torch.linalg.eigh(scaled @ normal.gram[0] @ scaled.T).eigenvectors[:, -rank:]
        self.factors = directions.T @ scaled, directions / scale
        new = (self.factors[1] @ self.factors[0]).unsqueeze(0)
        if self.has_intercept:
            self.b = self.b + torch.einsum("gok,gk->go", self.w - new, normal.mean_a)
        self.w = new

    def ridges(self) -> list[float | None]:
        """What is tried; None: the bias alone."""
        if not self.fits_weights:
            return [None]
        if self.choice.ridge is not None:
            return [self.choice.ridge]
        return [None, *RIDGES] if self.judging else [FEW]

    def change(self, normal: Normal, ridge: float | None) -> Change:
        """What is best added."""
        zeros = torch.zeros_like(self.w)
        if ridge is None:
            return zeros, normal.bias(zeros[:, :, : normal.gram.shape[2]])
        if isinstance(self.layer, DctLayer):
            found = normal.solve_within(zeros, ridge, self.nearest)
        else:
            found = normal.solve(zeros, normal.factor(ridge))
        return found, normal.bias(found)

    def apply(self, normal: Normal, ridge: float | None) -> None:
        w, b = self.change(normal, ridge)
        self.w, self.b = self.w + w, self.b + b
        if ridge is not None and self.first is not None:
            self.cut(self.first, normal)

    @property
    def is_bent(self) -> bool:
        """Whether something behind a call cuts off what it yields."""
        bounds = [bound for call in self.unit.calls for bound in (call.low, call.high)]
        return any(map(math.isfinite, bounds))

    def bent(self, moments: Moments) -> Normal:
        """What is lacking of that which matters of the targets."""
        again = moments.without_targets()
        for rows in self.rows:
            again.retarget(*self.missing(rows, self.w, self.b, bent=True))
        again.all_reduce(targets_only=True)
        return again.centred(self.has_intercept)

    def error(self, normal: Normal, change: Change) -> float:
        """E (z - D)^2, all channels together."""
        w, b = change
        return float((self.scale.square() * normal.error(w[:, :, : normal.gram.shape[2]], b)).sum())

    def power(self) -> float:
        """The variance of D, less what is added behind the layer; all channels together."""
        count, total, squares = (self.w.new_zeros(self.w.shape[0] * self.w.shape[1]) for _ in range(3))
        first = self.goals(self.rows[0]).mean(0) if self.rows else total
        first = distributed.broadcast(first.cpu()).to(total.device)
        for rows in self.rows:
            goals = self.goals(rows) - first
            count += len(goals)
            total += goals.sum(0)
            squares += goals.square().sum(0)
        distributed.all_reduce([count, total, squares])
        variance = squares / count - (total / count).square()
        return max(float(variance[self.behind.strong].sum()), 1e-30)

    def goals(self, rows: Rows) -> Tensor:
        goals = rows.target if rows.other is None else rows.target - rows.other
        return goals.double()

    def record(self, ridge: float | None, before: float, after: float) -> FittedLayer:
        return FittedLayer(
            layer=self.unit.layer,
            original=self.unit.origin.layer,
            rows=self.count,
            columns=self.columns,
            ridge=ridge,
            before=before,
            after=after,
            note=self.note,
        )

    def moments(self) -> tuple[Moments, Moments]:
        """Of the rows that are fitted, and of those that judge."""
        shifts = None
        if self.rows:
            a, r = self.missing(self.rows[0], self.w, self.b)
            shifts = a.mean(0).cpu(), r.mean(0).cpu()
            if not self.has_intercept:
                shifts = torch.zeros_like(shifts[0]), torch.zeros_like(shifts[1])
        shift_a, shift_t = cast(tuple[Tensor, Tensor], distributed.broadcast(shifts))
        device = self.w.device
        seen, judge = (Moments(shift_a.to(device), shift_t.to(device)) for _ in range(2))
        for rows in self.rows:
            (judge if rows.is_held_out else seen).add(*self.missing(rows, self.w, self.b))
        seen.all_reduce()
        judge.all_reduce()
        return seen, judge

    def nearest(self, w: Tensor) -> Tensor:
        """The weight closest to W that the layer's coefficients can say."""
        layer = cast(DctLayer, self.layer)
        stored = self.coefficients(w)
        return decode(stored, layer.columns, layer.index, layer.basis).reshape(w.shape)

    def coefficients(self, w: Tensor) -> Tensor:
        layer = cast(DctLayer, self.layer)
        order = None if layer.index is None else layer.index.long().argsort()
        return encode(w.reshape(layer.weight_shape), layer.rows, layer.terms, order, layer.basis)

    def holders(self) -> list[tuple[str, nn.Module, Tensor]]:
        """The layers that hold W, and what each holds."""
        if self.unit.factor is None or self.first is None or self.factors is None:
            return [(self.unit.layer, self.layer, self.w)]
        first, last = (f.unsqueeze(0) for f in self.factors)
        return [(self.unit.factor[0], self.first, first), (self.unit.layer, self.layer, last)]

    def write(self, *, weights: bool) -> dict[str, Tensor]:
        """Set the layer's tensors, and the normalisation's mean where the layer has no bias."""
        changed: dict[str, Tensor] = {}
        if weights and isinstance(self.layer, DctLayer):
            self.layer.coefficients.copy_(self.coefficients(self.w))
            changed[f"{self.unit.layer}.coefficients"] = self.layer.coefficients
        elif weights:
            for path, layer, values in self.holders():
                weight = cast(Tensor, layer.weight)
                weight.copy_(as_weight(layer, values))
                changed[f"{path}.weight"] = weight
        if self.bias is not None:
            self.bias.copy_(self.b.reshape(-1))
            changed[f"{self.unit.layer}.bias"] = self.bias
        elif self.unit.norm is not None:
            norm = cast(BatchNorm, self.module.get_submodule(self.unit.norm))
            mean = cast(Tensor, norm.running_mean)
            mean.sub_(self.b.reshape(-1).to(mean.dtype))
            changed[f"{self.unit.norm}.running_mean"] = mean
        return {name: t.detach().cpu().clone() for name, t in changed.items()}
