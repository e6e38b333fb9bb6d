"""Attention: gates on channels and planes, and transformers."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.strangers.images import conv_bn
from tests.strangers.registry import image, stranger


def with_defaults(forward):
    """As libraries wrap the forward of all their networks: with fewer names than it has itself."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        kwargs.pop("return_dict", None)
        return forward(self, *args, **kwargs)

    return wrapper


@stranger()
class Options(nn.Module):
    """A transformer's block in a decorated forward, with arguments by name alone and any others."""

    def __init__(self):
        super().__init__()
        self.patch, self.q, self.k = nn.Conv2d(3, 24, 8, 8), nn.Linear(24, 16), nn.Linear(24, 16)
        self.v, self.norm, self.head = nn.Linear(24, 12), nn.LayerNorm(12), nn.Linear(12, 5)

    @with_defaults
    def forward(self, pixels, mask=None, *, scale=0.25, **options):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        a = (self.q(x) @ self.k(x).transpose(1, 2)) * scale
        if mask is not None:
            a = a.masked_fill(mask, options.get("fill", -1e9))
        x = self.norm(a.softmax(-1) @ self.v(x))
        return {"logits": self.head(x.mean(1)), "hidden": x}


@stranger(image(3, 4, 16, 16))
class Clips(nn.Module):
    """Positions in space and time, added up in place in front of a transformer's block over a clip."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (2, 4, 4), (2, 4, 4))
        self.first, self.first_pos = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))
        self.space, self.time = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(2, 16))
        self.norm, self.head = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(x.size(0), -1).unsqueeze(1), x), dim=1)
        places, width = self.space.shape
        positions = torch.repeat_interleave(self.time, places, dim=0)
        positions.add_(self.space.unsqueeze(0).expand(len(self.time), -1, -1).reshape(-1, width))
        x.add_(torch.cat((self.first_pos.unsqueeze(0), positions), dim=0).unsqueeze(0))
        return self.head(self.norm(x).mean(1))


class Gated(nn.Module):
    """A network around one block of attention."""

    def __init__(self, block, width=16):
        super().__init__()
        self.stem, self.block = conv_bn(3, width, 3, 2), block
        self.tail = nn.Sequential(
            conv_bn(width, 24, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
        )

    def forward(self, x):
        return self.tail(self.block(self.stem(x)))


class SELayer(nn.Module):
    def __init__(self, channel, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


@stranger()
class SqueezeExcitation(Gated):
    def __init__(self):
        super().__init__(SELayer(16))


class CBAMBlock(nn.Module):
    def __init__(self, planes, ratio=4):
        super().__init__()
        self.shared = nn.Sequential(
            nn.Conv2d(planes, planes // ratio, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(planes // ratio, planes, 1, bias=False),
        )
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        avg, big = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = torch.sigmoid(self.shared(avg) + self.shared(big)) * x
        avg, (big, _) = torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)
        return torch.sigmoid(self.conv(torch.cat([avg, big], dim=1))) * x


@stranger()
class CBAM(Gated):
    def __init__(self):
        super().__init__(CBAMBlock(16))


class ECALayer(nn.Module):
    def __init__(self, channel, gamma=2, b=1):
        super().__init__()
        t = int(abs((math.log(channel, 2) + b) / gamma))
        k = t if t % 2 else t + 1
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


@stranger()
class ECA(Gated):
    def __init__(self):
        super().__init__(ECALayer(16))


class ContextBlock(nn.Module):
    def __init__(self, inplanes, ratio=0.5):
        super().__init__()
        planes = int(inplanes * ratio)
        self.conv_mask, self.softmax = nn.Conv2d(inplanes, 1, 1), nn.Softmax(dim=2)
        self.add = nn.Sequential(
            nn.Conv2d(inplanes, planes, 1),
            nn.LayerNorm([planes, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(planes, inplanes, 1),
        )

    def forward(self, x):
        batch, channel, height, width = x.size()
        input_x = x.view(batch, channel, height * width).unsqueeze(1)
        mask = self.softmax(self.conv_mask(x).view(batch, 1, height * width)).unsqueeze(-1)
        context = torch.matmul(input_x, mask).view(batch, channel, 1, 1)
        return x + self.add(context)


@stranger()
class GlobalContext(Gated):
    def __init__(self):
        super().__init__(ContextBlock(16))


class NonLocalBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.inter = channels // 2
        self.g, self.theta, self.phi = (nn.Conv2d(channels, self.inter, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv2d(self.inter, channels, 1), nn.BatchNorm2d(channels))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        batch_size = x.size(0)
        g_x = self.pool(self.g(x)).view(batch_size, self.inter, -1).permute(0, 2, 1)
        theta_x = self.theta(x).view(batch_size, self.inter, -1).permute(0, 2, 1)
        phi_x = self.pool(self.phi(x)).view(batch_size, self.inter, -1)
        f = F.softmax(torch.matmul(theta_x, phi_x), dim=-1)
        y = torch.matmul(f, g_x).permute(0, 2, 1).contiguous()
        y = y.view(batch_size, self.inter, *x.size()[2:])
        return self.W(y) + x


@stranger()
class NonLocal(Gated):
    def __init__(self):
        super().__init__(NonLocalBlock(16))


class SKConv(nn.Module):
    def __init__(self, features, M=2, G=4, d=8):
        super().__init__()
        self.M, self.features = M, features
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(features, features, 3, 1, 1 + i, dilation=1 + i, groups=G),
                nn.BatchNorm2d(features),
                nn.ReLU(),
            )
            for i in range(M)
        )
        self.fc = nn.Linear(features, d)
        self.fcs = nn.ModuleList(nn.Linear(d, features) for _ in range(M))

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            fea = conv(x).unsqueeze_(dim=1)
            feas = fea if i == 0 else torch.cat([feas, fea], dim=1)
        fea_U = torch.sum(feas, dim=1)
        fea_z = self.fc(fea_U.mean(-1).mean(-1))
        vectors = torch.stack([fc(fea_z) for fc in self.fcs], dim=1)
        vectors = vectors.softmax(dim=1).unsqueeze(-1).unsqueeze(-1)
        return (feas * vectors).sum(dim=1)


@stranger()
class SelectiveKernel(Gated):
    def __init__(self):
        super().__init__(SKConv(16))


class CoordAtt(nn.Module):
    def __init__(self, inp, mip=8):
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv1, self.bn1 = nn.Conv2d(inp, mip, 1), nn.BatchNorm2d(mip)
        self.conv_h, self.conv_w = nn.Conv2d(mip, inp, 1), nn.Conv2d(mip, inp, 1)

    def forward(self, x):
        n, c, h, w = x.size()
        x_h, x_w = self.pool_h(x), self.pool_w(x).permute(0, 1, 3, 2)
        y = F.hardswish(self.bn1(self.conv1(torch.cat([x_h, x_w], dim=2))))
        x_h, x_w = torch.split(y, [h, w], dim=2)
        return x * self.conv_h(x_h).sigmoid() * self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid()


@stranger()
class CoordinateAttention(Gated):
    def __init__(self):
        super().__init__(CoordAtt(16))


class DoubleAttentionBlock(nn.Module):
    """Features are gathered by attention over places, and spread by attention over what was gathered."""

    def __init__(self, channels, c_m=12, c_n=8):
        super().__init__()
        self.c_m, self.c_n = c_m, c_n
        self.convA, self.convB, self.convV = (
            nn.Conv2d(channels, c_m, 1),
            nn.Conv2d(channels, c_n, 1),
            nn.Conv2d(channels, c_n, 1),
        )
        self.reconstruct = nn.Conv2d(c_m, channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        A = self.convA(x).view(b, self.c_m, -1)
        maps = F.softmax(self.convB(x).view(b, self.c_n, -1), dim=-1)
        vectors = F.softmax(self.convV(x).view(b, self.c_n, -1), dim=1)
        gathered = torch.bmm(A, maps.permute(0, 2, 1))
        Z = gathered.matmul(vectors).view(b, self.c_m, h, w)
        return x + self.reconstruct(Z)


@stranger()
class DoubleAttention(Gated):
    def __init__(self):
        super().__init__(DoubleAttentionBlock(16))


class DualAttentionBlock(nn.Module):
    """Channels attend to channels."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x):
        B, C, H, W = x.size()
        q, k = x.view(B, C, -1), x.view(B, C, -1).permute(0, 2, 1)
        energy = torch.bmm(q, k)
        attention = torch.softmax(energy.max(-1, keepdim=True)[0].expand_as(energy) - energy, dim=-1)
        out = torch.bmm(attention, x.view(B, C, -1)).view(B, C, H, W)
        return self.gamma * out + x


@stranger()
class ChannelAttention(Gated):
    def __init__(self):
        super().__init__(DualAttentionBlock())


@stranger()
class ViT(nn.Module):
    def __init__(self, dim=24, heads=3, depth=2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.1)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 48, batch_first=True, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.size(0), -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.encoder(x)[:, 0])


class OwnAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


@stranger()
class OwnTransformer(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 12, 3, 2), nn.Conv2d(12, dim, 4, 4))
        self.norm1, self.attn = nn.LayerNorm(dim), OwnAttention(dim, 4)
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, 40), nn.GELU(), nn.Linear(40, dim)),
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(0, 2, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class CausalBlock(nn.Module):
    def __init__(self, dim, block_size, low, high):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        mask = torch.full((block_size, block_size), float("-inf"))
        self.register_buffer("mask", torch.triu(mask, diagonal=1))
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def forward(self, x):
        T = x.size(1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        att = q @ k.transpose(1, 2) / math.sqrt(q.size(-1)) + self.mask[:T, :T]
        x = x + self.out(att.softmax(dim=-1) @ v)
        return x + self.fc2(torch.clamp(self.fc1(x), self.low, self.high).relu())


@stranger(image(12, 8))
class Causal(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.embed = nn.Linear(8, dim)
        bounds = (-6.0, 6.0), (-float("inf"), float("inf"))
        self.blocks = nn.ModuleList([CausalBlock(dim, 20, *b) for b in bounds])
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -1])


@stranger()
class ShiftedWindows(nn.Module):
    def __init__(self, dim=16, heads=2, window=4):
        super().__init__()
        self.dim, self.heads, self.window = dim, heads, window
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        coords = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", relative[..., 0] * (2 * window - 1) + relative[..., 1])
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        w = self.window
        y = torch.roll(self.norm(x), shifts=(-w // 2, -w // 2), dims=(1, 2))
        y = y.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, C)
        q, k, v = (
            self.qkv(y).reshape(-1, w * w, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        attn = q * (C // self.heads) ** -0.5 @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1).contiguous()
        attn = torch.softmax(attn + bias.unsqueeze(0), -1)
        y = self.proj((attn @ v).transpose(1, 2).reshape(-1, w * w, C))
        y = y.view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, C)
        x = x + torch.roll(y, shifts=(w // 2, w // 2), dims=(1, 2))
        return self.head(x.mean(dim=(1, 2)))


@stranger()
class AxialAttention(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.rows = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.cols = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.stem(x)
        B, C, H, W = x.shape
        y = x.permute(0, 2, 3, 1).reshape(B * H, W, C)
        y = y + self.rows(y, y, y, need_weights=False)[0]
        y = y.reshape(B, H, W, C).permute(0, 2, 1, 3).reshape(B * W, H, C)
        y = y + self.cols(y, y, y)[0]
        return self.head(y.reshape(B, W * H, C).mean(1))


@stranger()
class Queries(nn.Module):
    """Learned queries look at features, and say what is there and where."""

    def __init__(self, dim=24, queries=5):
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 32, 3, 2))
        self.input_proj = nn.Conv2d(32, dim, 1)
        self.query_embed = nn.Embedding(queries, dim)
        self.row_embed, self.col_embed = (
            nn.Parameter(torch.rand(8, dim // 2)),
            nn.Parameter(torch.rand(8, dim // 2)),
        )
        self.transformer = nn.Transformer(dim, 2, 1, 1, 32, batch_first=True)
        self.class_embed = nn.Linear(dim, 7)
        self.bbox_embed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, x):
        h = self.input_proj(self.backbone(x))
        H, W = h.shape[-2:]
        pos = torch.cat(
            [
                self.col_embed[:W].unsqueeze(0).repeat(H, 1, 1),
                self.row_embed[:H].unsqueeze(1).repeat(1, W, 1),
            ],
            dim=-1,
        )
        src = pos.flatten(0, 1).unsqueeze(0) + h.flatten(2).permute(0, 2, 1)
        target = self.query_embed.weight.unsqueeze(0).repeat(h.shape[0], 1, 1)
        hs = self.transformer(src, target)
        return {"pred_logits": self.class_embed(hs), "pred_boxes": self.bbox_embed(hs).sigmoid()}


@stranger()
class LinearAttention(nn.Module):
    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.heads = heads
        self.stem = conv_bn(3, dim, 3, 4)
        self.to_qkv, self.to_out = nn.Conv2d(dim, dim * 3, 1, bias=False), nn.Conv2d(dim, dim, 1)
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.stem(x)
        b, c, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w) for t in self.to_qkv(x).chunk(3, dim=1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        z = 1 / (torch.einsum("bhdn,bhd->bhn", q, k.sum(dim=-1)) + 1e-6)
        out = torch.einsum("bhde,bhdn,bhn->bhen", context, q, z)
        return self.head((x + self.to_out(out.reshape(b, c, h, w))).mean((2, 3)))


@stranger(image(6, 3, 16, 16))
class InstanceBag(nn.Module):
    """A bag of pictures, gated attention over them."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            conv_bn(3, 12, 3, 2),
            conv_bn(12, 20, 3, 2),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(20, 24),
            nn.ReLU(),
        )
        self.V, self.U = (
            nn.Sequential(nn.Linear(24, 16), nn.Tanh()),
            nn.Sequential(nn.Linear(24, 16), nn.Sigmoid()),
        )
        self.w, self.classifier = nn.Linear(16, 1), nn.Linear(24, 2)

    def forward(self, x):
        b, n = x.shape[:2]
        h = self.cnn(x.reshape(b * n, *x.shape[2:])).reshape(b, n, -1)
        a = torch.softmax(self.w(self.V(h) * self.U(h)).transpose(1, 2), dim=-1)
        return self.classifier(torch.bmm(a, h).squeeze(1)), a


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return (
            self.weight
            * (x.float() if x.dtype == torch.float16 else x)
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        )


class RotaryBlock(nn.Module):
    def __init__(self, dim=24, heads=4, kv_heads=2, length=12):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = (nn.Linear(dim, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.w1, self.w2, self.w3 = (
            nn.Linear(dim, 40, bias=False),
            nn.Linear(40, dim, bias=False),
            nn.Linear(dim, 40, bias=False),
        )
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        freqs = torch.outer(
            torch.arange(length), 1.0 / 10000 ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        )
        self.register_buffer("cos", torch.cat([freqs, freqs], -1).cos())
        self.register_buffer("sin", torch.cat([freqs, freqs], -1).sin())

    def rotate(self, x):
        x1, x2 = x.chunk(2, dim=-1)
        return x * self.cos[: x.shape[-2]] + torch.cat((-x2, x1), dim=-1) * self.sin[: x.shape[-2]]

    def forward(self, x):
        b, t, _ = x.shape
        h = self.norm1(x)
        q = self.rotate(self.wq(h).view(b, t, self.heads, self.head_dim).transpose(1, 2))
        k = self.rotate(self.wk(h).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2))
        v = self.wv(h).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).contiguous().view(b, t, -1))
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


@stranger(image(12, 8))
class RotaryTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, 24), nn.Sequential(RotaryBlock(), RotaryBlock())
        self.norm, self.out = RMSNorm(24), nn.Linear(24, 9, bias=False)

    def forward(self, x):
        return self.out(self.norm(self.blocks(self.embed(x))))


@stranger(image(20, 12))
class Latents(nn.Module):
    """A few learned vectors read a long input."""

    def __init__(self, dim=16, n=4):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(n, dim))
        self.norm_x, self.norm_l = nn.LayerNorm(12), nn.LayerNorm(dim)
        self.to_q, self.to_kv, self.to_out = (
            nn.Linear(dim, 32, bias=False),
            nn.Linear(12, 64, bias=False),
            nn.Linear(32, dim),
        )
        self.ff = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))
        self.logits = nn.Linear(dim, 5)

    def forward(self, data):
        b = data.shape[0]
        x = self.latents.unsqueeze(0).expand(b, -1, -1)
        q = self.to_q(self.norm_l(x))
        k, v = self.to_kv(self.norm_x(data)).chunk(2, dim=-1)
        q, k, v = (t.reshape(b, t.shape[1], 4, -1).permute(0, 2, 1, 3) for t in (q, k, v))
        sim = torch.einsum("...id,...jd->...ij", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("...ij,...jd->...id", sim.softmax(dim=-1), v)
        x = x + self.to_out(out.permute(0, 2, 1, 3).flatten(2))
        return self.logits((x + self.ff(x)).mean(dim=1))


@stranger()
class ReducedAttention(nn.Module):
    """Keys and values from a smaller map, a convolution among the tokens."""

    def __init__(self, dim=16, heads=2, sr=2):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.embed, self.norm = nn.Conv2d(3, dim, 7, 4, 3), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.sr_norm = nn.Conv2d(dim, dim, sr, sr), nn.LayerNorm(dim)
        self.fc1, self.dw, self.fc2 = (
            nn.Linear(dim, 40),
            nn.Conv2d(40, 40, 3, 1, 1, groups=40),
            nn.Linear(40, dim),
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.embed(x)
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        q = self.q(y).reshape(B, H * W, self.heads, C // self.heads).permute(0, 2, 1, 3)
        z = self.sr(y.permute(0, 2, 1).reshape(B, C, H, W)).reshape(B, C, -1).permute(0, 2, 1)
        kv = self.kv(self.sr_norm(z)).reshape(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attn = ((q @ kv[0].transpose(-2, -1)) * (C // self.heads) ** -0.5).softmax(-1)
        x = x + self.proj((attn @ kv[1]).transpose(1, 2).reshape(B, H * W, C))
        y = self.fc1(x)
        y = self.dw(y.transpose(1, 2).view(B, -1, H, W)).flatten(2).transpose(1, 2)
        return self.head((x + self.fc2(F.gelu(y))).mean(1))


@stranger()
class SpatialGating(nn.Module):
    """Half of the features gate the other half, across places."""

    def __init__(self, dim=16, ff=32, tokens=16):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, dim, 8, 8), nn.LayerNorm(dim)
        self.proj_in, self.proj_out = nn.Linear(dim, ff), nn.Linear(ff // 2, dim)
        self.gate_norm, self.spatial = nn.LayerNorm(ff // 2), nn.Conv1d(tokens, tokens, 1)
        self.head = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        u, v = F.gelu(self.proj_in(self.norm(x))).chunk(2, dim=-1)
        x = x + self.proj_out(u * self.spatial(self.gate_norm(v)))
        return self.head(x.mean(dim=1))
