"""Layers that mix channels as products with a matrix: what they read at sampled positions, one row each.

A convolution, transposed convolution or linear layer computes at every position of its output, for each of
its g groups,

    y = W a + b,        W (out / g, K),    a (K,)

where a is the patch that it reads there (METHODS 9.1): K = c / g * taps columns, the kernel's taps inside
each channel. Padding belongs to the patch. A transposed convolution is the convolution of its input with
zeros between the pixels by the kernel turned around.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.ir import DctConv2d, DctLayer, DctLinear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, DctConv2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (nn.Linear, DctLinear)


def is_mixing(module: nn.Module) -> bool:
    """Whether a layer is a product with a matrix in this sense; subclasses may compute anything."""
    return type(module) in (*CONVOLUTIONS, *TRANSPOSED, *LINEAR)


def is_linear(module: nn.Module) -> bool:
    """Whether the channels of a mixing layer are the last dimension, not the second."""
    return type(module) in LINEAR


def groups_of(module: nn.Module) -> int:
    """g, 1 of linear layers."""
    return cast(int, getattr(module, "groups", 1))


def matrix(module: nn.Module) -> Tensor:
    """W of a mixing layer, shape (g, out / g, K), float64, detached."""
    return as_matrix(module, _weight(module).detach())


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """W, float64, of a tensor in the shape of a mixing layer's weight: its gradient, say."""
    weight, g = weight.double(), groups_of(module)
    if isinstance(module, TRANSPOSED):
        spatial = tuple(range(3, weight.ndim + 1))
        blocks = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2)
        return blocks.flip(spatial).flatten(2).contiguous()
    return weight.reshape(g, weight.shape[0] // g, -1)


def as_weight(module: nn.Module, values: Tensor) -> Tensor:
    """The inverse of `matrix`: values (g, out / g, K) in the shape and type of the layer's weight."""
    weight, g = _weight(module), groups_of(module)
    if isinstance(module, TRANSPOSED):
        kernel = weight.shape[2:]
        blocks = values.reshape(g, values.shape[1], -1, *kernel)
        blocks = blocks.flip(tuple(range(3, 3 + len(kernel)))).transpose(1, 2)
        return blocks.reshape(weight.shape).to(weight.dtype)
    return values.reshape(weight.shape).to(weight.dtype)


def _weight(module: nn.Module) -> Tensor:
    return module.weight() if isinstance(module, DctLayer) else cast(Tensor, module.weight)


def matrix_shape(module: nn.Module) -> tuple[int, int, int]:
    """(g, out / g, K) of a mixing layer."""
    shape = module.weight_shape if isinstance(module, DctLayer) else tuple(cast(Tensor, module.weight).shape)
    g = groups_of(module)
    if isinstance(module, TRANSPOSED):
        return g, shape[1], shape[0] // g * math.prod(shape[2:])
    return g, shape[0] // g, math.prod(shape[1:])


@dataclass(frozen=True)
class Positions:
    """Which positions of every map are looked at: the same ones in all maps of one size (METHODS 9.1).

    Attributes:
        count: at most so many a sample.
        seed: of the draw.
    """

    count: int
    seed: int

    def of(self, size: int, first: int, samples: int) -> Tensor:
        """Positions `[samples, min(count, size)]` below `size`, ascending, distinct in every sample.

        Args:
            size: of the map, all dimensions together.
            first: number of the first sample in its split, so that processes draw what one would.
            samples: how many there are from there on.
        """
        if size <= self.count:
            return torch.arange(size).expand(samples, size)
        drawn = []
        for sample in range(first, first + samples):
            generator = torch.Generator().manual_seed(hash((self.seed, size, sample)) % (1 << 63))
            drawn.append(torch.randperm(size, generator=generator)[: self.count])
        return torch.stack(drawn).sort(1).values


def outputs_at(module: nn.Module, output: Tensor, at: Tensor) -> Tensor:
    """Rows `[n * P, channels]` of a mixing layer's output, or of any value of its shape, at `at` `[n, P]`.

    All dimensions of a linear layer's output but the last are n times one map, in whatever order.
    """
    if is_linear(module):
        flat = output.reshape(len(at), -1, output.shape[-1])
        return flat.gather(1, at.unsqueeze(2).expand(-1, -1, flat.shape[2])).flatten(0, 1)
    flat = output.flatten(2) if output.ndim > 2 else output.unsqueeze(2)
    found = flat.gather(2, at.unsqueeze(1).expand(-1, flat.shape[1], -1))
    return found.transpose(1, 2).flatten(0, 1)


def patches_at(module: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """What a mixing layer reads for its outputs at `at` `[n, P]`: rows `[n * P, g, K]`."""
    if is_linear(module):
        return outputs_at(module, x, at).unsqueeze(1)
    layer: Any = module
    dims = x.ndim - 2
    kernel, dilation = tuple(layer.kernel_size), tuple(layer.dilation)
    if isinstance(module, TRANSPOSED):
        x, stride = _spread(layer, x), (1,) * dims
    else:
        x, stride = _padded(layer, x), tuple(layer.stride)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)
    ]
    index = _read_from(at, sizes, x.shape[2:], kernel, dilation, stride)
    n, p, taps = index.shape
    found = x.flatten(2).gather(2, index.reshape(n, 1, p * taps).expand(-1, x.shape[1], -1))
    g = groups_of(module)
    rows = found.reshape(n, g, x.shape[1] // g, p, taps).permute(0, 3, 1, 2, 4)
    return rows.reshape(n * p, g, -1)


def _read_from(at: Tensor, sizes: Any, padded: Any, kernel: Any, dilation: Any, stride: Any) -> Tensor:
    """Flat positions in the padded input `[n, P, taps]` that outputs at `at` read."""
    index = torch.zeros(*at.shape, 1, dtype=torch.int64, device=at.device)
    rest, step = at, 1
    parts = []
    for axis in reversed(range(len(sizes))):
        start = rest % sizes[axis] * stride[axis]
        rest = rest // sizes[axis]
        taps = torch.arange(kernel[axis], device=at.device) * dilation[axis]
        parts.append((start.unsqueeze(2) + taps) * step)
        step *= padded[axis]
    for part in reversed(parts):  # the last axis counts fastest
        index = (index.unsqueeze(3) + part.unsqueeze(2)).flatten(2)
    return index


def _padded(layer: Any, x: Tensor) -> Tensor:
    margins: list[int] = []
    for axis in reversed(range(x.ndim - 2)):
        if isinstance(layer.padding, str):
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1) if layer.padding == "same" else 0
            margins += [total // 2, total - total // 2]
        else:
            margins += [layer.padding[axis]] * 2
    if not any(margins):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, margins, mode=mode)


def _spread(layer: Any, x: Tensor) -> Tensor:
    """Zeros between the pixels and around them, so that a transposed convolution is a plain one."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in layer.stride))] = x
    margins: list[int] = []
    for axis in reversed(range(x.ndim - 2)):
        edge = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - layer.padding[axis]
        margins += [edge, edge + layer.output_padding[axis]]
    return F.pad(wide, margins)  # a negative margin cuts, as padding of a transposed convolution does
