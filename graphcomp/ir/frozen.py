"""Batch normalisation that never follows the batch, as detection networks have in their backbones.

torchvision, detectron2 and DETR each have a module of their own for it, four buffers and arithmetic on them.
torch.fx would trace through and leave products and sums with computed tensors, in which no pass sees a
normalisation any more. So it becomes one kind of `nn.BatchNorm2d` when it comes in, that everything which
knows batch normalisation knows. A plain BatchNorm2d would not do: in training it follows the batch.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.ir.hooks import is_hooked

_HOLDS = {"weight", "bias", "running_mean", "running_var"}


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """`(x - mean) / sqrt(var + eps) * weight + bias` by stored statistics, in training too; none learns."""

    num_batches_tracked: None

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps, momentum=0.0)
        self.register_buffer("num_batches_tracked", None)  # saved by nobody, and nothing to count
        self.requires_grad_(False)

    def reset_running_stats(self) -> None:
        """Those of the identity; without a counter, which torch's own would reset."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` to the same shape, whatever the mode."""
        self._check_input_dim(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def holds_frozen(model: nn.Module) -> bool:
    """Whether `as_layers` would change anything."""
    return any(_is_frozen(child) for child in model.modules() if child is not model)


def as_layers(model: nn.Module) -> None:
    """Replace the frozen normalisations below `model` by layers with the same tensors, in place.

    A module counts as one by what it is called and holds, and only if it computes the same: a subclass with
    an activation, say, stays and is traced through.
    """
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) not in made and _is_frozen(child):
                layer = _layer(child)
                made[id(child)] = layer if _computes_the_same(child, layer) else child
            if id(child) in made:
                parent._modules[name] = made[id(child)]


def _is_frozen(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    if isinstance(module, FrozenBatchNorm2d) or not ("frozen" in name and "batchnorm" in name):
        return False
    held = {n for n, b in module._buffers.items() if b is not None} - {"num_batches_tracked"}
    plain = not module._parameters and not module._modules
    return plain and held == _HOLDS and not is_hooked(module)


def _layer(module: Any) -> FrozenBatchNorm2d:
    layer = FrozenBatchNorm2d(module.weight.numel(), float(getattr(module, "eps", 1e-5)))
    layer.weight = nn.Parameter(module.weight, requires_grad=False)
    layer.bias = nn.Parameter(module.bias, requires_grad=False)
    layer.running_mean, layer.running_var = module.running_mean, module.running_var
    return layer.train(module.training)


@torch.no_grad()
def _computes_the_same(module: nn.Module, layer: FrozenBatchNorm2d) -> bool:
    """In float64, whatever `eps` is called or where it is written down."""
    x = torch.linspace(-2, 3, 4 * layer.num_features, dtype=torch.float64).reshape(1, -1, 2, 2)
    try:
        found = cast(Tensor, copy.deepcopy(module).double()(x))
        return torch.allclose(found, copy.deepcopy(layer).double()(x), rtol=1e-9, equal_nan=True)
    except (RuntimeError, TypeError, ValueError):
        return False
