"""Classifiers of images, and the blocks that they are known for."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.strangers.registry import image, stranger


def conv_bn(i, o, k=3, s=1, g=1, act=True):
    layers = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class RepVGGBlock(nn.Module):
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))
        self.point = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        self.identity = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x):
        skip = 0 if self.identity is None else self.identity(x)
        return F.relu(self.dense(x) + self.point(x) + skip)


@stranger()
class RepVGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(
            RepVGGBlock(3, 16, 2), RepVGGBlock(16, 16), RepVGGBlock(16, 32, 2), RepVGGBlock(32, 32)
        )
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.stages(x).mean([2, 3]))


class GhostModule(nn.Module):
    def __init__(self, i, o, ratio=2, relu=True):
        super().__init__()
        self.o = o
        first = math.ceil(o / ratio)
        self.primary = nn.Sequential(
            nn.Conv2d(i, first, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU() if relu else nn.Identity()
        )
        self.cheap = nn.Sequential(
            nn.Conv2d(first, first * (ratio - 1), 3, 1, 1, groups=first, bias=False),
            nn.BatchNorm2d(first * (ratio - 1)),
            nn.ReLU() if relu else nn.Sequential(),
        )

    def forward(self, x):
        x1 = self.primary(x)
        x2 = self.cheap(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.o, :, :]


class GhostBottleneck(nn.Module):
    def __init__(self, i, mid, o):
        super().__init__()
        self.expand = GhostModule(i, mid)
        self.project = GhostModule(mid, o, relu=False)
        self.shortcut = nn.Sequential() if i == o else conv_bn(i, o, 1, act=False)

    def forward(self, x):
        return self.project(self.expand(x)) + self.shortcut(x)


@stranger()
class GhostNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 12, 3, 2)
        self.blocks = nn.Sequential(GhostBottleneck(12, 27, 12), GhostBottleneck(12, 36, 20))
        self.classifier = nn.Linear(20, 10)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)
        return self.classifier(x)


class DenseLayer(nn.Module):
    def __init__(self, i, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(4 * growth),
            nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )

    def forward(self, features):
        x = torch.cat(features, 1) if isinstance(features, list) else features
        x = self.conv1(F.relu(self.norm1(x)))
        return F.dropout(self.conv2(F.relu(self.norm2(x))), 0.1, self.training)


@stranger()
class DenseNet(nn.Module):
    def __init__(self, growth=6):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.block1 = nn.ModuleList(DenseLayer(12 + i * growth, growth) for i in range(3))
        self.trans = nn.Sequential(nn.BatchNorm2d(30), nn.ReLU(), nn.Conv2d(30, 15, 1), nn.AvgPool2d(2))
        self.block2 = nn.ModuleList(DenseLayer(15 + i * growth, growth) for i in range(2))
        self.norm = nn.BatchNorm2d(27)
        self.head = nn.Linear(27, 10)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(features))
        features = [self.trans(torch.cat(features, 1))]
        for layer in self.block2:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class InvertedResidual(nn.Module):
    def __init__(self, i, o, stride, expand):
        super().__init__()
        mid = i * expand
        self.use_res = stride == 1 and i == o
        self.conv = nn.Sequential(
            nn.Conv2d(i, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.Hardswish(),
            nn.Conv2d(mid, mid, 5, stride, 2, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.Hardswish(),
            nn.Conv2d(mid, o, 1, bias=False),
            nn.BatchNorm2d(o),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(o, 4, 1), nn.ReLU(), nn.Conv2d(4, o, 1))

    def forward(self, x):
        y = self.conv(x)
        y = y * F.hardsigmoid(self.gate(y))
        return x + y if self.use_res else y


@stranger()
class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8, 3, 2),
            InvertedResidual(8, 12, 2, 3),
            InvertedResidual(12, 12, 1, 4),
            conv_bn(12, 32, 1),
        )
        self.classifier = nn.Sequential(nn.Linear(32, 24), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x):
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1)
        return self.classifier(x)


@stranger()
class ShuffleUnits(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.units = nn.ModuleList(
            nn.Sequential(conv_bn(8, 8, 1), conv_bn(8, 8, 3, g=8, act=False), conv_bn(8, 8, 1))
            for _ in range(3)
        )
        self.fc = nn.Linear(16, 10)

    @staticmethod
    def channel_shuffle(x, groups):
        b, c, h, w = x.data.size()
        x = x.view(b, groups, c // groups, h, w)
        x = torch.transpose(x, 1, 2).contiguous()
        return x.view(b, -1, h, w)

    def forward(self, x):
        x = self.stem(x)
        for unit in self.units:
            left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
            x = self.channel_shuffle(torch.cat((left, unit(right)), 1), 2)
        return self.fc(x.mean(3).mean(2))


@stranger()
class Res2Net(nn.Module):
    def __init__(self, width=6, scale=4):
        super().__init__()
        self.width, self.scale = width, scale
        self.stem = conv_bn(3, 16, 3, 2)
        self.reduce = conv_bn(16, width * scale, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(scale - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scale - 1))
        self.expand = conv_bn(width * scale, 16, 1, act=False)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        spx = torch.split(self.reduce(x), self.width, 1)
        for i in range(self.scale - 1):
            sp = spx[i] if i == 0 else sp + spx[i]
            sp = F.relu(self.bns[i](self.convs[i](sp)))
            out = sp if i == 0 else torch.cat((out, sp), 1)
        out = torch.cat((out, spx[self.scale - 1]), 1)
        x = F.relu(x + self.expand(out))
        return self.fc(F.avg_pool2d(x, x.size()[2:]).view(x.size(0), -1))


@stranger()
class SplitAttention(nn.Module):
    def __init__(self, channels=16, radix=2):
        super().__init__()
        self.radix, self.channels = radix, channels
        self.stem = conv_bn(3, channels, 3, 2)
        self.conv = conv_bn(channels, channels * radix, 3, g=2)
        self.fc1, self.bn1 = nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8)
        self.fc2 = nn.Conv2d(8, channels * radix, 1)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x):
        x = self.conv(self.stem(x))
        batch, rchannel = x.shape[:2]
        splits = torch.split(x, rchannel // self.radix, dim=1)
        gap = F.adaptive_avg_pool2d(sum(splits), 1)
        atten = self.fc2(F.relu(self.bn1(self.fc1(gap))))
        atten = F.softmax(atten.view(batch, self.radix, -1), dim=1).view(batch, -1, 1, 1)
        attens = torch.split(atten, rchannel // self.radix, dim=1)
        out = sum([att * split for (att, split) in zip(attens, splits)])
        return self.fc(out.contiguous().mean((-2, -1)))


class WSConv2d(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        mean = w.mean(dim=(1, 2, 3), keepdim=True)
        std = (w - mean).view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, (w - mean) / std, self.bias, self.stride, self.padding, self.dilation, self.groups)


@stranger()
class WeightStandardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.gn1 = WSConv2d(3, 16, 3, 2, 1, bias=False), nn.GroupNorm(4, 16)
        self.conv2, self.gn2 = WSConv2d(16, 16, 3, 1, 1, bias=False), nn.GroupNorm(4, 16)
        self.conv3, self.gn3 = WSConv2d(16, 24, 3, 2, 1), nn.GroupNorm(6, 24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)) + x)
        x = F.relu(self.gn3(self.conv3(x)))
        return self.fc(x.mean(dim=[-1, -2]))


@stranger()
class SpectralCritic(nn.Module):
    def __init__(self, ch=12):
        super().__init__()
        self.net = nn.Sequential(
            spectral_norm(nn.Conv2d(3, ch, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(ch, ch * 2, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(ch * 2, ch * 2, 3, 1, 1)),
        )
        self.fc = spectral_norm(nn.Linear(ch * 2, 1))

    def forward(self, x):
        h = F.leaky_relu(self.net(x), 0.2)
        return self.fc(torch.sum(h, dim=(2, 3)))


@stranger()
class SoftExperts(nn.Module):
    """A mixture of experts, all of them run."""

    def __init__(self, experts=3):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.gate = nn.Linear(16, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 20, 3, padding=1), nn.GELU(), nn.Conv2d(20, 16, 1))
            for _ in range(experts)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        weights = torch.softmax(self.gate(x.mean((2, 3))), dim=-1)
        outs = torch.stack([expert(x) for expert in self.experts], dim=1)
        mixed = (weights[:, :, None, None, None] * outs).sum(1)
        return self.head((x + mixed).mean((2, 3)))


class CondConv2d(nn.Module):
    def __init__(self, i, o, k, experts=3):
        super().__init__()
        self.route = nn.Linear(i, experts)
        self.weight = nn.Parameter(torch.randn(experts, o, i, k, k) * 0.1)
        self.i, self.o, self.k = i, o, k

    def forward(self, x):
        b, c, h, w = x.shape
        r = torch.sigmoid(self.route(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        weight = (r @ self.weight.view(r.size(1), -1)).view(b * self.o, self.i, self.k, self.k)
        out = F.conv2d(x.view(1, b * c, h, w), weight, padding=self.k // 2, groups=b)
        return out.view(b, self.o, h, w)


@stranger()
class CondConvNet(nn.Module):
    """Weights computed for every sample."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 12, 3, 2)
        self.mid = conv_bn(12, 16)
        self.dynamic = CondConv2d(16, 20, 3)
        self.bn = nn.BatchNorm2d(20)
        self.tail = conv_bn(20, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.mid(self.stem(x))
        x = self.tail(F.relu(self.bn(self.dynamic(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@stranger()
class Mixer(nn.Module):
    def __init__(self, dim=24, tokens=16):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_mix = nn.Sequential(nn.Linear(tokens, 20), nn.GELU(), nn.Linear(20, tokens))
        self.channel_mix = nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channel_mix(self.norm2(x))
        return self.head(self.norm(x).mean(dim=1))


@stranger()
class Involution(nn.Module):
    """A kernel for every position, from what is there."""

    def __init__(self, channels=16, k=3, groups=4):
        super().__init__()
        self.k, self.groups, self.channels = k, groups, channels
        self.stem = conv_bn(3, channels, 3, 2)
        self.reduce = nn.Sequential(nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.span = nn.Conv2d(8, k * k * groups, 1)
        self.unfold = nn.Unfold(k, padding=k // 2)
        self.head = nn.Sequential(
            conv_bn(channels, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10)
        )

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        weight = self.span(self.reduce(x)).view(b, self.groups, self.k * self.k, h, w).unsqueeze(2)
        out = self.unfold(x).view(b, self.groups, c // self.groups, self.k * self.k, h, w)
        return self.head((weight * out).sum(dim=3).view(b, self.channels, h, w))


@stranger()
class Capsules(nn.Module):
    def __init__(self, caps=4, dim=6, classes=5, out=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 5, 2)
        self.primary = nn.Conv2d(20, caps * dim, 5, 2)
        self.dim = dim
        self.W = nn.Parameter(torch.randn(1, 5 * 5 * caps, classes, out, dim) * 0.1)

    @staticmethod
    def squash(s):
        norm2 = (s**2).sum(-1, keepdim=True)
        return norm2 / (1 + norm2) * s / (norm2 + 1e-8).sqrt()

    def forward(self, x):
        x = self.primary(F.relu(self.conv1(x)))
        u = self.squash(x.view(x.size(0), self.dim, -1).transpose(1, 2))
        u_hat = (self.W @ u[:, :, None, :, None]).squeeze(-1)
        b = torch.zeros(x.size(0), u_hat.size(1), u_hat.size(2), 1, device=x.device, dtype=x.dtype)
        for _ in range(2):
            c = F.softmax(b, dim=2)
            v = self.squash((c * u_hat).sum(dim=1, keepdim=True))
            b = b + (u_hat * v).sum(-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


@stranger(image(3, 32, 32), image(3, 32, 32))
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(conv_bn(3, 12, 3, 2), conv_bn(12, 24, 3, 2), nn.AdaptiveAvgPool2d(2))
        self.fc = nn.Sequential(nn.Linear(96, 32), nn.ReLU(inplace=True), nn.Linear(32, 16))
        self.out = nn.Linear(16, 1)

    def forward_once(self, x):
        return self.fc(self.cnn(x).view(x.size(0), -1))

    def forward(self, left, right):
        distance = torch.abs(self.forward_once(left) - self.forward_once(right))
        return torch.sigmoid(self.out(distance))


@stranger()
class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 40, 3, padding=1)
        self.fc = nn.Linear(20, 10)

    def forward(self, x):
        x = F.max_pool2d(torch.max(self.a(x), self.b(x)), 2)
        x = self.c(x)
        n, c, h, w = x.size()
        x = x.view(n, c // 2, 2, h, w).max(dim=2)[0]
        return self.fc(F.max_pool2d(x, kernel_size=x.size()[2:]).view(n, -1))


class BlurPool(nn.Module):
    def __init__(self, channels):
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0])
        kernel = kernel[:, None] * kernel[None, :] / 16
        self.register_buffer("kernel", kernel[None, None].repeat(channels, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel, stride=2, groups=x.shape[1])


@stranger()
class Antialiased(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.blur1 = conv_bn(3, 16), BlurPool(16)
        self.conv2, self.blur2 = conv_bn(16, 32), BlurPool(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.blur1(self.conv1(x))
        x = self.blur2(self.conv2(x))
        return self.fc(x.amax(dim=(2, 3)))


@stranger()
class FeatureTaps(nn.Module):
    """Features are taken by hooks."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, 2), conv_bn(12, 16, 3, 2), conv_bn(16, 20, 3, 2))
        self.features = {}
        for index in (0, 1):
            self.body[index].register_forward_hook(self.save(index))
        self.lateral = nn.ModuleList([nn.Conv2d(12, 8, 1), nn.Conv2d(16, 8, 1)])
        self.fc = nn.Linear(20 + 16, 10)

    def save(self, index):
        def hook(module, inputs, output):
            self.features[index] = output

        return hook

    def forward(self, x):
        y = self.body(x).mean((2, 3))
        sides = [self.lateral[i](self.features[i]).mean((2, 3)) for i in (0, 1)]
        return self.fc(torch.cat([y, *sides], dim=1))


@stranger()
class Octave(nn.Module):
    def __init__(self):
        super().__init__()
        self.hi, self.lo = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.hh, self.hl = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.ll, self.lh = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.bn_h, self.bn_l = nn.BatchNorm2d(16), nn.BatchNorm2d(8)
        self.fc = nn.Linear(24, 10)
        self.pool = nn.AvgPool2d(2, 2)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x):
        h, l = self.hi(x), self.lo(self.pool(x))
        h, l = self.hh(h) + self.up(self.lh(l)), self.ll(l) + self.hl(self.pool(h))
        h, l = F.relu(self.bn_h(h)), F.relu(self.bn_l(l))
        return self.fc(torch.cat([t.flatten(2).mean(-1) for t in (h, l)], -1))


class ChannelsFirstNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))
        self.grn_gamma, self.grn_beta = (
            nn.Parameter(torch.ones(1, 1, 1, 4 * dim)),
            nn.Parameter(torch.zeros(1, 1, 1, 4 * dim)),
        )

    def forward(self, x):
        shortcut = x
        x = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        x = F.gelu(self.pwconv1(x))
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        x = self.grn_gamma * (x * nx) + self.grn_beta + x
        x = (self.gamma * self.pwconv2(x)).permute(0, 3, 1, 2)
        return shortcut + x


@stranger()
class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 4, 4), ChannelsFirstNorm(12))
        self.stage = nn.Sequential(ConvNeXtBlock(12), ConvNeXtBlock(12))
        self.down = nn.Sequential(ChannelsFirstNorm(12), nn.Conv2d(12, 20, 2, 2))
        self.stage2 = ConvNeXtBlock(20)
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 10)

    def forward(self, x):
        x = self.stage2(self.down(self.stage(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


@stranger()
class EarlyExits(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([conv_bn(3, 12, 3, 2), conv_bn(12, 16, 3, 2), conv_bn(16, 20, 3, 2)])
        self.exits = nn.ModuleList(nn.Linear(c, 10) for c in (12, 16, 20))

    def forward(self, x):
        outputs = {}
        for i, (block, leave) in enumerate(zip(self.blocks, self.exits)):
            x = block(x)
            outputs[f"exit{i}"] = leave(x.mean(dim=(2, 3)))
        return outputs


@stranger()
class BilinearPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 12, 3, 2))
        self.b = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 10, 3, 2))
        self.fc = nn.Linear(12 * 10, 10)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        n, _, h, w = a.shape
        phi = torch.bmm(a.view(n, -1, h * w), b.view(n, -1, h * w).permute(0, 2, 1)) / (h * w)
        phi = phi.view(n, -1)
        phi = torch.sign(phi) * torch.sqrt(torch.abs(phi) + 1e-10)
        return self.fc(F.normalize(phi))


@stranger()
class NetVLAD(nn.Module):
    def __init__(self, clusters=6, dim=16):
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 24, 3, 2), conv_bn(24, dim, 3, 2))
        self.assign = nn.Conv2d(dim, clusters, 1)
        self.centroids = nn.Parameter(torch.rand(clusters, dim))
        self.fc = nn.Linear(clusters * dim, 10)

    def forward(self, x):
        x = self.backbone(x)
        N, C = x.shape[:2]
        soft = F.softmax(self.assign(x).view(N, self.centroids.shape[0], -1), dim=1)
        flat = x.view(N, C, -1)
        residual = flat.unsqueeze(1) - self.centroids[None, :, :, None]
        vlad = (residual * soft.unsqueeze(2)).sum(dim=-1)
        vlad = F.normalize(vlad, p=2, dim=2).view(N, -1)
        return self.fc(F.normalize(vlad, p=2, dim=1))


@stranger()
class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(3, 8, 7),
            nn.MaxPool2d(2, 2),
            nn.ReLU(True),
            nn.Conv2d(8, 10, 5),
            nn.MaxPool2d(2, 2),
            nn.ReLU(True),
        )
        self.fc_loc = nn.Sequential(nn.Linear(10 * 4 * 4, 32), nn.ReLU(True), nn.Linear(32, 3 * 2))
        self.conv1, self.conv2 = nn.Conv2d(3, 10, 5), nn.Conv2d(10, 20, 5)
        self.fc1, self.fc2 = nn.Linear(20 * 5 * 5, 50), nn.Linear(50, 10)

    def stn(self, x):
        xs = self.localization(x)
        theta = self.fc_loc(xs.view(-1, 10 * 4 * 4)).view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x):
        x = self.stn(x)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.view(-1, 500)))
        return F.log_softmax(self.fc2(F.dropout(x, training=self.training)), dim=1)


@stranger()
class Retrieval(nn.Module):
    """GeM pooling, an embedding of length one, and cosines with class centres."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 32, 3, 2), conv_bn(32, 32))
        self.p = nn.Parameter(torch.ones(1) * 3)
        self.embed, self.bn = nn.Linear(32, 24, bias=False), nn.BatchNorm1d(24)
        self.weight = nn.Parameter(torch.randn(10, 24))

    def forward(self, x):
        x = self.backbone(x)
        x = F.avg_pool2d(x.clamp(min=1e-6).pow(self.p), (x.size(-2), x.size(-1))).pow(1.0 / self.p)
        x = self.bn(self.embed(x.flatten(1)))
        return 30 * F.linear(F.normalize(x), F.normalize(self.weight))


@stranger()
class Recursive(nn.Module):
    """One layer used again and again."""

    def __init__(self):
        super().__init__()
        self.inp, self.rec, self.out = (
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.Conv2d(16, 3, 3, 1, 1),
        )
        self.act = nn.PReLU(16)

    def forward(self, x):
        h0 = self.inp(x)
        h = h0
        for _ in range(3):
            h = self.rec(self.act(self.rec(self.act(h)))) + h0
        return self.out(h) + x


class BinaryConv(nn.Conv2d):
    def forward(self, x):
        scale = self.weight.abs().mean(dim=(1, 2, 3), keepdim=True).detach()
        binary = torch.sign(self.weight) * scale
        return F.conv2d(x, (binary - self.weight).detach() + self.weight, None, self.stride, self.padding)


@stranger()
class BinaryNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.binary, self.bn = BinaryConv(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Conv2d(24, 10, 1)

    def forward(self, x):
        x = torch.sign(self.stem(x) - 0.5)
        x = F.hardtanh(self.bn(self.binary(x)))
        return self.head(x).mean(dim=(2, 3))


@stranger()
class OldStyle(nn.Module):
    """As in 2014: local response normalisation, groups, big linear layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2),
            nn.ReLU(True),
            nn.LocalResponseNorm(5),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(16, 24, 3, padding=1, groups=2),
            nn.ReLU(True),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(24 * 3 * 3, 64), nn.Tanh(), nn.Dropout(), nn.Linear(64, 10)
        )

    def forward(self, x):
        x = self.features(x)
        x = x.view(x.size(0), 24 * 3 * 3)
        return F.softmax(self.classifier(x), dim=-1)


@stranger()
class DropPathNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_bn(16, 24), conv_bn(24, 16, act=False)) for _ in range(3)
        )
        self.scale = nn.ParameterList(nn.Parameter(torch.full((16, 1, 1), 0.5)) for _ in range(3))
        self.rate = 0.1
        self.fc = nn.Linear(16, 10)

    def drop_path(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * mask.floor_()

    def forward(self, x):
        x = self.stem(x)
        for block, scale in zip(self.blocks, self.scale):
            x = F.relu(x + self.drop_path(scale * block(x)))
        return self.fc(x.mean((2, 3)))
