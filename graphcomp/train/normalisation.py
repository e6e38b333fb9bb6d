"""Batch normalisation where the statistics matter: estimated anew, or shared by the processes of a run."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.base import distributed
from graphcomp.errors import PassError
from graphcomp.ir import Batch, FrozenBatchNorm2d, Program, editable

BatchNorm = nn.modules.batchnorm._BatchNorm


def normalisations(module: nn.Module) -> dict[str, BatchNorm]:
    """Those with running statistics that are not frozen, by dotted path; PassError if there is none."""
    every = ((n, m) for n, m in module.named_modules() if isinstance(m, BatchNorm))
    moving = ((n, m) for n, m in every if not isinstance(m, FrozenBatchNorm2d))
    found = {name: norm for name, norm in moving if norm.running_mean is not None}
    if not found:
        raise PassError(
            "bn_reestimate: found no batch normalisation with running statistics, expected at least one; "
            "fold-bn removes them: run it later; where a file has them folded already, set bn_reestimate to "
            "0 (refit adapts weights instead)"
        )
    return found


# ---------------------------------------------------------------------- estimated anew


class _Moments:
    """Sums over all values of a channel, in float64 and additive, so that processes can share the work."""

    def __init__(self, channels: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros(2, channels, dtype=torch.float64)  # of x, of x^2

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = cast(Tensor, inputs[0]).movedim(1, 0).flatten(1).double()
        self.count += x.shape[1]
        self.sums += torch.stack([x.sum(1), x.square().sum(1)]).cpu()

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """With divisors n and n - 1, as torch's own running statistics."""
        mean = self.sums[0] / self.count
        centred = self.sums[1] - self.count * mean.square()
        return mean, (centred / (self.count - 1)).clamp(min=0)


@torch.no_grad()
def reestimate(
    program: Program, batches: Iterable[Batch], told: Callable[[int], None] = lambda seen: None
) -> Program:
    """A program whose batch normalisations have the statistics of `batches`; nothing else changes.

    While the statistics are collected every normalisation uses those of the batch, as in training, so that
    one pass is enough; dropout stays off. The result is the mean and the variance over all samples together,
    and not an average that forgets. Collective: every process gives its own batches and gets the same
    program.

    Args:
        program: left as it is.
        batches: inputs, with more than one value a channel; labels are not needed.
        told: called after each batch with the number of samples seen so far.

    Raises:
        PassError: if there is no normalisation with running statistics, or no batch.
    """
    net = editable(program).eval()
    norms = normalisations(net)
    moments = {name: _Moments(norm.num_features) for name, norm in norms.items()}
    for name, norm in norms.items():
        norm.train().register_forward_pre_hook(moments[name])
    seen = 0
    for x in batches:
        net(*x)
        seen += len(x[0])
        told(seen)
    distributed.all_reduce(t for m in moments.values() for t in (m.count, m.sums))
    return replace(program, module=editable(program, _statistics(program, moments)))


def _statistics(program: Program, moments: dict[str, _Moments]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, moment in moments.items():
        if moment.count < 2:
            raise PassError(
                f"bn_reestimate: {name}: found {int(moment.count)} value(s) a channel, expected two or more; "
                "give more samples"
            )
        for part, value in zip(("mean", "var"), moment.mean_and_variance(), strict=True):
            key = f"{name}.running_{part}"
            found[key] = value.to(program.tensors[key])
    return found


# ---------------------------------------------------------------------- shared by processes


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, since each process's loss depends on every summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce([total])
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce([total])
        return total


class SyncedBatchNorm(BatchNorm):
    """Batch normalisation by the statistics of the whole batch, of which every process has a part.

    torch's own SyncBatchNorm refuses tensors on the CPU. In eval mode it is an ordinary normalisation.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, …]` to the same shape."""
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        x = input if input.dtype == torch.float64 else input.float()
        dims = [0, *range(2, x.ndim)]
        own = x.new_tensor([x.numel() / x.shape[1]])
        total = cast(Tensor, _Sum.apply(torch.cat([x.sum(dims), own])))
        count, shape = total[-1], [1, -1, *[1] * (x.ndim - 2)]
        mean = total[:-1] / count
        centred = x - mean.view(shape)
        variance = cast(Tensor, _Sum.apply(centred.square().sum(dims))) / count
        self._track(mean.detach(), (variance * count / (count - 1)).detach())
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


def synchronise(module: nn.Module) -> None:
    """Make all batch normalisations below `module` share their statistics between processes, in place."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm) and not isinstance(norm, FrozenBatchNorm2d):
            norm.__class__ = SyncedBatchNorm
