"""A Gauss-Newton step of one layer, with the curvature taken for a product (Martens & Grosse 2015).

With e what is lacking at the end of a line of layers, J how it moves with what a layer yields, and a what
that layer reads, the squared error has

    gradients  E (J^T e) a^T  of W,  E J^T e  of b;   curvature  about  E J^T J  times  C = E (a - m)(a - m)^T

    dW = - (E J^T J + r)^-1  E (J^T e)(a - m)^T  (C + r)^-1,        db = - (E J^T J + r)^-1  E J^T e  - dW m

J^T J is met by random signs: J^T s for s = +-1 is one backward pass, and its second moments are those of J.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from graphcomp.base import distributed
from graphcomp.measure import Moments, as_matrix, is_linear, matrix_shape, root

DAMPING = 1e-2
"""Of the curvature at a layer's outputs, as a share of its mean diagonal."""

RIDGE = 1e-3
"""Of what a layer reads, likewise, at least."""

FLOOR = 1e-30
"""Least of what is added: where nothing moves the error nothing is divided by zero."""


@dataclass(frozen=True, eq=False)
class Pulls:
    """What some samples say of one layer.

    Attributes:
        weight: gradient of its weight, in the shape of the weight.
        yielded: J^T e, in the shape of what it yields.
        signed, patches: J^T s, likewise, and a, `[rows, g, K]`, at some positions; None: not looked at.
    """

    weight: Tensor
    yielded: Tensor
    signed: Tensor | None = None
    patches: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """dW `[g, o, K]`, and db `[g, o]`, None for a layer without a bias."""

    w: Tensor
    b: Tensor | None


@dataclass(eq=False)
class Curvature:
    """Sums over samples, float64.

    Attributes:
        layer: whose.
        ridge: with which it was fitted by itself, which says how far samples can be trusted.
        moments: of what it reads; around zero is near enough here.
        weight, bias, signs: `[g, o, K]`, `[g, o]` and `[g, o, o]`.
        pulled, signed: maps that gradients and signs were looked at for.
    """

    layer: nn.Module
    ridge: float = RIDGE
    moments: Moments = field(init=False)
    weight: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    signs: Tensor = field(init=False)
    pulled: Tensor = field(init=False)
    signed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g, o, k = matrix_shape(self.layer)
        shift = torch.zeros(g, k, device=cast(Tensor, self.layer.weight).device)
        self.moments = Moments(shift, shift.new_zeros(g, 0))
        like = self.moments.aa
        shapes = {"weight": (g, o, k), "bias": (g, o), "signs": (g, o, o), "pulled": (), "signed": ()}
        for name, shape in shapes.items():
            setattr(self, name, like.new_zeros(shape))

    def add(self, pulls: Pulls) -> None:
        """Count in some samples."""
        g, o, _ = self.weight.shape
        self.weight += as_matrix(self.layer, pulls.weight)
        self.bias += self._rows(pulls.yielded).sum(0, dtype=torch.float64).reshape(g, o)
        self.pulled += len(pulls.yielded)
        if pulls.signed is None or pulls.patches is None:
            return
        self.signed += len(pulls.signed)
        signed = self._rows(pulls.signed).reshape(-1, g, o).transpose(0, 1)
        self.signs += torch.bmm(signed.transpose(1, 2), signed).double()
        self.moments.add(pulls.patches, pulls.patches.new_zeros(len(pulls.patches), g, 0))

    def _rows(self, yielded: Tensor) -> Tensor:
        """All positions, `[rows, channels]`."""
        return (yielded if is_linear(self.layer) else yielded.movedim(1, -1)).flatten(0, -2)

    def step(self) -> Step:
        """The best one by itself, as far as the model goes; collective."""
        sums = self.weight, self.bias, self.signs, self.pulled, self.signed, *self.moments.sums
        distributed.all_reduce(sums)
        has_bias = getattr(self.layer, "bias", None) is not None
        normal = self.moments.centred(has_bias)
        pull = self.weight
        if has_bias:
            pull = pull - self.bias.unsqueeze(2) * normal.mean_a.unsqueeze(1)
        outer = self.signs * (self.pulled / self.signed)
        level = outer.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        outer.diagonal(dim1=1, dim2=2).add_(DAMPING * level + FLOOR)
        outer = root(outer)
        half = torch.cholesky_solve(pull.transpose(1, 2), normal.factor(max(self.ridge, RIDGE))).transpose(
            1, 2
        )
        w = -torch.cholesky_solve(half, outer)
        if not has_bias:
            return Step(w, None)
        b = -torch.cholesky_solve(self.bias.unsqueeze(2), outer).squeeze(2)
        return Step(w, b - torch.einsum("gok,gk->go", w, normal.mean_a))
