"""Networks for tests: small ones with one trap each, and random CNN graphs drawn by hypothesis.

Everything here can be traced by `torch.fx.symbolic_trace`, takes one input of batch 1, and draws its weights
from a seed of its own. A fresh net hides bugs (its normalisations are the identity): `scramble` it first.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from operator import add, itemgetter
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

Shape = tuple[int, ...]
Built = tuple[nn.Module, Shape]
Spec = dict[str, Any]
Forward = Callable[[Any, Tensor], Any]
Part = nn.Module | Tensor

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.GroupNorm,
    nn.LayerNorm,
    FrozenBatchNorm2d,
)


def scramble(module: nn.Module, seed: int) -> nn.Module:
    """Randomise every norm statistic, affine parameter, bias and PReLU slope in place; returns `module`.

    Variances land in [0.5, 1.5], affine weights and slopes in ±[0.5, 1.5], means and biases are standard
    normal. Other weights, the global random state, dtype and device stay as they are.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            affine = isinstance(part, (*_NORMS, nn.PReLU))
            own = chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
            for name, tensor in own:
                if not tensor.is_floating_point():
                    continue
                size = torch.rand(tensor.shape, generator=rng, dtype=torch.float64) + 0.5
                normal = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
                if name == "running_var":
                    tensor.copy_(size)
                elif name == "running_mean" or name.endswith("bias"):
                    tensor.copy_(normal)
                elif name == "weight" and affine:
                    tensor.copy_(size.copysign(normal))
    return module


def _seeded(builder: Callable[[], Built], seed: int = 0) -> Built:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder()


# ---- Trap nets


class Net(nn.Module):
    """A module whose forward is a plain function of itself and its input; plain tensors become buffers."""

    def __init__(self, function: Forward, **parts: Part) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _conv(inner: int, outer: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, padding=kernel // 2, **options)


def _block(inner: int, outer: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(_conv(inner, outer, kernel, bias=False, **options), nn.BatchNorm2d(outer), nn.ReLU())


def _head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _random(*shape: int) -> Tensor:
    """Values in ±[0.5, 1.5], so that no channel is like another and none vanishes."""
    return (torch.rand(shape) + 0.5).copysign(torch.randn(shape))


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(_random(*shape))


def _net(function: Forward, shape: Shape = (1, 3, 8, 8), **parts: Part) -> Built:
    return Net(function, **parts), shape


def _between(body: Forward, inner: int = 16, outer: int = 16, **parts: Part) -> Built:
    """`body` between two conv blocks: it gets [1, inner, 8, 8] and hands on [1, outer, h, w]."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.head(m.after(body(m, m.before(x))))

    net = Net(forward, before=_block(3, inner), **parts, after=_block(outer, 12), head=_head(12))
    return net, (1, 3, 8, 8)


def _of(module: Callable[[], nn.Module], inner: int = 16, outer: int = 16) -> Built:
    """One module between two conv blocks."""
    return _between(lambda m, x: m.trap(x), inner, outer, trap=module())


def _stack_interleaved(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x), m.b(x)], 2).flatten(1, 2)


def _cat_of_flattened(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    y = m.down(x)
    return m.fc(torch.cat([torch.flatten(x, 1), y.flatten(1), x.mean((2, 3))], 1))


def _cat_relu_shuffle(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    return _shuffle(torch.cat([x, F.relu(x)], 1), 4)


def _crelu(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    return F.relu(torch.cat([x, -x], 1))


def _space_to_depth_by_slices(m: Any, x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def _space_to_depth_by_view(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.size(0), x.size(1), x.size(2), x.size(3)
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, c * 4, h // 2, w // 2)


def _literal_view_flat(m: Any, x: Tensor) -> Any:
    return m.fc(F.max_pool2d(m.body(x), 2).view(-1, 16 * 4 * 4))


def _option_a(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    x = F.relu(m.one(x) + x)
    x = F.relu(m.two(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3)))
    x = F.relu(m.three(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 6, 6)))
    return m.head(x)


def _option_a_shortcuts() -> Built:
    def branch(inner: int, outer: int, stride: int) -> nn.Sequential:
        return nn.Sequential(_block(inner, outer, stride=stride), _conv(outer, outer), nn.BatchNorm2d(outer))

    one, two, three = branch(6, 6, 1), branch(6, 12, 2), branch(12, 24, 2)
    return Net(_option_a, stem=_block(3, 6), one=one, two=two, three=three, head=_head(24)), (1, 3, 16, 16)


def _two_outputs(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.stem(x)
    y = m.deep(x)
    return m.head(y), m.auxiliary(x)


def _dict_output(m: Any, x: Tensor) -> dict[str, Tensor]:
    x = m.stem(x)
    return {"out": m.head(m.deep(x)), "aux": m.auxiliary(x)}


def _nested_output(m: Any, x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
    x = m.stem(x)
    y = m.deep(x)
    return m.head(y), {"maps": [x, y]}


def _outputs(function: Forward) -> Built:
    return _net(function, stem=_block(3, 16), deep=_block(16, 12), head=_head(12), auxiliary=_head(16))


def _used_on_two_scales(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    y = m.down(x)
    return m.head_a(m.shared(x)) + m.head_b(m.shared(y))


def _frozen(built: Built, *names: str) -> Built:
    net, shape = built
    for part in [net.get_submodule(name) for name in names] or [net]:
        part.requires_grad_(False)
    return net, shape


def _inplace_relu_then_reused(m: Any, x: Tensor) -> Any:
    x = m.conv(x)
    y = torch.relu_(x)
    return m.head(m.after(x + y))


def _inplace_module_then_reused(m: Any, x: Tensor) -> Any:
    x = m.conv(x)
    y = m.relu(x)
    return m.head(m.after(torch.cat([x, y], 1)))


def _inplace_on_slice(m: Any, x: Tensor) -> Any:
    x = m.conv(x)
    x[:, :6].sub_(0.5).relu_()
    return m.head(m.after(x))


def _inplace_add(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    y = m.branch(x)
    y += x
    return m.head(F.relu(y, inplace=True))


def _resnext(m: Any, x: Tensor) -> Tensor:
    return F.relu(x + m.norm(m.expand(m.grouped(m.reduce(x)))))


def _gate_by_linear(m: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
    return x * gate.view(x.size(0), x.size(1), 1, 1)


def _shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.size(0), x.size(1), x.size(2), x.size(3)
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass, half go through a branch, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        depthwise = nn.Sequential(_conv(half, half, groups=half, bias=False), nn.BatchNorm2d(half))
        self.branch = nn.Sequential(_block(half, half, 1), depthwise, _block(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return _shuffle(torch.cat([kept, self.branch(changed)], dim=1), 2)


def _split_sizes(m: Any, x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [3, 8, 5], 1)
    return torch.cat([c, m.conv(b), a], 1)


def _unbind(m: Any, x: Tensor) -> Tensor:
    a, b = x.view(x.size(0), 2, x.size(1) // 2, x.size(2), x.size(3)).unbind(1)
    return a * torch.sigmoid(b)


def _ragged_chunk(m: Any, x: Tensor) -> Tensor:
    pieces = x.chunk(3, 1)  # 6, 6 and 4 channels
    return torch.cat([m.conv(pieces[2]), pieces[0] + pieces[1]], 1)


def _densenet(m: Any, x: Tensor) -> Tensor:
    features = [x]
    for layer in (m.one, m.two, m.three):
        features.append(layer(torch.cat(features, 1)))
    return torch.cat(features, 1)


def _densenet_layer(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), _conv(channels, 4))


def _inception(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.one(x), m.three(x), m.twice(x), m.pool(F.max_pool2d(x, 3, 1, 1))], 1)


def _spatial_attention(m: Any, x: Tensor) -> Tensor:
    pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * torch.sigmoid(m.conv(pooled))


def _gram(m: Any, x: Tensor) -> Any:
    x = m.body(x).flatten(2)
    return m.fc((x @ x.transpose(1, 2)).flatten(1))


def _weight_standardised(m: Any, x: Tensor) -> Tensor:
    weight = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
    weight = weight / (weight.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    return F.conv2d(x, weight, m.bias, padding=1)


class NormAct(nn.BatchNorm2d):
    """A normalisation with its activation built in; fx traces through a layer that is not torch's own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)
        return self.act(x)  # type: ignore[no-any-return]


class SameConv(nn.Conv2d):
    """A convolution that pads its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, [1, 1, 1, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _frozen_norm(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.mean, m.var, m.weight, m.bias)


def _tied_convs() -> Built:
    a, b = _conv(16, 16), _conv(16, 16)
    b.weight = a.weight
    return _between(lambda m, x: m.b(F.relu(m.a(x))), a=a, b=b)


def _autoencoder(m: Any, x: Tensor) -> Any:
    return m.out(F.linear(F.relu(m.fc(m.lift(x))), m.fc.weight.t()))


def _conv1d() -> Built:
    def block(inner: int, outer: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(inner, outer, 3, padding=1), nn.BatchNorm1d(outer), nn.ReLU())

    body = nn.Sequential(block(3, 12), nn.MaxPool1d(2), block(12, 16), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(16, 5)), (1, 3, 16)


def _conv3d() -> Built:
    def block(inner: int, outer: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv3d(inner, outer, 3, padding=1), nn.BatchNorm3d(outer), nn.ReLU())

    body = nn.Sequential(block(3, 12), nn.MaxPool3d(2), block(12, 16), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(16, 5)), (1, 3, 4, 8, 8)


def _transformer_mlp(m: Any, x: Tensor) -> Any:
    x = m.embed(x)
    x = x + m.down(F.gelu(m.up(m.norm(x))))
    return m.head(m.last(x).mean(1))


def _mixer(m: Any, x: Tensor) -> Any:
    x = m.embed(x)
    x = x + m.token_out(F.gelu(m.token_in(m.norm_a(x).transpose(1, 2)))).transpose(1, 2)
    x = x + m.channel_out(F.gelu(m.channel_in(m.norm_b(x))))
    return m.head(x.mean(1))


def _attention(m: Any, x: Tensor) -> Any:
    x = m.embed(x)
    q, k, v = m.query(x), m.key(x), m.value(x)
    scores = torch.softmax(q @ k.transpose(-2, -1) * q.size(-1) ** -0.5, -1)
    return m.head((x + m.project(scores @ v)).mean(1))


def _attention_with_heads(m: Any, x: Tensor) -> Any:
    x = m.embed(x)
    n, t, c = x.shape[0], x.shape[1], x.shape[2]
    qkv = m.qkv(x).reshape(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
    return m.head((x + m.project(mixed)).mean(1))


def _attention_module(m: Any, x: Tensor) -> Any:
    x = m.embed(x)
    return m.head((x + m.attention(x, x, x, need_weights=False)[0]).mean(1))


def _tokens(function: Forward, **parts: nn.Module) -> Built:
    """Ten tokens of 6 features, embedded in 16."""
    return _net(function, (1, 10, 6), embed=nn.Linear(6, 16), **parts, head=nn.Linear(16, 5))


def _unet(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    y = m.down(x)
    y = m.bottom(F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False))
    return m.head(m.up(torch.cat([y, x], 1)))


def _resized_to_other_map(m: Any, x: Tensor) -> Tensor:
    y = F.interpolate(m.down(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([x, y], 1)


def _nhwc_linear(m: Any, x: Tensor) -> Any:
    return x + m.down(F.gelu(m.up(m.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


def _norm_over_channels(m: Any, x: Tensor) -> Any:
    return m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _preactivation(m: Any, x: Tensor) -> Any:
    x = m.stem(x)
    x = x + m.conv_a(F.relu(m.norm_a(x)))
    x = x + m.conv_b(F.relu(m.norm_b(x)))
    return m.head(F.relu(m.norm_c(x)))


def _unused_value(m: Any, x: Tensor) -> Any:
    m.spare(x)
    return m.conv(x)


def _parallel(function: Forward, outer: int) -> Built:
    """`function` sees one map and has two convs `a` and `b` of 8 channels to read it with."""
    return _between(function, 16, outer, a=_conv(16, 8), b=_conv(16, 8))


_BUILDERS: dict[str, Callable[[], Built]] = {
    # halves and groups of channels that work together
    "glu-functional": lambda: _between(lambda m, x: F.glu(x, 1), 16, 8),
    "glu-module": lambda: _of(lambda: nn.GLU(1), 16, 8),
    "maxout-sizes": lambda: _between(
        lambda m, x: x.view(x.size(0), x.size(1) // 2, 2, x.size(2), x.size(3)).max(2)[0], 16, 8
    ),
    "maxout-literals": lambda: _between(lambda m, x: x.view(-1, 8, 2, 8, 8).max(2).values, 16, 8),
    "sum-over-view-groups": lambda: _between(lambda m, x: x.view(-1, 4, 4, 8, 8).sum(1), 16, 4),
    # slices
    "slice-strided": lambda: _between(lambda m, x: x[:, ::2], 16, 8),
    "slice-contiguous": lambda: _between(lambda m, x: x[:, 4:12], 16, 8),
    "slice-negative": lambda: _between(lambda m, x: torch.cat([x[:, -6:], x[:, :-4]], 1), 16, 18),
    "slice-of-slice": lambda: _between(lambda m, x: x[:, 2:14][:, 1::3], 16, 4),
    "slice-sizes": lambda: _between(lambda m, x: x[:, : x.size(1) // 2] * x[:, x.size(1) // 2 :], 16, 8),
    "slice-overlap-add": lambda: _between(lambda m, x: x[:, :10] + x[:, 6:], 16, 10),
    "slice-of-space": lambda: _between(lambda m, x: x[..., 2:6, ::2]),
    "index-negative": lambda: _between(lambda m, x: torch.cat([x[:, -3].unsqueeze(1), x], 1), 16, 17),
    "index-list": lambda: _between(lambda m, x: x[:, [3, 0, 7, 7, 12]], 16, 5),
    "narrow": lambda: _between(lambda m, x: x.narrow(1, 4, 8), 16, 8),
    "input-read-by-slices": lambda: _net(
        lambda m, x: m.head(m.after(torch.cat([m.a(x[:, :1]), m.b(x[:, 1:])], 1))),
        a=_block(1, 6),
        b=_block(2, 10),
        after=_block(16, 12),
        head=_head(12),
    ),
    # stacking, concatenating, moving between space and channels
    "stack-flatten": lambda: _parallel(lambda m, x: torch.stack([m.a(x), m.b(x)], 1).flatten(1, 2), 16),
    "stack-interleaved": lambda: _parallel(_stack_interleaved, 16),
    "stack-max": lambda: _parallel(lambda m, x: torch.stack([m.a(x), m.b(x)]).max(0).values, 8),
    "cat-of-flattened-maps": lambda: _net(
        _cat_of_flattened,
        stem=_block(3, 8),
        down=_block(8, 12, stride=2),
        fc=nn.Linear(8 * 64 + 12 * 16 + 8, 5),
    ),
    "cat-self": lambda: _between(lambda m, x: torch.cat([x, x], 1), 16, 32),
    "cat-self-and-other": lambda: _between(
        lambda m, x: torch.cat([x, m.conv(x), x], 1), 8, 24, conv=_conv(8, 8)
    ),
    "cat-relu-shuffle": lambda: _between(_cat_relu_shuffle, 16, 24, conv=_conv(16, 12)),
    "cat-crelu": lambda: _between(_crelu, 16, 24, conv=_conv(16, 12)),
    "cat-zeros": lambda: _between(
        lambda m, x: torch.cat([x, torch.zeros_like(x)], 1) + m.c(x), 8, c=_conv(8, 16)
    ),
    "pixel-shuffle": lambda: _of(lambda: nn.PixelShuffle(2), 16, 4),
    "pixel-unshuffle": lambda: _between(lambda m, x: F.pixel_unshuffle(x, 2), 6, 24),
    "space-to-depth-slices": lambda: _between(_space_to_depth_by_slices, 6, 24),
    "space-to-depth-view": lambda: _between(_space_to_depth_by_view, 6, 24),
    # constants on the channels
    "buffer-multiplied": lambda: _between(lambda m, x: x * m.scale, scale=_random(1, 16, 1, 1)),
    "buffer-added": lambda: _between(lambda m, x: m.shift + x, shift=_random(1, 16, 1, 1)),
    "buffer-input-normalised": lambda: _net(
        lambda m, x: m.head(m.body((x - m.mean) / m.std)),
        mean=_random(1, 3, 1, 1),
        std=_random(1, 3, 1, 1).abs(),
        body=_block(3, 16),
        head=_head(16),
    ),
    "frozen-batchnorm": lambda: _of(lambda: FrozenBatchNorm2d(16)),
    "position-parameter": lambda: _between(lambda m, x: x + m.position, position=_parameter(1, 16, 8, 8)),
    "layer-scale": lambda: _between(
        lambda m, x: x + m.gamma * m.conv(x), gamma=_parameter(16, 1, 1), conv=_conv(16, 16)
    ),
    "scalar-parameter": lambda: _between(lambda m, x: x * m.scale, scale=_parameter(1)),
    "index-select-buffer": lambda: _between(
        lambda m, x: x.index_select(1, m.order), 16, 6, order=torch.tensor([15, 3, 4, 0, 9, 3])
    ),
    # sizes: written out, or used as numbers
    "literal-view-flat": lambda: _net(_literal_view_flat, body=_block(3, 16), fc=nn.Linear(256, 5)),
    "literal-view-shuffle": lambda: _between(
        lambda m, x: x.view(x.size(0), 4, 4, 8, 8).transpose(1, 2).reshape(x.size(0), 16, 8, 8)
    ),
    "size-as-divisor": lambda: _between(lambda m, x: x / x.shape[1]),
    "size-as-scale": lambda: _between(lambda m, x: x * x.size(1) ** -0.5),
    # shortcuts, outputs, reuse
    "option-a-shortcuts": _option_a_shortcuts,
    "two-outputs": lambda: _outputs(_two_outputs),
    "dict-output": lambda: _outputs(_dict_output),
    "nested-output-of-maps": lambda: _outputs(_nested_output),
    "map-output": lambda: _net(lambda m, x: m.last(m.body(x)), body=_block(3, 16), last=_conv(16, 4, 1)),
    "conv-used-twice": lambda: _between(lambda m, x: m.conv(F.relu(m.conv(x))), conv=_conv(16, 16)),
    "conv-bn-used-twice": lambda: _between(lambda m, x: m.block(m.block(x)), block=_block(16, 16)),
    "conv-used-on-two-scales": lambda: _net(
        _used_on_two_scales,
        stem=_block(3, 12),
        down=_block(12, 12, stride=2),
        shared=_block(12, 16),
        head_a=_head(16),
        head_b=_head(16),
    ),
    "bn-used-twice": lambda: _between(
        lambda m, x: m.norm(m.a(x)) + F.relu(m.norm(m.b(x))),
        a=_conv(16, 16),
        b=_conv(16, 16),
        norm=nn.BatchNorm2d(16),
    ),
    "tied-convs": _tied_convs,
    "tied-transposed": lambda: _net(
        _autoencoder, (1, 6), lift=nn.Linear(6, 16), fc=nn.Linear(16, 12), out=nn.Linear(16, 5)
    ),
    "frozen-weights": lambda: _frozen(_between(lambda m, x: x + m.conv(x), conv=_conv(16, 16))),
    "frozen-stem": lambda: _frozen(_between(lambda m, x: x + m.conv(x), conv=_conv(16, 16)), "before"),
    "unused-module": lambda: _between(lambda m, x: m.conv(x), conv=_conv(16, 16), spare=_conv(16, 16)),
    "unused-value": lambda: _between(_unused_value, conv=_conv(16, 16), spare=_conv(16, 16)),
    "nested-sequential": lambda: _of(
        lambda: nn.Sequential(nn.Sequential(_block(16, 12), nn.Sequential(nn.Identity())), _block(12, 16))
    ),
    # in-place operators
    "inplace-relu-reused": lambda: _net(
        _inplace_relu_then_reused, conv=_conv(3, 16), after=_block(16, 12), head=_head(12)
    ),
    "inplace-module-reused": lambda: _net(
        _inplace_module_then_reused,
        conv=_conv(3, 8),
        relu=nn.ReLU(True),
        after=_block(16, 12),
        head=_head(12),
    ),
    "inplace-functional": lambda: _net(
        lambda m, x: m.head(F.relu(m.conv(F.relu(m.stem(x), inplace=True)), inplace=True)),
        stem=_conv(3, 16),
        conv=_conv(16, 12),
        head=_head(12),
    ),
    "inplace-on-slice": lambda: _net(
        _inplace_on_slice, conv=_conv(3, 16), after=_block(16, 12), head=_head(12)
    ),
    "inplace-add": lambda: _net(_inplace_add, stem=_block(3, 16), branch=_block(16, 16), head=_head(16)),
    # grouped and depthwise
    "depthwise": lambda: _of(lambda: _block(16, 16, groups=16)),
    "depthwise-multiplier-2": lambda: _of(lambda: _block(12, 24, groups=12), 12, 24),
    "depthwise-after-cat": lambda: _between(
        lambda m, x: m.depthwise(torch.cat([x, m.conv(x)], 1)),
        8,
        20,
        conv=_conv(8, 12),
        depthwise=_block(20, 20, groups=20),
    ),
    "grouped-resnext": lambda: _between(
        _resnext,
        reduce=_block(16, 12, 1),
        grouped=_block(12, 12, groups=3),
        expand=_conv(12, 16, 1, bias=False),
        norm=nn.BatchNorm2d(16),
    ),
    "grouped-unequal-widths": lambda: _of(lambda: _block(16, 24, groups=4), 16, 24),
    "grouped-after-cat": lambda: _between(
        lambda m, x: m.grouped(torch.cat([x, m.conv(x)], 1)),
        10,
        12,
        conv=_conv(10, 6),
        grouped=_conv(16, 12, groups=4),
    ),
    # gates, shuffles, splits, blocks of branches
    "se-conv-hardsigmoid": lambda: _between(
        lambda m, x: x * F.hardsigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1))))),
        down=_conv(16, 4, 1),
        up=_conv(4, 16, 1),
    ),
    "se-linear": lambda: _between(_gate_by_linear, down=nn.Linear(16, 4), up=nn.Linear(4, 16)),
    "shuffle-units": lambda: _of(lambda: nn.Sequential(*(ShuffleUnit(16) for _ in range(4)))),
    "shuffle-module": lambda: _of(lambda: nn.ChannelShuffle(4)),
    "split-sizes": lambda: _between(_split_sizes, conv=_conv(8, 8)),
    "unbind": lambda: _between(_unbind, 16, 8),
    "ragged-chunk": lambda: _between(_ragged_chunk, 16, 11, conv=_conv(4, 5)),
    "densenet-block": lambda: _between(
        _densenet, 8, 20, one=_densenet_layer(8), two=_densenet_layer(12), three=_densenet_layer(16)
    ),
    "inception-block": lambda: _between(
        _inception,
        12,
        20,
        one=_block(12, 4, 1),
        three=nn.Sequential(_block(12, 6, 1), _block(6, 8)),
        twice=nn.Sequential(_block(12, 3, 1), _block(3, 5), _block(5, 5)),
        pool=_block(12, 3, 1),
    ),
    # element-wise operators and broadcasts
    "add-self": lambda: _between(lambda m, x: x + x),
    "mul-self": lambda: _between(lambda m, x: x * x),
    "sub": lambda: _between(lambda m, x: x - m.conv(x), conv=_conv(16, 16)),
    "where": lambda: _between(lambda m, x: torch.where(m.conv(x) > 0, x, -x), conv=_conv(16, 16)),
    "broadcast-one-channel": lambda: _between(lambda m, x: x * torch.sigmoid(m.map(x)), map=_conv(16, 1)),
    "expand-one-channel": lambda: _between(
        lambda m, x: x + m.map(x).expand(-1, x.size(1), -1, -1), map=_conv(16, 1)
    ),
    "repeat-one-channel": lambda: _between(lambda m, x: m.map(x).repeat(1, 6, 1, 1), 16, 6, map=_conv(16, 1)),
    "repeat-channels": lambda: _between(lambda m, x: x.repeat(1, 2, 1, 1), 12, 24),
    "repeat-interleaved": lambda: _between(lambda m, x: x.repeat_interleave(2, 1), 12, 24),
    "prelu-per-channel": lambda: _of(lambda: nn.PReLU(16)),
    "roll-channels": lambda: _between(lambda m, x: x + torch.roll(x, 3, 1)),
    "flip-channels": lambda: _between(lambda m, x: torch.cat([x, x.flip(1)], 1), 8),
    "dropout2d": lambda: _of(lambda: nn.Dropout2d(0.3)),
    # operators that mix channels
    "spatial-attention": lambda: _between(_spatial_attention, conv=_conv(2, 1, 7)),
    "softmax-channels": lambda: _between(lambda m, x: torch.softmax(x, 1)),
    "layernorm-channels": lambda: _between(_norm_over_channels, norm=nn.LayerNorm(16)),
    "layernorm-maps": lambda: _of(lambda: nn.LayerNorm([16, 8, 8])),
    "groupnorm": lambda: _of(lambda: nn.GroupNorm(4, 16)),
    "instancenorm-affine": lambda: _of(lambda: nn.InstanceNorm2d(16, affine=True)),
    "local-response-norm": lambda: _of(lambda: nn.LocalResponseNorm(5)),
    "l2-normalised-channels": lambda: _between(lambda m, x: F.normalize(x, dim=1)),
    "cumsum-channels": lambda: _between(lambda m, x: x.cumsum(1)),
    "topk-channels": lambda: _between(lambda m, x: x.topk(6, dim=1).values, 16, 6),
    "einsum": lambda: _between(
        lambda m, x: torch.einsum("bchw,oc->bohw", x, m.weight), 16, 12, weight=_parameter(12, 16)
    ),
    "gram-matrix": lambda: _net(_gram, body=_block(3, 8), fc=nn.Linear(64, 5)),
    # weights that are not a module's own
    "functional-conv": lambda: _between(
        lambda m, x: F.conv2d(x, m.weight, m.bias, padding=1),
        16,
        12,
        weight=_parameter(12, 16, 3, 3),
        bias=_parameter(12),
    ),
    "functional-linear": lambda: _net(
        lambda m, x: m.fc(F.relu(F.linear(m.body(x).mean((2, 3)), m.weight))),
        body=_block(3, 16),
        weight=_parameter(12, 16),
        fc=nn.Linear(12, 5),
    ),
    "functional-transposed-conv": lambda: _between(
        lambda m, x: F.conv_transpose2d(x, m.weight, stride=2, groups=2),
        16,
        12,
        weight=_parameter(16, 6, 2, 2),
    ),
    "functional-norm": lambda: _between(
        _frozen_norm,
        mean=_random(16),
        var=_random(16).abs(),
        weight=_random(16),
        bias=_random(16),
    ),
    "norm-with-activation": lambda: _of(lambda: NormAct(16)),
    "depthwise-pads-itself": lambda: _of(lambda: SameConv(16, 16, 3, groups=16)),
    "grouped-pads-itself": lambda: _of(lambda: SameConv(16, 12, 3, groups=2), 16, 12),
    "weight-standardised": lambda: _between(
        _weight_standardised,
        16,
        12,
        weight=_parameter(12, 16, 3, 3),
        bias=_parameter(12),
    ),
    "weight-norm": lambda: _of(lambda: weight_norm(_conv(16, 12)), 16, 12),
    # other layers
    "conv-transpose": lambda: _of(lambda: nn.ConvTranspose2d(16, 12, 2, stride=2), 16, 12),
    "conv-transpose-grouped": lambda: _of(lambda: nn.ConvTranspose2d(16, 12, 2, stride=2, groups=4), 16, 12),
    "conv-transpose-depthwise": lambda: _of(lambda: nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16)),
    "conv-reflect-padding": lambda: _of(lambda: _conv(16, 12, padding_mode="reflect"), 16, 12),
    "conv1d": _conv1d,
    "conv3d": _conv3d,
    "batchnorm1d-after-linear": lambda: _net(
        lambda m, x: m.fc(F.relu(m.norm(m.hidden(m.body(x).flatten(1))))),
        body=nn.Sequential(_block(3, 12), nn.MaxPool2d(2)),
        hidden=nn.Linear(12 * 16, 16),
        norm=nn.BatchNorm1d(16),
        fc=nn.Linear(16, 5),
    ),
    "batchnorm-no-affine": lambda: _of(lambda: nn.BatchNorm2d(16, affine=False)),
    "batchnorm-of-batch": lambda: _of(lambda: nn.BatchNorm2d(16, track_running_stats=False)),
    "preactivation": lambda: _net(
        _preactivation,
        stem=_conv(3, 16),
        norm_a=nn.BatchNorm2d(16),
        conv_a=_conv(16, 16),
        norm_b=nn.BatchNorm2d(16),
        conv_b=_conv(16, 16),
        norm_c=nn.BatchNorm2d(16),
        head=_head(16),
    ),
    "batchnorm-on-input": lambda: _net(
        lambda m, x: m.head(m.body(m.norm(x))), norm=nn.BatchNorm2d(3), body=_block(3, 16), head=_head(16)
    ),
    "nhwc-linear": lambda: _between(
        _nhwc_linear, 16, 16, norm=nn.LayerNorm(16), up=nn.Linear(16, 24), down=nn.Linear(24, 16)
    ),
    "mean-global": lambda: _net(
        lambda m, x: m.fc(m.body(x).mean((2, 3))), body=_block(3, 16), fc=nn.Linear(16, 5)
    ),
    "adaptive-pool-flatten": lambda: _net(
        lambda m, x: m.fc(torch.flatten(F.adaptive_avg_pool2d(m.body(x), (2, 2)), 1)),
        body=_block(3, 16),
        fc=nn.Linear(64, 5),
    ),
    "interpolate-to-map": lambda: _between(_resized_to_other_map, 8, 20, down=_block(8, 12, stride=2)),
    "unet-skip": lambda: _net(
        _unet,
        stem=_block(3, 12),
        down=_block(12, 16, stride=2),
        bottom=_block(16, 12),
        up=_block(24, 12),
        head=_conv(12, 4, 1),
    ),
    # tokens
    "transformer-mlp": lambda: _tokens(
        _transformer_mlp,
        norm=nn.LayerNorm(16),
        up=nn.Linear(16, 24),
        down=nn.Linear(24, 16),
        last=nn.LayerNorm(16),
    ),
    "mixer": lambda: _tokens(
        _mixer,
        norm_a=nn.LayerNorm(16),
        token_in=nn.Linear(10, 12),
        token_out=nn.Linear(12, 10),
        norm_b=nn.LayerNorm(16),
        channel_in=nn.Linear(16, 24),
        channel_out=nn.Linear(24, 16),
    ),
    "attention-matmul": lambda: _tokens(
        _attention,
        query=nn.Linear(16, 12),
        key=nn.Linear(16, 12),
        value=nn.Linear(16, 20),
        project=nn.Linear(20, 16),
    ),
    "attention-heads": lambda: _tokens(
        _attention_with_heads, qkv=nn.Linear(16, 48), project=nn.Linear(16, 16)
    ),
    "attention-module": lambda: _tokens(
        _attention_module, attention=nn.MultiheadAttention(16, 4, batch_first=True)
    ),
}

TRAPS: dict[str, Callable[[], Built]] = {
    name: partial(_seeded, builder) for name, builder in _BUILDERS.items()
}
"""Trap name -> builder of (module in train mode, input shape). Two calls build equal modules."""


# ---- Random CNN graphs


Function = Callable[..., Any]
Ids = tuple[int, ...]
Step = tuple[str, Function | None, Ids]


class RandomNet(nn.Module):
    """Interprets a list of steps; each applies a layer (by name) or a function to earlier values."""

    def __init__(self, layers: dict[str, nn.Module], steps: Sequence[Step], outputs: Ids) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.steps = tuple(steps)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        values: list[Any] = [x]
        for name, function, operands in self.steps:
            call = getattr(self, name) if function is None else function
            values.append(call(*(values[i] for i in operands)))
        results = tuple(values[i] for i in self.outputs)
        return results if len(results) > 1 else results[0]

    def extra_repr(self) -> str:
        lines = (
            f"v{i} = {name}({', '.join(f'v{j}' for j in operands)})"
            for i, (name, _, operands) in enumerate(self.steps, start=1)
        )
        return "\n".join([*lines, "return " + ", ".join(f"v{i}" for i in self.outputs)])


_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}
_WIDEST = 32


class _Graph:
    """Grows a RandomNet; knows width and side of every (square) map, so that every step is valid."""

    def __init__(self, channels: int, size: int) -> None:
        self.names: dict[nn.Module, str] = {}
        self.steps: list[Step] = []
        self.maps: list[tuple[int, int]] = [(channels, size)]
        self.open = [0]  # values that later operations may read

    def step(
        self,
        kind: str,
        what: nn.Module | Function,
        *operands: int,
        channels: int | None = None,
        size: int | None = None,
    ) -> int:
        """Append a step; its map is like the first operand's unless told. A module may be used again."""
        if isinstance(what, nn.Module):
            name = self.names.setdefault(what, f"{kind}{len(self.names)}")
            self.steps.append((name, None, operands))
        else:
            self.steps.append((kind, what, operands))
        have, side = self.maps[operands[0]]
        self.maps.append((have if channels is None else channels, side if size is None else size))
        return len(self.steps)

    def pick(self, reference: int) -> int:
        """The value `reference` places before the newest; references wrap, so every number names one."""
        return self.open[-1 - reference % len(self.open)]

    def dangling(self) -> list[int]:
        used = {i for _, _, operands in self.steps for i in operands}
        return [i for i in dict.fromkeys(self.open) if i not in used]

    def narrow(self, value: int) -> int:
        return self.fit(value, channels=16) if self.maps[value][0] > _WIDEST else value

    def at_least(self, value: int, channels: int) -> int:
        return self.fit(value, channels=max(channels, self.maps[value][0]))

    def multiple(self, value: int, factor: int) -> int:
        return self.fit(value, channels=math.ceil(self.maps[value][0] / factor) * factor)

    def fit(self, value: int, channels: int | None = None, size: int | None = None) -> int:
        """`value` brought to a width by a 1x1 conv and to a size by pooling or interpolation, if need be."""
        have, side = self.maps[value]
        if channels is not None and channels != have:
            value = self.step("fit", _conv(have, channels, 1), value, channels=channels)
        if size is None or size == side:
            return value
        if size > side:
            return self.step("interpolate", partial(F.interpolate, size=(size, size)), value, size=size)
        stride = side // size
        pool = partial(F.avg_pool2d, kernel_size=side - (size - 1) * stride, stride=stride)
        return self.step("avg_pool", pool, value, size=size)

    def activate(self, value: int, spec: Spec) -> int:
        """`value`, which nothing has read yet, activated; with `tap` later operations may read it too."""
        if spec["tap"]:
            self.open.append(value)
        if spec["act"] == "none":
            return value
        return self.step(spec["act"], _ACTIVATIONS[spec["act"]](inplace=spec["inplace"]), value)

    def conv(self, value: int, width: int, spec: Spec, kernel: int = 3, groups: int = 1) -> int:
        """Conv, then BN and activation as `spec` says."""
        channels, size = self.maps[value]
        stride = spec["stride"]
        module = _conv(channels, width, kernel, stride=stride, groups=groups, bias=spec["bias"])
        value = self.step("conv", module, value, channels=width, size=math.ceil(size / stride))
        if spec["bn"]:
            value = self.step("bn", nn.BatchNorm2d(width), value)
        return self.activate(value, spec)

    def pieces(self, value: int, widths: list[int]) -> list[int]:
        """The tensors of a tuple."""
        return [self.step(f"piece_{i}", itemgetter(i), value, channels=c) for i, c in enumerate(widths)]

    def cat(self, values: Sequence[int]) -> int:
        return self.step("cat", _cat, *values, channels=sum(self.maps[i][0] for i in values))


def _cat(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors, 1)


def _literal_shuffle(x: Tensor, groups: int, channels: int, size: int) -> Tensor:
    x = x.view(-1, groups, channels // groups, size, size).transpose(1, 2)
    return x.reshape(-1, channels, size, size)


def _op_conv(g: _Graph, spec: Spec) -> int:
    return g.conv(g.pick(spec["of"]), spec["width"], spec, kernel=spec["kernel"])


def _op_depthwise(g: _Graph, spec: Spec) -> int:
    value = g.narrow(g.pick(spec["of"]))
    channels = g.maps[value][0]
    return g.conv(value, channels * spec["multiplier"], spec, groups=channels)


def _op_grouped(g: _Graph, spec: Spec) -> int:
    groups = spec["groups"]
    return g.conv(g.multiple(g.pick(spec["of"]), groups), groups * spec["per_group"], spec, groups=groups)


def _op_norm(g: _Graph, spec: Spec) -> int:
    value = g.pick(spec["of"])
    return g.activate(g.step("bn", nn.BatchNorm2d(g.maps[value][0]), value), spec)


def _op_add(g: _Graph, spec: Spec) -> int:
    value = g.pick(spec["of"])
    other = g.fit(g.pick(spec["with"]), *g.maps[value])
    return g.activate(g.step("add", add, value, other), spec)


def _op_gate(g: _Graph, spec: Spec) -> int:
    value = g.pick(spec["of"])
    other = g.fit(g.pick(spec["with"]), *g.maps[value])
    return g.step("gate", lambda x, y: x * torch.sigmoid(y), value, other)


def _op_cat(g: _Graph, spec: Spec) -> int:
    values = [g.pick(reference) for reference in spec["of"]]
    values = [g.fit(value, size=g.maps[values[0]][1]) for value in values]
    if sum(g.maps[value][0] for value in values) > _WIDEST:
        values = [g.fit(value, channels=10) for value in values]
    return g.cat(values)


def _op_se(g: _Graph, spec: Spec) -> int:
    value = g.pick(spec["of"])
    wide, narrow = g.maps[value][0], spec["width"]
    if spec["linear"]:
        gate = g.step("mean", lambda x: x.mean((2, 3)), value)
        gate = g.step("squeeze", nn.Linear(wide, narrow), gate)
        gate = g.step("excite", nn.Linear(narrow, wide), g.step("relu", F.relu, gate))
        gate = g.step("unflatten", lambda x: x.view(x.size(0), x.size(1), 1, 1), gate)
    else:
        gate = g.step("pool", partial(F.adaptive_avg_pool2d, output_size=1), value)
        gate = g.step("squeeze", _conv(wide, narrow, 1), gate)
        gate = g.step("excite", _conv(narrow, wide, 1), g.step("relu", F.relu, gate))
    squash = F.hardsigmoid if spec["hard"] else torch.sigmoid
    return g.step("se", lambda x, y: x * squash(y), value, gate)


def _op_shuffle(g: _Graph, spec: Spec) -> int:
    groups = spec["groups"]
    value = g.multiple(g.pick(spec["of"]), math.lcm(groups, 2))
    channels, size = g.maps[value]
    shuffle = partial(_literal_shuffle, channels=channels, size=size) if spec["literal"] else _shuffle
    for _ in range(spec["units"]):
        value = g.step("shuffle", partial(shuffle, groups=groups), value)
        halves = g.step("chunk", lambda x: x.chunk(2, 1), value)
        kept, changed = g.pieces(halves, [channels // 2] * 2)
        value = g.cat([kept, g.conv(changed, channels // 2, spec)])
    return value


def _op_split(g: _Graph, spec: Spec) -> int:
    value = g.at_least(g.pick(spec["of"]), 4)
    channels = g.maps[value][0]
    if spec["chunks"]:
        widths = [len(piece) for piece in torch.empty(channels).chunk(spec["chunks"])]
        parts = g.step("chunk", lambda x: torch.chunk(x, spec["chunks"], 1), value)
    else:
        first = 1 + spec["at"] % (channels - 1)
        widths = [first, channels - first]
        parts = g.step("split", lambda x: x.split(widths, 1), value)
    values = g.pieces(parts, widths)
    values[0] = g.conv(values[0], spec["width"], spec)
    return g.cat(values[::-1] if spec["reverse"] else values)


def _op_slice(g: _Graph, spec: Spec) -> int:
    value = g.at_least(g.pick(spec["of"]), 4)
    channels = g.maps[value][0]
    half = channels // 2
    start, stop, step = {
        "head": (None, half, None),
        "tail": (half, None, None),
        "middle": (1, -1, None),
        "negative": (-half, None, None),
        "even": (None, None, 2),
        "odd": (1, None, 2),
    }[spec["kind"]]
    width = len(range(channels)[start:stop:step])
    return g.step("slice", lambda x: x[:, start:stop:step], value, channels=width)


def _op_pool(g: _Graph, spec: Spec) -> int:
    value = g.pick(spec["of"])
    size = g.maps[value][1]
    pools: dict[str, Function] = {"max_pool": F.max_pool2d, "avg_pool": F.avg_pool2d}
    pool = pools[spec["kind"]]
    if spec["halve"] and size > 1:
        return g.step(spec["kind"], partial(pool, kernel_size=2), value, size=size // 2)
    pool = partial(pool, kernel_size=3, stride=spec["stride"], padding=1)
    return g.step(spec["kind"], pool, value, size=math.ceil(size / spec["stride"]))


def _op_upsample(g: _Graph, spec: Spec) -> int:
    value = g.pick(spec["of"])
    size = g.maps[value][1]
    mode: Spec = {"mode": "bilinear", "align_corners": False} if spec["bilinear"] else {"mode": "nearest"}
    if spec["double"] and size < 8:
        return g.step("interpolate", partial(F.interpolate, scale_factor=2.0, **mode), value, size=2 * size)
    other = g.pick(spec["with"])

    def to_other(x: Tensor, y: Tensor) -> Tensor:
        return F.interpolate(x, size=y.shape[-2:], **mode)

    return g.step("interpolate", to_other, value, other, size=g.maps[other][1])


def _op_option_a(g: _Graph, spec: Spec) -> int:
    value = g.narrow(g.pick(spec["of"]))
    front, back, stride = spec["front"], spec["back"], spec["stride"]
    width = g.maps[value][0] + front + back
    branch = g.conv(value, width, spec | {"act": "none", "tap": False})

    def shortcut(x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, front, back))

    padded = g.step("option_a", shortcut, value, channels=width, size=g.maps[branch][1])
    return g.activate(g.step("add", add, branch, padded), spec)


def _op_reuse(g: _Graph, spec: Spec) -> int:
    """One conv (and BN) used twice: on its own output, or on two values, whose results both stay open."""
    value = g.pick(spec["of"])
    channels = g.maps[value][0]
    width = channels if spec["chain"] else spec["width"]
    modules = [_conv(channels, width)] + ([nn.BatchNorm2d(width)] if spec["bn"] else [])

    def use(value: int) -> int:
        for module in modules:
            value = g.step("shared", module, value, channels=width)
        return g.activate(value, spec)

    first = use(value)
    if spec["chain"]:
        return use(first)
    second = g.fit(g.pick(spec["with"]), channels)
    g.open.append(first)
    return use(second)


SPLITS: dict[str, Function] = {
    "unbind": lambda x, n, dim: x.unbind(dim),
    "split-function": lambda x, n, dim: torch.split(x, n, dim),
    "split-sizes": lambda x, n, dim: x.split([n, x.shape[dim] - n], dim=dim),
    "chunk": lambda x, n, dim: torch.chunk(x, n, dim=dim),
    "tensor_split": lambda x, n, dim: x.tensor_split(n + 1, dim),
    "tensor_split-at": lambda x, n, dim: torch.tensor_split(x, (n, n + 1), dim=dim),
}
"""How to split along `dim`: function of (x, a number below the width, dim)."""

READS: dict[str, Callable[[Any, int, int, Function], list[Any]]] = {
    "one": lambda pieces, i, j, join: [pieces[i]],
    "negative": lambda pieces, i, j, join: [pieces[-1 - i]],
    "two": lambda pieces, i, j, join: [pieces[i], pieces[-1 - j]],
    "tail": lambda pieces, i, j, join: [join(pieces[i:])],
    "head": lambda pieces, i, j, join: [join(pieces[: i + 1])],
    "but-last": lambda pieces, i, j, join: [join(pieces[:-1]), pieces[-1]],
    "every-other": lambda pieces, i, j, join: [join(pieces[i % 2 :: 2])],
    "backwards": lambda pieces, i, j, join: [join(pieces[i::-1])],
    "slice-of-slice": lambda pieces, i, j, join: [join(pieces[i:][: j + 1])],
    "item-of-slice": lambda pieces, i, j, join: [pieces[i:][0], pieces[: i + 1][-1]],
    "slice-and-item": lambda pieces, i, j, join: [pieces[j], join(pieces[i:])],
}
"""How pieces are read: function of (pieces, two numbers of pieces, what joins some of them)."""


def read_pieces(pieces: Any, by: str, read: str, i: int, j: int, stack: bool = False) -> Tensor:
    """What `READS` reads of pieces of `SPLITS`, as one map; `stack` interleaves pieces of one size."""
    joined: list[Tensor] = []

    def join(some: Any) -> Tensor:
        if by == "unbind":
            joined.append(torch.stack(some, 1))
        else:
            joined.append(torch.stack(some, 2).flatten(1, 2) if stack else torch.cat(some, 1))
        return joined[-1]

    maps = [
        x.unsqueeze(1) if by == "unbind" and all(x is not y for y in joined) else x
        for x in READS[read](pieces, i, j, join)
    ]
    return torch.cat(maps, 1) if len(maps) > 1 else maps[0]


def _op_pieces(g: _Graph, spec: Spec) -> int:
    """Split into (often one channel wide) pieces of which some are read; perhaps a piece of pieces."""
    value = g.fit(g.pick(spec["of"]), channels=spec["width"])
    for by, read, i, j in spec["levels"]:
        width = g.maps[value][0]
        if width == 1:
            break
        dim, at = (-3 if spec["negative"] else 1), 1 + spec["at"] % (width - 1)
        sizes = [x.numel() for x in SPLITS[by](torch.empty(1, width, 1, 1), at, dim)]
        if 0 in sizes or len(sizes) == 1:  # as tensor_split(8) of 5, whose last pieces are empty
            by, sizes = "unbind", [1] * width
        i %= len(sizes)
        j %= len(sizes) - (i if read == "slice-of-slice" else 0)
        split = partial(SPLITS[by], n=at, dim=dim)
        some = partial(read_pieces, by=by, read=read, i=i, j=j, stack=spec["stack"] and len(set(sizes)) == 1)
        channels = some(split(torch.empty(1, width, 1, 1))).shape[1]
        value = g.step("read", some, g.step(by, split, value), channels=channels)
    return value


TWICE: dict[str, Function] = {
    "max": torch.max,
    "min": lambda x, y: x.min(y),
    "max-other": lambda x, y: torch.max(x, other=y),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "add": add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / (y.abs() + 1),
    "where": lambda x, y: torch.where(x > 0, y, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.25),
    "addcmul": lambda x, y: torch.addcmul(x, y, y),
    "atan2": torch.atan2,
    "clamp": lambda x, y: torch.clamp(x, min=y, max=y),
    "matmul": torch.matmul,
    "cat": lambda x, y: torch.cat([x, y], 1),
    "cat-thrice": lambda x, y: torch.cat((x, y, x), dim=1),
    "stack": lambda x, y: torch.stack([x, y], 1).flatten(1, 2),
    "stack-sum": lambda x, y: torch.stack([x, y]).sum(0),
    "stack-max": lambda x, y: torch.stack((x, y)).max(0)[0],
}


def _op_twice(g: _Graph, spec: Spec) -> int:
    """One value as both operands; it is added to what comes out, which may be constant."""
    value = g.narrow(g.pick(spec["of"]))
    width = g.maps[value][0] * {"cat": 2, "cat-thrice": 3, "stack": 2}.get(spec["by"], 1)
    found = g.step(spec["by"], TWICE[spec["by"]], value, value, channels=width)
    return g.step("add", add, g.fit(found, g.maps[value][0]), value)


ASSERTIONS: dict[str, Callable[[Tensor, int], Any]] = {
    "shape": lambda x, n: x.shape[2] == n,
    "shape-negative": lambda x, n: x.shape[-1] == n,
    "size": lambda x, n: x.size(2) == n,
    "size-keyword": lambda x, n: x.size(dim=-2) == n,
    "part": lambda x, n: x.shape[-2:] == (n, n),
    "item-of-part": lambda x, n: x.shape[-2:][0] == n,
    "item-of-size": lambda x, n: x.size()[2:][1] * 2 == 2 * n,
    "sum": lambda x, n: (x.shape[:1] + x.shape[2:])[1] == n,
    "square": lambda x, n: x.shape[2] == x.shape[3],
    "flat": lambda x, n: x.flatten(2).shape[2] == n * n,
    "batch": lambda x, n: x.size(0) + x.dim() >= 1,
}
"""What networks assert of a map of side n; no number of channels among it."""


def _op_assertion(g: _Graph, spec: Spec) -> int:
    value = g.pick(spec["of"])
    side = g.maps[value][1]

    def checked(x: Tensor) -> Tensor:
        torch._assert(ASSERTIONS[spec["by"]](x, side), "size")
        return F.silu(x)

    return g.step("assertion", checked, value)


def _op_eca(g: _Graph, spec: Spec) -> int:
    """ECA's gate: a 1-d convolution that runs over the channels."""
    value = g.narrow(g.pick(spec["of"]))
    width, kernel = g.maps[value][0], spec["kernel"]
    flat = g.step("flat", lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2), value)
    module = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=spec["bias"])
    gate = g.step("eca", module, flat)
    shape = g.step("unflatten", lambda x: x.transpose(-1, -2).unsqueeze(-1), gate)
    if spec["expand"]:
        shape = g.step("expand", lambda x, y: x.expand(-1, width, y.size(2), y.size(3)), shape, value)
    return g.step("scale", lambda x, y: x * torch.sigmoid(y), value, shape)


def _groups(width: int, wanted: int) -> int:
    return next(g for g in range(min(wanted, width), 0, -1) if width % g == 0)


NORMALISATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "layer": lambda width, groups: nn.LayerNorm(width, eps=1e-3),
    "bare-layer": lambda width, groups: nn.LayerNorm(width, elementwise_affine=False),
    "rms": lambda width, groups: nn.RMSNorm(width, eps=1e-3),
    "group": lambda width, groups: nn.GroupNorm(_groups(width, groups), width),
    "bare-group": lambda width, groups: nn.GroupNorm(_groups(width, groups), width, affine=False),
}
"""Normalisations over channels: function of the width and of a number of groups."""

MIXTURES: dict[str, Function] = {
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "standardised": lambda x: x / (x.var(1, keepdim=True, unbiased=False) + 0.1).sqrt(),
    "response": lambda x: x * (g := x.norm(dim=(2, 3), keepdim=True)) / (g.mean(1, keepdim=True) + 0.1),
    "unit": lambda x: 3 * F.normalize(x, dim=1),
    "attention": lambda x: x * torch.sigmoid(x.mean(1, True) + x.amax(1, keepdim=True)),
    "softmax": lambda x: x + 4 * x.softmax(1),
    "share": lambda x: x / (x.abs().sum(dim=1, keepdim=True) + 1),
}
"""What computes with all channels of a map at once."""


def _op_mixing(g: _Graph, spec: Spec) -> int:
    """Something over channels; groups, not all of which may fit, and one module for two maps."""
    value = g.narrow(g.pick(spec["of"]))
    width = g.maps[value][0]
    if spec["by"] in MIXTURES:
        return g.step(spec["by"], MIXTURES[spec["by"]], value)
    module = NORMALISATIONS[spec["by"]](width, spec["groups"])
    last = spec["by"].endswith("layer") or spec["by"] == "rms"

    def normalise(x: int) -> int:
        if not last:
            return g.step("norm", module, x)
        x = g.step("last", lambda x: x.permute(0, 2, 3, 1), x)
        return g.step("first", lambda x: x.permute(0, 3, 1, 2), g.step("norm", module, x))

    first = normalise(value)
    if not spec["again"]:
        return first
    return g.step("add", add, first, normalise(g.fit(g.pick(spec["of"] + 1), *g.maps[value])))


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scores": lambda q, k, v: (q.transpose(-2, -1) @ k * 0.3).softmax(-1) @ v.transpose(-2, -1),
    "scores-einsum": lambda q, k, v: torch.einsum(
        "bhin,bhnm->bhmi", v, torch.einsum("bhin,bhim->bhnm", q, k).mul(0.3).softmax(2)
    ),
    "covariance": lambda q, k, v: (
        (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v
    ).transpose(2, 3),
    "covariance-rows": lambda q, k, v: torch.einsum(
        "bhij,bhjn->bhni", torch.einsum("bhin,bhjn->bhij", q, k).tanh().permute(0, 1, 3, 2).softmax(-2), v
    ),
    "keys-first": lambda q, k, v: q.transpose(-1, -2) @ (k.softmax(-1) @ v.transpose(-1, -2)),
    "values-first": lambda q, k, v: (v @ F.softplus(k).transpose(2, 3) / 9 @ q.sigmoid()).transpose(2, 3),
    "aligned": lambda q, k, v: (
        torch.einsum("bhin,bhin,bhin->bhni", q.tanh(), k.sigmoid(), v)
        + torch.einsum("bhin,bhin->bhni", q, k.sigmoid())
    ),
    "meeting": lambda q, k, v: v.transpose(2, 3) * torch.einsum("bhin,bhin->bhn", q, k).tanh().unsqueeze(-1),
}
"""Products of activations of (batch, heads, channels, places); they yield the last two the other way."""


def _op_product(g: _Graph, spec: Spec) -> int:
    """Attention of some kind; what it yields is added to the values, or not."""
    value = g.narrow(g.pick(spec["of"]))
    width, size = g.maps[value]
    heads = _groups(width, spec["heads"])
    parts = [g.step("project", _conv(width, width, 1), g.fit(g.pick(i), width, size)) for i in spec["with"]]

    def attend(*parts: Tensor) -> Tensor:
        split = [x.view(-1, heads, width // heads, size * size) for x in parts]
        y = PRODUCTS[spec["by"]](*split)
        return y.transpose(2, 3).reshape(-1, width, size, size)

    y = g.step(spec["by"], attend, *parts, value if spec["own"] else parts[-1])
    return g.step("add", add, y, value) if spec["add"] else y


RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU}


def _op_recurrent(g: _Graph, spec: Spec) -> int:
    """A layer that reads the places of a map in their order, perhaps from a state that the map says."""
    value = g.narrow(g.pick(spec["of"]))
    (width, size), units = g.maps[value], spec["units"]
    module = RECURRENT[spec["by"]](width, units, bidirectional=spec["both"])
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.6, 0.6)
    y = g.step("sequence", lambda x: x.flatten(2).permute(2, 0, 1), value)
    if spec["begun"]:
        first = nn.Linear(width, units)
        state = g.step("state", first, g.step("mean", lambda x: x.mean((2, 3)), value))
        ends = 1 + spec["both"]
        state = g.step("expand", lambda x: x.tanh().unsqueeze(0).expand(ends, -1, -1), state)
        if spec["by"] == "lstm":
            state = g.step("states", lambda h: (h, h.sin()), state)
        y = g.step(spec["by"], module, y, state)
    else:
        y = g.step(spec["by"], module, y)
    y, last = (g.step(f"part_{i}", itemgetter(i), y) for i in (0, 1))
    last = g.step("hidden", itemgetter(0), last) if spec["by"] == "lstm" else last
    wide = units * (1 + spec["both"])
    found = g.step(
        "map", lambda x: x.permute(1, 2, 0).unflatten(2, (size, size)), y, channels=wide, size=size
    )
    if spec["last"]:
        found = g.step(
            "scale", lambda x, s: x + s[-1].repeat(1, x.size(1) // units)[..., None, None], found, last
        )
    return found


def _reference() -> SearchStrategy[int]:
    return st.integers(0, 6)


def _block_options(stride: tuple[int, ...] = (1, 2)) -> dict[str, SearchStrategy[Any]]:
    return {
        "of": _reference(),
        "stride": st.sampled_from(stride),
        "bias": st.booleans(),
        "bn": st.booleans(),
        **_activation(),
    }


def _activation() -> dict[str, SearchStrategy[Any]]:
    act = st.sampled_from(["none", *_ACTIVATIONS])
    return {"act": act, "inplace": st.booleans(), "tap": st.booleans()}


_WIDTH = st.integers(4, 24) | st.sampled_from([4, 8, 12, 16, 20, 24])

_OPS: dict[str, tuple[Callable[[_Graph, Spec], int], dict[str, SearchStrategy[Any]]]] = {
    "conv": (_op_conv, {"width": _WIDTH, "kernel": st.sampled_from([1, 3]), **_block_options()}),
    "depthwise": (_op_depthwise, {"multiplier": st.sampled_from([1, 2]), **_block_options()}),
    "grouped": (
        _op_grouped,
        {"groups": st.integers(2, 4), "per_group": st.integers(2, 6), **_block_options()},
    ),
    "norm": (_op_norm, {"of": _reference(), **_activation()}),
    "add": (_op_add, {"of": _reference(), "with": _reference(), **_activation()}),
    "gate": (_op_gate, {"of": _reference(), "with": _reference()}),
    "cat": (_op_cat, {"of": st.lists(_reference(), min_size=2, max_size=3).map(tuple)}),
    "se": (
        _op_se,
        {"of": _reference(), "width": st.integers(2, 6), "linear": st.booleans(), "hard": st.booleans()},
    ),
    "shuffle": (
        _op_shuffle,
        {
            "groups": st.integers(2, 4),
            "units": st.integers(1, 3),
            "literal": st.booleans(),
            **_block_options(stride=(1,)),
        },
    ),
    "split": (
        _op_split,
        {
            "chunks": st.sampled_from([0, 2, 3, 4]),
            "at": st.integers(0, 15),
            "width": _WIDTH,
            "reverse": st.booleans(),
            **_block_options(stride=(1,)),
        },
    ),
    "slice": (
        _op_slice,
        {
            "of": _reference(),
            "kind": st.sampled_from(["head", "tail", "middle", "negative", "even", "odd"]),
        },
    ),
    "pool": (
        _op_pool,
        {
            "of": _reference(),
            "kind": st.sampled_from(["max_pool", "avg_pool"]),
            "halve": st.booleans(),
            "stride": st.sampled_from([1, 2]),
        },
    ),
    "upsample": (
        _op_upsample,
        {"of": _reference(), "with": _reference(), "double": st.booleans(), "bilinear": st.booleans()},
    ),
    "option_a": (_op_option_a, {"front": st.integers(0, 4), "back": st.integers(0, 4), **_block_options()}),
    "reuse": (
        _op_reuse,
        {
            "of": _reference(),
            "with": _reference(),
            "width": _WIDTH,
            "chain": st.booleans(),
            "bn": st.booleans(),
            **_activation(),
        },
    ),
    "pieces": (
        _op_pieces,
        {
            "of": _reference(),
            "width": st.integers(2, 8),
            "at": st.integers(0, 6),
            "levels": st.lists(
                st.tuples(
                    st.sampled_from(list(SPLITS)), st.sampled_from(list(READS)), _reference(), _reference()
                ),
                min_size=1,
                max_size=2,
            ).map(tuple),
            "negative": st.booleans(),
            "stack": st.booleans(),
        },
    ),
    "twice": (_op_twice, {"of": _reference(), "by": st.sampled_from(list(TWICE))}),
    "assertion": (_op_assertion, {"of": _reference(), "by": st.sampled_from(list(ASSERTIONS))}),
    "mixing": (
        _op_mixing,
        {
            "of": _reference(),
            "by": st.sampled_from([*NORMALISATIONS, *MIXTURES]),
            "groups": st.integers(1, 4),
            "again": st.booleans(),
        },
    ),
    "recurrent": (
        _op_recurrent,
        {
            "of": _reference(),
            "by": st.sampled_from(list(RECURRENT)),
            "units": st.integers(3, 9),
            **dict.fromkeys(["both", "begun", "last"], st.booleans()),
        },
    ),
    "product": (
        _op_product,
        {
            "of": _reference(),
            "with": st.lists(_reference(), min_size=2, max_size=2).map(tuple),
            "by": st.sampled_from(list(PRODUCTS)),
            "heads": st.integers(1, 3),
            "own": st.booleans(),
            "add": st.booleans(),
        },
    ),
    "eca": (
        _op_eca,
        {
            "of": _reference(),
            "kernel": st.sampled_from([1, 3, 5]),
            "bias": st.booleans(),
            "expand": st.booleans(),
        },
    ),
}

OPS: dict[str, SearchStrategy[Spec]] = {
    name: st.fixed_dictionaries({"op": st.just(name), **options}) for name, (_, options) in _OPS.items()
}
"""Operation -> strategy for one entry of a spec's `ops`."""


TRICKY = ("pieces", "twice", "assertion", "eca", "mixing", "product", "recurrent")
"""Operations that try the removal of channels, drawn by its tests alone."""


def random_cnn(ops: Iterable[str] = tuple(op for op in OPS if op not in TRICKY)) -> SearchStrategy[Spec]:
    """Specs of random CNN graphs, as plain data; every one is valid for `build`, also after shrinking.

    `ops` are 3 to 12 operations, of those named; their `of` and `with` count back from the newest value. What
    no operation read in the end is merged by `join`, or gets a classifier each (`heads`); with `map` a
    feature map is an output too.
    """
    head = st.fixed_dictionaries(
        {
            "join": st.sampled_from(["add", "cat", "heads"]),
            "flatten": st.sampled_from(["mean", "flatten", "reshape", "literal"]),
            "hidden": st.sampled_from([0, 8, 13]),
            "map": st.booleans(),
        }
    )
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 99),
            "size": st.sampled_from([8, 9]),
            "stem": _WIDTH,
            "ops": st.lists(st.one_of(*map(OPS.__getitem__, ops)), min_size=3, max_size=12).map(tuple),
            "head": head,
        }
    )


def _flat(g: _Graph, value: int, how: str) -> tuple[int, int]:
    """`value` as [1, features], and the number of features."""
    channels, size = g.maps[value]
    features = channels if how == "mean" else channels * size * size
    functions: dict[str, Function] = {
        "mean": lambda x: x.mean((2, 3)),
        "flatten": lambda x: torch.flatten(x, 1),
        "reshape": lambda x: x.reshape(x.size(0), -1),
        "literal": lambda x: x.reshape(-1, features),
    }
    return g.step(how, functions[how], value), features


def _classify(g: _Graph, flat: int, features: int, hidden: int) -> int:
    if hidden:
        flat = g.step("hidden", nn.Linear(features, hidden), flat)
        # not a ReLU: without space to vary over, all of so few units can be off at once
        flat = g.step("silu", F.silu, g.step("bn", nn.BatchNorm1d(hidden), flat))
    return g.step("fc", nn.Linear(hidden or features, 5), flat)


def _heads(g: _Graph, spec: Spec) -> list[int]:
    *others, last = g.dangling()
    if spec["join"] == "add":
        for value in others:
            last = g.step("add", add, last, g.fit(value, *g.maps[last]))
        others = []
    flats = [_flat(g, value, spec["flatten"]) for value in (*others, last)]
    if spec["join"] == "cat":
        flats = [(g.step("cat", _cat, *(i for i, _ in flats)), sum(n for _, n in flats))]
    return [_classify(g, flat, features, spec["hidden"]) for flat, features in flats]


def build(spec: Spec) -> Built:
    """The network that `spec` (from `random_cnn`) describes, in train mode, and its input's shape.

    Its repr lists the steps. Weights depend on `spec` alone; they keep the scale of the signal, so that depth
    does not drown it in rounding.
    """
    return _seeded(partial(_build, spec), spec["seed"])


def _build(spec: Spec) -> Built:
    g = _Graph(3, spec["size"])
    stem = {"stride": 1, "bias": True, "bn": True, "act": "relu", "inplace": False, "tap": False}
    first = g.conv(0, spec["stem"], stem)
    g.open.append(first)
    for op in spec["ops"]:
        emit, _ = _OPS[op["op"]]
        g.open.append(emit(g, op))
    last = g.open[-1]
    outputs = _heads(g, spec["head"])
    if spec["head"]["map"]:  # with the first map added: the last alone may be all zeros
        outputs.append(g.step("add", add, last, g.fit(first, *g.maps[last])))
    layers = {name: layer for layer, name in g.names.items()}
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return RandomNet(layers, g.steps, tuple(outputs)), (1, 3, spec["size"], spec["size"])
