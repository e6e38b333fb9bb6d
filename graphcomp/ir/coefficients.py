"""Layers whose weight is computed from stored coefficients, and the transforms behind them.

A weight of N elements is read as `rows` x `columns` (g x M, row-major), its columns are put in an order that
makes the rows smooth, and the first `terms` (t) coefficients of every row are stored (Ulicny, Krylov and
Dahyot 2020, "Tensor Reordering for CNN Compression"; METHODS 4.1):

    Xs[:, j] = W.reshape(g, M)[:, order[j]],    Y = dct(Xs)[:, :t]                      encode, Alg. 2
    W~ = idct([Y, 0])[:, index].reshape(W.shape),    index = argsort(order)             decode, Alg. 3

With `basis="standard"` both transforms are the identity: the first t columns themselves are stored.
"""

import math
from typing import Literal, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.errors import PassError

Basis = Literal["dct", "standard"]

_INDEX_TYPES = (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64)


def dct(x: Tensor) -> Tensor:
    """The orthonormal DCT-II of `x` along its last axis, for any length M (METHODS 4.3, by one real FFT).

    With v the even places of x in ascending order, then the odd ones in descending order, c_k = Y_k / s_k and
    c_M = 0,

        e^(-i pi k / 2M) FFT(v)_k = c_k - i c_(M-k)

    of which k = 0 ... M/2 are enough, since v is real.
    """
    length = x.shape[-1]
    folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    pairs = torch.fft.rfft(folded) * _rotation(length, x).conj()
    rest = -pairs.imag[..., 1 : (length + 1) // 2].flip(-1)
    return torch.cat([pairs.real, rest], dim=-1) * _scale(length, x)


def idct(coefficients: Tensor, length: int) -> Tensor:
    """The inverse of `dct`; coefficients beyond the given ones are zero.

    Args:
        coefficients: shape (..., t) with 1 <= t <= length.
        length: M, of the result's last axis.
    """
    scaled = coefficients / _scale(length, coefficients)[: coefficients.shape[-1]]
    scaled = F.pad(scaled, (0, length + 1 - coefficients.shape[-1]))
    half = length // 2 + 1
    pairs = torch.complex(scaled[..., :half], -scaled.flip(-1)[..., :half])
    folded = torch.fft.irfft(pairs * _rotation(length, coefficients), length)
    ascending = (length + 1) // 2
    odd = F.pad(folded[..., ascending:].flip(-1), (0, 2 * ascending - length))
    return torch.stack([folded[..., :ascending], odd], dim=-1).flatten(-2)[..., :length]


def _scale(length: int, like: Tensor) -> Tensor:
    """s_k: sqrt(1/M) for the constant, sqrt(2/M) for the others."""
    scale = torch.full((length,), math.sqrt(2 / length), dtype=like.dtype, device=like.device)
    scale[0] = math.sqrt(1 / length)
    return scale


def _rotation(length: int, like: Tensor) -> Tensor:
    """e^(i pi k / 2M) for k = 0 ... M/2, with angles in float64 whatever the type of `like`."""
    angles = torch.arange(length // 2 + 1, dtype=torch.float64, device=like.device) * (math.pi / (2 * length))
    return torch.complex(angles.cos().to(like.dtype), angles.sin().to(like.dtype))


def spectrum(weight: Tensor, rows: int, order: Tensor | None, basis: Basis = "dct") -> Tensor:
    """All coefficients of a weight, shape (rows, columns), in its own precision.

    Args:
        weight: any shape; `rows` divides the number of its elements.
        order: integers (columns,): which column stands at every place; None leaves them where they are.
    """
    x = weight.reshape(rows, -1)
    if order is not None:
        x = x.index_select(1, order.to(weight.device, torch.int64))
    return dct(x) if basis == "dct" else x


def encode(weight: Tensor, rows: int, terms: int, order: Tensor | None, basis: Basis = "dct") -> Tensor:
    """Alg. 2: the first coefficients of a weight, shape (rows, terms); see `spectrum`."""
    return spectrum(weight, rows, order, basis)[:, :terms]


def decode(coefficients: Tensor, columns: int, index: Tensor | None, basis: Basis = "dct") -> Tensor:
    """Alg. 3: the weight as (rows, columns), differentiable in the coefficients.

    Args:
        coefficients: shape (rows, terms).
        columns: M.
        index: integers (columns,): the place of every column; None if they are in the original order.
    """
    if basis == "dct":
        x = idct(coefficients, columns)
    else:
        x = F.pad(coefficients, (0, columns - coefficients.shape[1]))
    return x if index is None else x.index_select(1, index.long())


def narrowest(count: int) -> torch.dtype:
    """The smallest integer type that holds 0 ... count - 1."""
    return next(t for t in _INDEX_TYPES if torch.iinfo(t).max >= count - 1)


class DctLayer(nn.Module):
    """What `DctConv2d` and `DctLinear` share. A new layer is all zeros; `compressed` makes a useful one.

    Training changes `coefficients` and `bias`: the weight is rebuilt in every forward.

    Attributes:
        coefficients: parameter (rows, terms).
        index: integer buffer (columns,), the place of every column of the weight; None if not `reordered`.
        bias: parameter or None.
        weight_shape: of the weight that the coefficients stand for; rows * columns elements.
        rows, columns, terms: g, M and t.
        basis: what the coefficients are of; "standard": they are columns of the weight.
    """

    coefficients: nn.Parameter
    index: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, weight_shape: tuple[int, ...], rows: int, terms: int, bias: bool, basis: Basis, reordered: bool
    ) -> None:
        super().__init__()
        count = math.prod(weight_shape)
        if rows < 1 or count % rows or not 1 <= terms <= count // rows:
            raise PassError(
                f"{type(self).__name__}: found rows={rows} and terms={terms} for {count} weights, expected a "
                "divisor of the weights and at least one term, at most one a column"
            )
        self.weight_shape = weight_shape
        self.rows, self.columns, self.terms = rows, count // rows, terms
        self.basis: Basis = basis
        self.reordered = reordered
        self.coefficients = nn.Parameter(torch.zeros(rows, terms))
        places = torch.arange(self.columns).to(narrowest(self.columns))
        self.register_buffer("index", places if reordered else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(weight_shape[0])) if bias else None)

    def weight(self) -> Tensor:
        """The weight, of `weight_shape`, differentiable in the coefficients (Alg. 3)."""
        stored = self.coefficients
        exact = (
            stored.float() if stored.dtype in (torch.float16, torch.bfloat16) else stored
        )  # no FFT in half
        rebuilt = decode(exact, self.columns, self.index, self.basis)
        return rebuilt.reshape(self.weight_shape).to(stored.dtype)

    def flaw(self) -> str | None:
        """What is wrong with the tensors, `found X, expected Y`; None if nothing is."""
        if self.coefficients.shape != (self.rows, self.terms):
            found = tuple(self.coefficients.shape)
            return f"coefficients: found shape {found}, expected {(self.rows, self.terms)}"
        if (self.index is not None) != self.reordered:
            return f"index: found {'one' if self.reordered is False else 'none'}, expected the other"
        if self.index is not None and not _is_permutation(self.index, self.columns):
            return f"index: found no permutation, expected every integer from 0 to {self.columns - 1} once"
        return None

    def extra_repr(self) -> str:
        """The shapes and how they came about."""
        shape = "x".join(map(str, self.weight_shape))
        order = "" if self.reordered else ", reordered=False"
        return f"{shape} as {self.rows}x{self.terms} of {self.rows}x{self.columns}, basis={self.basis}{order}"


def _is_permutation(index: Tensor, count: int) -> bool:
    if index.shape != (count,) or index.is_floating_point() or index.is_complex():
        return False
    places = index.long()
    inside = bool((places >= 0).all()) and bool((places < count).all())
    return inside and bool((torch.bincount(places, minlength=count) == 1).all())


class DctConv2d(DctLayer):
    """A 2-d convolution whose weight is rebuilt from coefficients in every forward.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as
            `nn.Conv2d` has them, sizes as pairs.
        rows, terms, basis, reordered: as `DctLayer` has them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: str | tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        rows: int = 1,
        terms: int = 1,
        basis: Basis = "dct",
        reordered: bool = True,
    ) -> None:
        shape = (out_channels, in_channels // groups, *kernel_size)
        super().__init__(shape, rows, terms, bias, basis, reordered)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.padding_mode = groups, padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as those of `nn.Conv2d`."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._margins(), mode=self.padding_mode), (0, 0)
        return F.conv2d(x, self.weight(), self.bias, self.stride, padding, self.dilation, self.groups)

    def _margins(self) -> list[int]:
        """Padding as `F.pad` takes it: the last axis first, before and after."""
        margins: list[int] = []
        for axis in (1, 0):
            if isinstance(self.padding, str):
                total = self.dilation[axis] * (self.kernel_size[axis] - 1) if self.padding == "same" else 0
                margins += [total // 2, total - total // 2]
            else:
                margins += [self.padding[axis]] * 2
        return margins


class DctLinear(DctLayer):
    """A linear layer whose weight is rebuilt from coefficients in every forward.

    Args:
        in_features, out_features, bias: as `nn.Linear` has them.
        rows, terms, basis, reordered: as `DctLayer` has them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rows: int = 1,
        terms: int = 1,
        basis: Basis = "dct",
        reordered: bool = True,
    ) -> None:
        super().__init__((out_features, in_features), rows, terms, bias, basis, reordered)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as those of `nn.Linear`."""
        return F.linear(x, self.weight(), self.bias)


LAYERS: dict[str, type[DctConv2d] | type[DctLinear]] = {c.__name__: c for c in (DctConv2d, DctLinear)}
"""By class name: what a saved program may hold besides layers of torch.nn."""


class _Options(TypedDict):
    rows: int
    terms: int
    basis: Basis
    reordered: bool


@torch.no_grad()
def compressed(
    layer: nn.Conv2d | nn.Linear, rows: int, terms: int, order: Tensor | None, basis: Basis = "dct"
) -> DctConv2d | DctLinear:
    """The coefficient layer of a trained layer, with its bias; coefficients are computed in float64.

    Args:
        layer: is not changed.
        rows, terms, order, basis: as `encode` has them.
    """
    options = _Options(rows=rows, terms=terms, basis=basis, reordered=order is not None)
    new = _empty(layer, options)
    coefficients = encode(layer.weight.double(), rows, terms, order, basis)
    new.coefficients = nn.Parameter(coefficients.to(layer.weight.dtype), layer.weight.requires_grad)
    new.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
    if order is not None:
        index = torch.argsort(order.to(layer.weight.device, torch.int64))
        new.register_buffer("index", index.to(narrowest(new.columns)))
    return new.train(layer.training)


def _empty(layer: nn.Conv2d | nn.Linear, options: _Options) -> DctConv2d | DctLinear:
    if isinstance(layer, nn.Linear):
        return DctLinear(layer.in_features, layer.out_features, layer.bias is not None, **options)
    return DctConv2d(
        layer.in_channels,
        layer.out_channels,
        cast(tuple[int, int], layer.kernel_size),
        cast(tuple[int, int], layer.stride),
        cast(str | tuple[int, int], layer.padding),
        cast(tuple[int, int], layer.dilation),
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        **options,
    )
