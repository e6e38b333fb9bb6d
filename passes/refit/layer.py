"""One layer: the regression of what it is to yield on what it reads, and its new tensors.

With u = W a + b what the layer computes, z = s u + v what is compared (behind a normalisation s, v, and with
the other operand of an addition in v), and D the original's value of z:

    W, b = argmin E (u - (D - v) / s)^2 + ridge                                                (METHODS 9.5)

once more, where a ReLU follows, with min(z, 0) in the place of D where D < 0 and z is what the first fit
yields (and max(z, 6) where D > 6, of ReLU6): on the far side of the bend only the side matters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.base import distributed
from graphcomp.ir import DctLayer, decode, encode
from graphcomp.measure import Moments, Normal, as_weight, matrix, patches_at
from graphcomp.passes.refit.units import BatchNorm, Unit
from graphcomp.records import FittedLayer

RIDGES = 1e-3, 1e-2, 1e-1, 1.0
"""Of which the one with the least error on samples that the fit does not see is taken."""

FEW = 1e-2
"""The ridge where there are too few samples to choose by."""

ENOUGH = 4
"""Rows a column that a fit needs where nothing is held out (T9.1)."""

EXACT = 1e-10
"""Relative error below which a layer computes what the original does, and stays bit for bit."""

WEAK = 1e-3
"""Normalisations that scale a channel by less than this part of their largest scale hide what it computes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A layer's rows over some samples.

    Attributes:
        layer: reads `x`.
        x, at: its input, and the positions of its output that are looked at.
        target: D at these, `[rows, channels]`.
        other: what is added behind the layer, at these; None for nothing.
        is_held_out: whether they only judge.
    """

    layer: nn.Module
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

    def back(self, z: Tensor) -> Tensor:
        return (z - self.shift) / torch.where(self.strong, self.scale, 1)


def _behind(module: fx.GraphModule, unit: Unit, width: int, like: Tensor) -> _Affine:
    if unit.norm is None:
        ones = like.new_ones(width)
        return _Affine(ones, 0 * ones, ones > 0)
    norm = cast(BatchNorm, module.get_submodule(unit.norm))
    var, mean = cast(Tensor, norm.running_var), cast(Tensor, norm.running_mean)
    scale = (var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    shift = (0 if norm.bias is None else norm.bias) - scale * mean
    return _Affine(scale, shift, scale.abs() > WEAK * scale.abs().max())


def fit_layer(
    module: fx.GraphModule, unit: Unit, rows: Sequence[Rows], ridge: float | None, bias_only: bool
) -> tuple[FittedLayer, dict[str, Tensor]]:
    """Fit one layer of `module` in place; collective.

    Returns:
        What came of it, and all tensors that changed, by name.
    """
    layer = module.get_submodule(unit.layer)
    fit = _Fit(module, unit, layer, rows)
    return fit.run(ridge, bias_only)


class _Fit:
    def __init__(self, module: fx.GraphModule, unit: Unit, layer: nn.Module, rows: Sequence[Rows]) -> None:
        self.module, self.unit, self.layer, self.rows = module, unit, layer, rows
        self.w0 = matrix(layer)
        self.groups, width = self.w0.shape[0], self.w0.shape[0] * self.w0.shape[1]
        like = next(layer.parameters())
        self.behind = _behind(module, unit, width, like)
        self.bias = cast(Tensor | None, getattr(layer, "bias", None))
        self.has_intercept = self.bias is not None or unit.norm is not None

    def goals(self, rows: Rows) -> Tensor:
        """u that would yield the original's z, `[rows, g, o]`."""
        z = rows.target if rows.other is None else rows.target - rows.other
        return self.grouped(self.behind.back(z))

    def grouped(self, u: Tensor) -> Tensor:
        return u.reshape(len(u), self.groups, -1)

    def bent(self, rows: Rows, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """Goals that only ask for the side where the activation is flat."""
        dtype = a.dtype
        u = (torch.einsum("ngk,gok->ngo", a, w.to(dtype)) + b.to(dtype)).flatten(1)
        other = self.behind.shift if rows.other is None else self.behind.shift + rows.other
        z, d = self.behind.scale * u + other, rows.target
        d = torch.where(d < self.unit.low, z.clamp(max=self.unit.low), d)
        d = torch.where(d > self.unit.high, z.clamp(min=self.unit.high), d)
        return self.grouped((d - other) / torch.where(self.behind.strong, self.behind.scale, 1))

    def run(self, ridge: float | None, bias_only: bool) -> tuple[FittedLayer, dict[str, Tensor]]:
        seen, judge = self.moments()
        everything = seen if judge is None else seen.plus(judge)
        normal = everything.centred(self.has_intercept)
        as_it_was = self.b0()
        jury = normal if judge is None else judge.centred(self.has_intercept)
        before = self.relative(jury, self.w0, as_it_was)
        if before < EXACT:
            return self.record(None, before, before, everything), {}
        count = int(everything.rows)
        chosen = self.choose(seen, jury if judge is not None else None, ridge, bias_only, count)
        w, b = self.w0, normal.bias(self.w0)
        if chosen is not None:
            factor = normal.factor(chosen)
            w = self.solved(normal, self.w0, chosen, factor)
            b = normal.bias(w)
            if math.isfinite(self.unit.low) or math.isfinite(self.unit.high):
                w, b = self.bend(everything, w, b, chosen, factor)
        elif not self.has_intercept:
            b = as_it_was
        record = self.record(chosen, before, self.relative(jury, w, b), everything)
        return record, self.write(w, b)

    def record(self, ridge: float | None, before: float, after: float, moments: Moments) -> FittedLayer:
        return FittedLayer(
            layer=self.unit.layer,
            original=self.unit.origin.layer,
            rows=int(moments.rows),
            columns=self.w0.shape[2],
            ridge=ridge,
            before=before,
            after=after,
        )

    def moments(self) -> tuple[Moments, Moments | None]:
        """Of the rows that are fitted, and of those that judge (None: too few to tell)."""
        first = self.rows[0] if self.rows else None
        shifts = None
        if first is not None:
            shifts = first.patches().mean(0).cpu(), self.goals(first).mean(0).cpu()
            if not self.has_intercept:
                shifts = torch.zeros_like(shifts[0]), torch.zeros_like(shifts[1])
        shift_a, shift_t = cast(tuple[Tensor, Tensor], distributed.broadcast(shifts))
        device = self.w0.device
        seen, judge = (Moments(shift_a.to(device), shift_t.to(device)) for _ in range(2))
        for rows in self.rows:
            (judge if rows.is_held_out else seen).add(rows.patches(), self.goals(rows))
        seen.all_reduce()
        judge.all_reduce()
        return seen, judge if int(judge.rows) else None

    def choose(
        self, seen: Moments, jury: Normal | None, ridge: float | None, bias_only: bool, count: int
    ) -> float | None:
        """The ridge to fit with; None: only the bias."""
        if bias_only:
            return None
        if ridge is not None or jury is None:
            return None if count < ENOUGH * self.w0.shape[2] else FEW if ridge is None else ridge
        normal = seen.centred(self.has_intercept)
        found: dict[float | None, float] = {None: float(jury.error(self.w0, normal.bias(self.w0)).sum())}
        for candidate in RIDGES:
            w = self.solved(normal, self.w0, candidate, normal.factor(candidate))
            found[candidate] = float(jury.error(w, normal.bias(w)).sum())
        return min(found, key=lambda key: found[key])

    def solved(self, normal: Normal, w0: Tensor, ridge: float, factor: Tensor) -> Tensor:
        """W; rows whose outputs a normalisation hides stay as they were."""
        if isinstance(self.layer, DctLayer):
            w = normal.solve_within(w0, ridge, self.nearest)
        else:
            w = normal.solve(w0, factor)
        strong = self.behind.strong.reshape(self.groups, -1, 1)
        return torch.where(strong, w, w0)

    def nearest(self, w: Tensor) -> Tensor:
        """The weight closest to W that the layer's coefficients can say."""
        layer = cast(DctLayer, self.layer)
        stored = self.coefficients(w)
        return decode(stored, layer.columns, layer.index, layer.basis).reshape(w.shape)

    def coefficients(self, w: Tensor) -> Tensor:
        layer = cast(DctLayer, self.layer)
        order = None if layer.index is None else layer.index.long().argsort()
        return encode(w.reshape(layer.weight_shape), layer.rows, layer.terms, order, layer.basis)

    def bend(
        self, moments: Moments, w: Tensor, b: Tensor, ridge: float, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Once more, with what matters of the targets."""
        again = moments.without_targets()
        for rows in self.rows:
            a = rows.patches()
            again.retarget(a, self.bent(rows, a, w, b))
        again.all_reduce(targets_only=True)
        normal = again.centred(self.has_intercept)
        w = self.solved(normal, w, ridge, factor)
        return w, normal.bias(w)

    def b0(self) -> Tensor:
        """What the layer adds now; a normalisation's mean is what is compared with."""
        zeros = self.w0.new_zeros(self.w0.shape[:2])
        return zeros if self.bias is None else self.bias.double().reshape(zeros.shape)

    def relative(self, normal: Normal, w: Tensor, b: Tensor) -> float:
        """E (u - goal)^2 over the goals' variance."""
        scale = self.behind.scale.double().square().reshape(b.shape)
        power = float((scale * normal.power).sum())
        return float((scale * normal.error(w, b)).sum()) / max(power, 1e-30)

    def write(self, w: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Set the layer's tensors, and the normalisation's mean where the layer has no bias."""
        changed: dict[str, Tensor] = {}
        if isinstance(self.layer, DctLayer):
            self.layer.coefficients.copy_(self.coefficients(w))
            changed[f"{self.unit.layer}.coefficients"] = self.layer.coefficients
        else:
            weight = cast(Tensor, self.layer.weight)
            weight.copy_(as_weight(self.layer, w))
            changed[f"{self.unit.layer}.weight"] = weight
        if self.bias is not None:
            self.bias.copy_(b.reshape(-1))
            changed[f"{self.unit.layer}.bias"] = self.bias
        elif self.unit.norm is not None:
            norm = cast(BatchNorm, self.module.get_submodule(self.unit.norm))
            mean = cast(Tensor, norm.running_mean)
            mean.sub_(torch.where(self.behind.strong, b.reshape(-1), 0).to(mean.dtype))
            changed[f"{self.unit.norm}.running_mean"] = mean
        return {name: t.detach().cpu().clone() for name, t in changed.items()}
