"""One weight as a product of smaller ones: what a `Factor` makes of a weight, and what that costs.

With K the input channels that are kept, c' = |K|, and R a rank, a weight W (n, c, kh, kw) becomes

    svd      W[:, K] as (n, c' kh kw)   conv kh x kw (c' -> R), conv 1x1 (R -> n)               (METHODS 1.1)
    spatial  W[:, K] as (c' kh, n kw)   conv kh x 1 (c' -> R), conv 1 x kw (R -> n)
    tucker2  HOSVD of W[:, K]           conv 1x1 (c' -> R_in), conv kh x kw (R_in -> R), conv 1x1 (R -> n)

A linear layer is a 1x1 convolution without a plane. Pure arithmetic on tensors and shapes; `factors.surgery`
does this to programs.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from graphcomp.errors import SurgeryError
from graphcomp.measure import macs_of
from graphcomp.records import Record

Kind = Literal["svd", "spatial", "tucker2"]
Plane = tuple[int, ...]
"""Sizes of an activation's plane: (height, width) of a convolution, () of a vector."""


class Factor(Record):
    """What one convolution or linear layer becomes. A plan's `decisions["factors"]` is a list of them."""

    layer: str = Field(description="module path of a convolution (groups = 1) or linear layer")
    keep: list[int] | None = Field(
        default=None, description="input channels that are read (columns of the weight), sorted; null: all"
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="channels between the factors; null: one weight. Clipped to the full rank"
    )
    kind: Kind = "svd"
    rank_in: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="tucker2: channels in front of its core, where `rank` is behind; null: rank"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keep = self.keep
        if keep is not None and (not keep or keep[0] < 0 or any(a >= b for a, b in pairwise(keep))):
            raise ValueError(
                f"{self.layer}: found keep {keep[:6]}…, expected increasing channels, at least one"
            )
        if self.rank_in is not None and (self.kind != "tucker2" or self.rank is None):
            raise ValueError(f"{self.layer}: found rank_in, expected it only for tucker2, beside a rank")
        return self

    def as_one_weight(self) -> "Factor":
        """The same channels, read by one weight."""
        return self.model_copy(update={"rank": None, "rank_in": None})


def rank_text(factor: Factor) -> str:
    """Its rank in words; of tucker2 both."""
    return f"{factor.rank}" if factor.rank_in is None else f"({factor.rank_in}, {factor.rank})"


def read_factors(decisions: Mapping[str, Any]) -> list[Factor]:
    """The factors of a plan; SurgeryError if it holds none or they are not valid."""
    try:
        return [Factor.model_validate(f) for f in decisions["factors"]]
    except (KeyError, TypeError, ValidationError) as error:
        found = "no factors" if isinstance(error, KeyError) else str(error)
        raise SurgeryError(f"plan: found {found}, expected a list of factors under decisions") from error


# ---------------------------------------------------------------------- weights


def full_ranks(shape: Sequence[int], kind: Kind = "svd") -> tuple[int, ...]:
    """The largest useful ranks of a weight (n, c, *kernel): (rank,), for tucker2 (rank, rank_in)."""
    n, c, *kernel = shape
    if kind == "spatial":
        return (min(c * kernel[0], n * kernel[1]),)
    taps = math.prod(kernel)
    return (min(n, c * taps), min(c, n * taps))[: 2 if kind == "tucker2" else 1]


def ranks(shape: Sequence[int], factor: Factor) -> tuple[int, ...]:
    """The ranks that a factor gives a weight of this shape (kept columns only), clipped to what is useful."""
    assert factor.rank is not None
    full = full_ranks(shape, factor.kind)
    rank = min(factor.rank, full[0])
    if factor.kind != "tucker2":
        return (rank,)
    taps = math.prod(shape[2:])
    rank_in = min(factor.rank_in or factor.rank, full[1], rank * taps)
    return min(rank, rank_in * taps), rank_in


def unfold(weight: Tensor, kind: Kind = "svd") -> tuple[Tensor, ...]:
    """The matrices whose spectra decide: (n, c k), (c kh, n kw), or for tucker2 (n, c k) and (c, n k)."""
    if kind == "spatial":
        n, c, height, width = weight.shape
        return (weight.permute(1, 2, 0, 3).reshape(c * height, n * width),)
    return (weight.flatten(1), weight.transpose(0, 1).flatten(1))[: 2 if kind == "tucker2" else 1]


def energies(matrix: Tensor) -> Tensor:
    """Squared singular values, largest first, shape (min(matrix.shape),), float64.

    From the smaller Gram matrix, in a tenth of the time: errors are near 1e-16 of the largest one, which is
    nothing in a sum of them.
    """
    matrix = matrix.detach().double()
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp(min=0)


def decompose(weight: Tensor, factor: Factor) -> tuple[Tensor, ...]:
    """Weights of the layers that replace one of weight (n, c', *kernel), first to last, in float64.

    All have the same Frobenius norm (T1.11). For svd and spatial their product is the best approximation of
    its rank (Eckart and Young 1936); for tucker2 it is that of the truncated HOSVD (De Lathauwer 2000), whose
    squared error is at most the sum of both spectra's squared tails.
    """
    weight = weight.detach().double()
    rank, *rest = ranks(weight.shape, factor)
    if factor.kind == "tucker2":
        return _tucker2(weight, rank, *rest)
    left, right = _balanced(unfold(weight, factor.kind)[0], rank)
    if factor.kind == "spatial":
        n, c, height, width = weight.shape
        first = left.reshape(c, height, rank).permute(2, 0, 1).unsqueeze(3)
        return first, right.reshape(rank, n, width).transpose(0, 1).unsqueeze(2)
    ones = [1] * (weight.ndim - 2)
    return right.reshape(rank, *weight.shape[1:]), left.reshape(-1, rank, *ones)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V^T; LAPACK is several times faster at tall matrices than at wide ones."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, ut = torch.linalg.svd(matrix.T.contiguous(), full_matrices=False)
        return ut.T, s, v.T
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def _balanced(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_R sqrt(S_R) and sqrt(S_R) V_R^T."""
    u, s, vt = _svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vt[:rank]


def _tucker2(weight: Tensor, rank: int, rank_in: int) -> tuple[Tensor, ...]:
    over_n, over_c = unfold(weight, "tucker2")
    last, first = _svd(over_n)[0][:, :rank], _svd(over_c)[0][:, :rank_in].T
    core = torch.einsum("no,nc...,ic->oi...", last, weight, first)
    factors = (first, core, last)
    norms = torch.stack([f.norm() for f in factors])
    common = norms.prod() ** (1 / 3)
    if common > 0:
        first, core, last = (f * (common / norm) for f, norm in zip(factors, norms, strict=True))
    ones = [1] * (weight.ndim - 2)
    return first.reshape(rank_in, -1, *ones), core, last.reshape(-1, rank, *ones)


def compose(factors: Sequence[Tensor], kind: Kind) -> Tensor:
    """The weight that layers with these weights, one after the other, amount to."""
    if kind == "spatial":
        return torch.einsum("rciq,nrpj->ncij", *factors)  # q and p have length 1
    product = factors[0]
    for nxt in factors[1:]:
        if nxt.numel() == nxt.shape[0] * nxt.shape[1]:
            product = torch.einsum("nr,rc...->nc...", nxt.flatten(1), product)
        else:
            product = torch.einsum("nr...,rc->nc...", nxt, product.flatten(1))
    return product


def approximate(weight: Tensor, factor: Factor) -> Tensor:
    """The weight that a factor simulates: same shape and type, zero outside of `keep`, `rank` of the rest."""
    kept = weight.detach() if factor.keep is None else weight.detach()[:, factor.keep]
    if factor.rank is not None:
        kept = compose(decompose(kept, factor), factor.kind).to(weight.dtype)
    if factor.keep is None:
        return kept.clone()
    result = torch.zeros_like(weight)
    result[:, factor.keep] = kept
    return result


# ---------------------------------------------------------------------- costs


def split_shapes(shape: Sequence[int], kind: Kind, widths: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the weights that `decompose` makes of one of (n, c, *kernel), for the `ranks` in `widths`."""
    n, c, *kernel = shape
    ones = [1] * len(kernel)
    rank, *rest = widths
    if kind == "spatial":
        return [(rank, c, kernel[0], 1), (n, rank, 1, kernel[1])]
    if kind == "tucker2":
        return [(rest[0], c, *ones), (rank, rest[0], *kernel), (n, rank, *ones)]
    return [(rank, c, *kernel), (n, rank, *ones)]


def shapes_after(shape: Sequence[int], factor: Factor) -> list[tuple[int, ...]]:
    """Shapes of the weights of a layer of (n, c, *kernel) after `factor`: one without a rank."""
    n, c, *kernel = shape
    read = (n, c if factor.keep is None else len(factor.keep), *kernel)
    return [read] if factor.rank is None else split_shapes(read, factor.kind, ranks(read, factor))


def macs_after(shape: Sequence[int], factor: Factor, out: Plane = (), into: Plane | None = None) -> int:
    """Multiply-accumulates of one call of a layer after `factor` (METHODS 1.1).

    Args:
        shape: of the weight, (n, c, *kernel), with all columns.
        factor: its `keep` and ranks count.
        out, into: sizes of the output and input plane, () for a vector; spatial and tucker2 need `into`.
    """
    shapes = shapes_after(shape, factor)
    planes = [out] * len(shapes)
    if len(shapes) > 1 and factor.kind != "svd":
        if into is None:
            raise ValueError(f"macs_after: found no input plane, expected one for {factor.kind}")
        planes[0] = (out[0], into[1]) if factor.kind == "spatial" else into
    return sum(map(macs_of, shapes, planes))


def params_after(shape: Sequence[int], factor: Factor) -> int:
    """Weights of a layer after `factor`, bias excluded."""
    return sum(map(math.prod, shapes_after(shape, factor)))


def break_even(shape: Sequence[int], kept: int | None = None) -> float:
    """The rank at which the two factors of an svd cost as much as one weight: n c' k / (c' k + n).

    Args:
        shape: of the weight, (n, c, *kernel).
        kept: c', the input channels that are read; all by default.
    """
    n, c, *kernel = shape
    columns = (c if kept is None else kept) * math.prod(kernel)
    return n * columns / (columns + n)
