"""What a layer is compared with: z = s u + v beside the original's D, at sampled positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.base import distributed
from graphcomp.channels import batch_norm_affine
from graphcomp.measure import Moments, Normal, patches_at, row_space
from graphcomp.passes.refit.around import BatchNorm
from graphcomp.passes.refit.units import Unit

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
        """a, `[rows, g, K]`, at least float32."""
        a = patches_at(self.layer, self.x, self.at)
        return a if a.dtype is torch.float64 else a.float()


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


def scale_behind(module: fx.GraphModule, unit: Unit, width: int, like: Tensor) -> Tensor:
    """s, `[channels]`: by what a normalisation behind a layer multiplies; 1 if there is none."""
    return _behind(module, unit, width, like).scale


Change = tuple[Tensor, Tensor]
"""dW `[g, o, K]` and db `[g, o]`."""


def are_few(rows: int, columns: int) -> bool:
    """Whether a regression is solved in the space of its rows."""
    return 2 * rows <= columns


class Comparison:
    """All rows of a layer.

    Args:
        module, unit, rows: of the network, the layer and its samples.
        w: its matrix, `[g, o, K]`, for shapes.
        is_free: whether any W may be fitted, so that coordinates say as much (see `regression`).

    Attributes:
        scale: s by group and output, `[g, o]`.
        count, judging: rows of all processes together, and those of them that only judge.
        has_intercept: whether the layer has a bias, or a normalisation whose mean takes the place of one.
        has_columns: whether patches count; else means alone.
        space: V, where there are far fewer rows than columns: regressions are of coordinates there.
    """

    def __init__(
        self, module: fx.GraphModule, unit: Unit, rows: Sequence[Rows], w: Tensor, *, is_free: bool
    ) -> None:
        self.rows, self.like = rows, w
        layer = module.get_submodule(unit.layer)
        bias = getattr(layer, "bias", None)
        kinds = {t.dtype for t in (*layer.parameters(), *layer.buffers())}
        self.kind = torch.float64 if torch.float64 in kinds else torch.float32  # of rows
        self.has_intercept = bias is not None or unit.norm is not None
        self.has_columns = True
        self.shape = w.shape[:2]
        self.behind = _behind(module, unit, w.shape[0] * w.shape[1], w)
        self.scale = self.behind.scale.reshape(self.shape)
        self.count = self._total(rows)
        self.judging = self._total([r for r in rows if r.is_held_out])
        self.is_free, self.space = is_free, cast(Tensor | None, None)

    def look(self) -> None:
        """Find the space of the rows, if they are few; collective."""
        if self.has_columns and self.is_free and are_few(self.count, self.like.shape[2]):
            self.space = row_space(self._gathered())

    def _gathered(self) -> Tensor:
        """All rows of all processes, `[rows, g, K]`, in any order that is the same everywhere."""
        counts = torch.zeros(distributed.world_size(), dtype=torch.int64)
        counts[distributed.rank()] = sum(rows.at.numel() for rows in self.rows)
        distributed.all_reduce([counts])
        start = int(counts[: distributed.rank()].sum())
        shape = int(counts.sum()), self.like.shape[0], self.like.shape[2]
        found = torch.zeros(shape, dtype=self.kind, device=self.like.device)
        for rows in self.rows:
            a = rows.patches()
            found[start : start + len(a)] = a
            start += len(a)
        distributed.all_reduce([found])
        return found

    def _total(self, rows: Sequence[Rows]) -> int:
        count = self.like.new_tensor(sum(r.at.numel() for r in rows))
        distributed.all_reduce([count])
        return int(count)

    def missing(self, rows: Rows, w: Tensor, b: Tensor, *, bent: bool = False) -> tuple[Tensor, Tensor]:
        """a, `[rows, g, K]`, and r, `[rows, g, o]`, of W and b; bent: beyond a bend the side counts."""
        a = rows.patches()
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
        r = r.reshape(len(r), *self.shape)
        if self.space is not None:
            return torch.einsum("ngk,gkm->ngm", a.double(), self.space), r.double()
        return a if self.has_columns else a[:, :, :0], r

    def moments(self, w: Tensor, b: Tensor) -> tuple[Moments, Moments]:
        """Of the rows that are fitted, and of those that judge; collective."""
        shifts = None
        w, b = self._lowered(w, b)
        if self.rows:
            a, r = self.missing(self.rows[0], w, b)
            shifts = a.mean(0).cpu(), r.mean(0).cpu()
            if not self.has_intercept:
                shifts = torch.zeros_like(shifts[0]), torch.zeros_like(shifts[1])
        shift_a, shift_t = cast(tuple[Tensor, Tensor], distributed.broadcast(shifts))
        device = self.like.device
        seen, judge = (Moments(shift_a.to(device), shift_t.to(device)) for _ in range(2))
        for rows in self.rows:
            (judge if rows.is_held_out else seen).add(*self.missing(rows, w, b))
        seen.all_reduce()
        judge.all_reduce()
        return seen, judge

    def centred(self, moments: Moments) -> Normal:
        """The normal equations of some rows, whose sums are used up."""
        return moments.centred(self.has_intercept, columns=self.like.shape[2])

    def bent(self, rows: Moments, normal: Normal, w: Tensor, b: Tensor) -> Normal:
        """The same rows with what is lacking of that which matters of the targets; collective."""
        again = rows.without_targets()
        for some in self.rows:
            again.retarget(*self.missing(some, *self._lowered(w, b), bent=True))
        again.all_reduce(targets_only=True)
        return again.centred(self.has_intercept, gram=normal.gram, columns=normal.columns)

    def _lowered(self, w: Tensor, b: Tensor) -> Change:
        """W and b as samples are multiplied with them."""
        return w.to(self.kind), b.to(self.kind)

    def coordinates(self, w: Tensor) -> Tensor:
        """What of W `[g, o, K]` the rows tell."""
        return w if self.space is None else w @ self.space

    def power(self) -> float:
        """The variance of D, less what is added behind the layer; all channels together."""
        count, total, squares = (torch.zeros_like(self.behind.scale) for _ in range(3))
        first = _goals(self.rows[0]).mean(0) if self.rows else total
        first = distributed.broadcast(first.cpu()).to(total.device)
        for rows in self.rows:
            goals = _goals(rows) - first
            count += len(goals)
            total += goals.sum(0)
            squares += goals.square().sum(0)
        distributed.all_reduce([count, total, squares])
        variance = squares / count - (total / count).square()
        return max(float(variance[self.behind.strong].sum()), 1e-30)


def _goals(rows: Rows) -> Tensor:
    """What a layer itself is to yield."""
    goals = rows.target if rows.other is None else rows.target - rows.other
    return goals.double()
