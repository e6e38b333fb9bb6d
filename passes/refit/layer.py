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
from torch import Tensor, fx

from graphcomp.errors import PassError
from graphcomp.measure import Normal
from graphcomp.passes.refit.around import BatchNorm
from graphcomp.passes.refit.comparison import Change, Comparison, Rows
from graphcomp.passes.refit.holders import holder_of
from graphcomp.passes.refit.needs import bytes_to_fit
from graphcomp.passes.refit.units import Unit
from graphcomp.records import FittedLayer

RIDGES = 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0
"""Of which the one with the least error on samples that the fit does not see is taken."""

FEW = 1e-2
"""The ridge where there are too few samples to choose by."""

ENOUGH = 4
"""Rows a column that a fit needs where nothing is held out (T9.1)."""

EXACT = 1e-10
"""Relative error below which a layer computes what the original does, and stays bit for bit."""

BENDS = 3
"""Times that targets beyond a bend are taken from what the last fit yields there; each lowers the error."""


@dataclass(frozen=True)
class Choice:
    """How a layer may be fitted.

    Attributes:
        ridge: None: what is best on samples that are held out.
        bias_only: no weights.
        memory: bytes that a fit may take.
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


def obstacle(shape: Sequence[int], rows: int, is_judged: bool, needed: int, choice: Choice) -> str | None:
    """Why no weights of a layer can be fitted.

    Args:
        shape: of W, (g, o, K).
        rows: of all processes together.
        is_judged: whether some of them are held out.
        needed: bytes.
        choice: how it may be fitted.
    """
    columns = shape[2]
    if rows < ENOUGH * columns and (not is_judged or choice.ridge is not None):
        return f"{rows} rows for {columns} columns are too few: only its bias was fitted"
    if needed > choice.memory:
        return (
            f"{columns} columns take {needed / 2**30:.2g} GiB, more than --memory: only its bias was fitted"
        )
    return None


class _Fit:
    def __init__(self, module: fx.GraphModule, unit: Unit, rows: Sequence[Rows], choice: Choice) -> None:
        self.module, self.unit, self.choice = module, unit, choice
        self.holder = holder_of(module, unit)
        self.w = self.holder.w
        self.comparison = Comparison(module, unit, rows, self.w, is_free=self.holder.is_free)
        self.bias = cast(Tensor | None, getattr(self.holder.layer, "bias", None))
        zeros = self.w.new_zeros(self.w.shape[:2])
        # the mean of a normalisation takes the place of a bias: there it counts from zero
        self.b = zeros if self.bias is None else self.bias.double().reshape(zeros.shape)
        count, (g, o, k) = self.comparison.count, self.w.shape
        needed = bytes_to_fit((g, o, k), count, is_free=self.holder.is_free)
        self.note = obstacle(self.w.shape, count, self.comparison.judging > 0, needed, choice)
        self.comparison.has_columns = self.note is None and not choice.bias_only
        self.comparison.look()

    def run(self) -> tuple[FittedLayer, dict[str, Tensor]]:
        comparison = self.comparison
        seen, judge = comparison.moments(self.w, self.b)
        if not all(bool(x.isfinite().all()) for x in (*seen.sums, *judge.sums)):
            raise PassError(
                f"{self.unit.layer}: found a value that is not finite in what it reads or is to yield, "
                "expected none"
            )
        judging, power = comparison.judging, comparison.power()
        rows = seen.without_targets().plus(judge.without_targets())
        normal = comparison.centred(seen)
        jury = comparison.centred(judge) if judging else normal
        stay = torch.zeros_like(normal.cross).transpose(1, 2), torch.zeros_like(self.b)
        before = self.error(jury, stay) / power
        share = jury.rows / float(rows.rows) if judging else 0.0
        if (1 - share) * self.error(normal, stay) / power + share * before < EXACT:
            return self.record(None, before, before), {}
        errors = {r: self.error(jury, self.change(normal, r)) / power for r in self.ridges()}
        chosen = min(errors, key=lambda ridge: errors[ridge])
        if judging and errors[chosen] >= before:
            return self.stays("nothing fits better samples that were held out", before)
        if chosen is None and self.note is None and not self.choice.bias_only:
            self.note = "no weights fit better samples that were held out: only its bias was fitted"
        after = errors[chosen]
        start = (self.w.clone(), self.b) if self.holder.is_limited else None
        normal = normal.pooled(jury) if judging else normal
        factor = None if chosen is None else self.holder.factor(normal, chosen)
        self.apply(normal, chosen, factor)
        for _ in range(BENDS if chosen is not None and self.is_bent else 0):
            self.apply(comparison.bent(rows, normal, self.w, self.b), chosen, factor)
        if chosen is not None and start is not None:
            after = self.error(jury, (self.w - start[0], self.b - start[1])) / power
            if after >= before:
                return self.stays("no factors of its rank fit better samples that were held out", before)
        return self.record(chosen, before, after), self.write(weights=chosen is not None)

    def stays(self, why: str, before: float) -> tuple[FittedLayer, dict[str, Tensor]]:
        self.note = f"{why}: it stayed as it was"
        return self.record(None, before, before), {}

    def ridges(self) -> list[float | None]:
        """What is tried; None: the bias alone."""
        if not self.comparison.has_columns:
            return [None]
        if self.choice.ridge is not None:
            return [self.choice.ridge]
        return [None, *RIDGES] if self.comparison.judging else [FEW]

    def change(self, normal: Normal, ridge: float | None, factor: Tensor | None = None) -> Change:
        """What is best added, to what the rows tell of W."""
        if ridge is None:
            zeros = torch.zeros_like(normal.cross).transpose(1, 2)
            return zeros, normal.bias(zeros)
        found = self.holder.change(normal, ridge, factor)
        return found, normal.bias(found)

    def apply(self, normal: Normal, ridge: float | None, factor: Tensor | None) -> None:
        w, b = self.change(normal, ridge, factor)
        self.b = self.b + b
        if ridge is None:
            return
        space = self.comparison.space
        self.w.add_(w) if space is None else self.w.baddbmm_(w, space.transpose(1, 2))
        if self.holder.is_limited:
            new = self.holder.nearest(self.w, normal.gram, self.comparison.scale)
            if normal.intercept:
                self.b = self.b + torch.einsum("gok,gk->go", self.w - new, normal.mean_a)
            self.w = new

    @property
    def is_bent(self) -> bool:
        """Whether something behind a call cuts off what it yields."""
        bounds = [bound for call in self.unit.calls for bound in (call.low, call.high)]
        return any(map(math.isfinite, bounds))

    def error(self, normal: Normal, change: Change) -> float:
        """E (z - D)^2, all channels together."""
        errors = normal.error(*change)
        return float((self.comparison.scale.square() * errors).sum())

    def record(self, ridge: float | None, before: float, after: float) -> FittedLayer:
        return FittedLayer(
            layer=self.unit.layer,
            original=self.unit.origin.layer,
            rows=self.comparison.count,
            columns=self.w.shape[2],
            ridge=ridge,
            before=before,
            after=after,
            note=self.note,
        )

    def write(self, *, weights: bool) -> dict[str, Tensor]:
        """Set the layer's tensors, and the normalisation's mean where the layer has no bias."""
        changed = self.holder.write(self.w) if weights else {}
        if self.bias is not None:
            self.bias.copy_(self.b.reshape(-1))
            changed[f"{self.unit.layer}.bias"] = self.bias
        elif self.unit.norm is not None:
            norm = cast(BatchNorm, self.module.get_submodule(self.unit.norm))
            mean = cast(Tensor, norm.running_mean)
            mean.sub_(self.b.reshape(-1).to(mean.dtype))
            changed[f"{self.unit.norm}.running_mean"] = mean
        return {name: t.detach().cpu().clone() for name, t in changed.items()}
