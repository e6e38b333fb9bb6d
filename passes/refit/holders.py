"""What holds a layer's matrix W: its weight, its coefficients, or a factor in front together with it."""

from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir import DctLayer, decode, encode
from graphcomp.measure import Normal, as_weight, matrix, matrix_shape
from graphcomp.passes.refit.units import Unit

WEAK = 1e-3
"""Outputs that matter less than this part of the one that matters most are taken to matter as much."""


class Holder:
    """A layer of its own weight.

    Attributes:
        w: `[g, o, K]`, float64, as it came.
        is_limited: whether there are matrices that cannot be held.
        is_free: whether any change can.
    """

    is_limited = False
    is_free = True

    def __init__(self, path: str, layer: nn.Module) -> None:
        self.path, self.layer, self.w = path, layer, matrix(layer).clone()  # it may be a view of the weight

    def factor(self, normal: Normal, ridge: float) -> Tensor | None:
        """What `change` can be given where targets alone differ; None if nothing can be kept."""
        return normal.factor(ridge)

    def change(self, normal: Normal, ridge: float, factor: Tensor | None = None) -> Tensor:
        """What is best added to W."""
        factor = normal.factor(ridge) if factor is None else factor
        return normal.solve(torch.zeros_like(normal.cross).transpose(1, 2), factor)

    def nearest(self, w: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
        """What comes closest to W and can be held.

        Args:
            w: W.
            gram: C, `[g, K, K]`.
            scale: of the outputs, `[g, o]`.
        """
        return w

    def write(self, w: Tensor) -> dict[str, Tensor]:
        """Set the layer; the tensors that changed, by name."""
        return {f"{self.path}.weight": _set(self.layer, w)}


class Coefficients(Holder):
    """A layer that stores cosine coefficients: W lies in their space, and what is fitted does."""

    is_free = False

    def factor(self, normal: Normal, ridge: float) -> Tensor | None:
        """None: conjugate gradients have none."""
        return None

    def change(self, normal: Normal, ridge: float, factor: Tensor | None = None) -> Tensor:
        """What is best added to W and can be said."""
        return normal.solve_within(torch.zeros_like(self.w), ridge, self._projected)

    def write(self, w: Tensor) -> dict[str, Tensor]:
        """Set the coefficients."""
        stored = cast(DctLayer, self.layer).coefficients
        stored.copy_(self._coefficients(w))
        return {f"{self.path}.coefficients": stored}

    def _projected(self, w: Tensor) -> Tensor:
        layer = cast(DctLayer, self.layer)
        return decode(self._coefficients(w), layer.columns, layer.index, layer.basis).reshape(w.shape)

    def _coefficients(self, w: Tensor) -> Tensor:
        layer = cast(DctLayer, self.layer)
        order = None if layer.index is None else layer.index.long().argsort()
        return encode(w.reshape(layer.weight_shape), layer.rows, layer.terms, order, layer.basis)


class Pair(Holder):
    """A layer that only mixes what a factor in front yields: W is their product, of a given rank."""

    is_limited = True
    is_free = False

    def __init__(self, paths: tuple[str, str], first: nn.Module, last: nn.Module) -> None:
        super().__init__(paths[1], last)
        self.paths, self.first = paths, first
        self.w = self.w @ matrix(first)
        self.factors = matrix(first), matrix(last)

    def nearest(self, w: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
        """What keeps most of the outputs, as much as the factor in front has outputs (METHODS 9.6)."""
        rank = matrix_shape(self.first)[1]
        size = scale[0].abs().clamp(min=float(scale.abs().max()) * WEAK).unsqueeze(1)
        scaled = size * w[0]
        directions = torch.linalg.eigh(scaled @ gram[0] @ scaled.T).eigenvectors[:, -rank:]
        self.factors = (directions.T @ scaled).unsqueeze(0), (directions / size).unsqueeze(0)
        return self.factors[1] @ self.factors[0]

    def write(self, w: Tensor) -> dict[str, Tensor]:
        """Set both layers."""
        layers = zip(self.paths, (self.first, self.layer), self.factors, strict=True)
        return {f"{path}.weight": _set(layer, values) for path, layer, values in layers}


def _set(layer: nn.Module, values: Tensor) -> Tensor:
    weight = cast(Tensor, layer.weight)
    weight.copy_(as_weight(layer, values))
    return weight


def kind_of(unit: Unit, layer: nn.Module) -> type[Holder]:
    """What holds the fitted weights of a unit's layer."""
    if unit.factor is not None:
        return Pair
    return Coefficients if isinstance(layer, DctLayer) else Holder


def holder_of(module: fx.GraphModule, unit: Unit) -> Holder:
    """Of a unit's layer."""
    layer = module.get_submodule(unit.layer)
    if unit.factor is not None:
        return Pair((unit.factor[0], unit.layer), module.get_submodule(unit.factor[0]), layer)
    return kind_of(unit, layer)(unit.layer, layer)
