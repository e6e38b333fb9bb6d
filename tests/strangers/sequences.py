"""Text, sound, video, graphs, points, and what generates."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm

from tests.strangers.images import conv_bn
from tests.strangers.registry import image, stranger, words


@stranger(words(50, 14))
class TextCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv2d(1, 10, (k, 16)) for k in (2, 3, 4))
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(30, 4)

    def forward(self, x):
        x = self.embedding(x).unsqueeze(1)
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        x = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in x]
        return self.fc(self.dropout(torch.cat(x, 1)))


@stranger(words(50, 14))
class CheckedText(nn.Module):
    """Asks what it is given, so that only torch.export can follow; positions are rows of a table of their own."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 24, padding_idx=0), nn.Embedding(14, 24)
        self.register_buffer("position_ids", torch.arange(14).expand((1, -1)))
        self.norm, self.hidden, self.head = nn.LayerNorm(24), nn.Linear(24, 20), nn.Linear(20, 4)

    def forward(self, ids):
        if type(ids) is not torch.Tensor and not hasattr(ids, "fake_mode"):
            raise TypeError(f"found {type(ids).__name__}, expected a tensor")
        mask = ids.new_ones(ids.shape).to(self.norm.weight.dtype)
        x = self.norm(self.words(ids) + self.places(self.position_ids)) * mask.unsqueeze(-1)
        return self.head(F.gelu(self.hidden(x)).mean(1))


@stranger(image(1, 16, 40))
class CRNN(nn.Module):
    def __init__(self, hidden=12):
        super().__init__()
        self.cnn = nn.Sequential(
            conv_bn(1, 12),
            nn.MaxPool2d(2),
            conv_bn(12, 20),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(20, 24, (4, 1)),
            nn.ReLU(),
        )
        self.rnn, self.fc = nn.LSTM(24, hidden, bidirectional=True, num_layers=2), nn.Linear(2 * hidden, 11)

    def forward(self, x):
        conv = self.cnn(x)
        b, c, h, w = conv.size()
        assert h == 1, "the height of conv must be 1"
        conv = conv.squeeze(2).permute(2, 0, 1)
        recurrent, _ = self.rnn(conv)
        T, b, h = recurrent.size()
        out = self.fc(recurrent.view(T * b, h)).view(T, b, -1)
        return F.log_softmax(out, dim=2).permute(1, 0, 2)


class ConvLSTMCell(nn.Module):
    def __init__(self, inp, hidden, k=3):
        super().__init__()
        self.hidden, self.conv = hidden, nn.Conv2d(inp + hidden, 4 * hidden, k, padding=k // 2)

    def init_hidden(self, batch, size):
        h, w = size
        weight = self.conv.weight
        return (
            torch.zeros(batch, self.hidden, h, w, device=weight.device, dtype=weight.dtype),
            torch.zeros(batch, self.hidden, h, w, device=weight.device, dtype=weight.dtype),
        )

    def forward(self, x, state):
        h_cur, c_cur = state
        cc_i, cc_f, cc_o, cc_g = torch.split(self.conv(torch.cat([x, h_cur], dim=1)), self.hidden, dim=1)
        i, f, o, g = torch.sigmoid(cc_i), torch.sigmoid(cc_f), torch.sigmoid(cc_o), torch.tanh(cc_g)
        c_next = f * c_cur + i * g
        return o * torch.tanh(c_next), c_next


@stranger(image(4, 3, 12, 12))
class ConvLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.cell1, self.cell2 = conv_bn(3, 12, 3, 2), ConvLSTMCell(12, 10), ConvLSTMCell(10, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        b, t, c, h, w = x.size()
        s1, s2 = self.cell1.init_hidden(b, (h // 2, w // 2)), self.cell2.init_hidden(b, (h // 2, w // 2))
        outputs = []
        for i in range(t):
            s1 = self.cell1(self.encoder(x[:, i]), s1)
            s2 = self.cell2(s1[0], s2)
            outputs.append(self.out(s2[0]))
        return torch.stack(outputs, dim=1)


@stranger(image(1, 64))
class WaveNet(nn.Module):
    def __init__(self, residual=12, skip=16):
        super().__init__()
        self.start = nn.Conv1d(1, residual, 1)
        self.filters = nn.ModuleList(nn.Conv1d(residual, residual, 2, dilation=2**i) for i in range(4))
        self.gates = nn.ModuleList(nn.Conv1d(residual, residual, 2, dilation=2**i) for i in range(4))
        self.res, self.skips = (
            nn.ModuleList(nn.Conv1d(residual, residual, 1) for _ in range(4)),
            nn.ModuleList(nn.Conv1d(residual, skip, 1) for _ in range(4)),
        )
        self.end1, self.end2 = nn.Conv1d(skip, 20, 1), nn.Conv1d(20, 8, 1)

    def forward(self, x):
        x, skip = self.start(x), 0
        for i in range(4):
            residual = x
            x = torch.tanh(self.filters[i](x)) * torch.sigmoid(self.gates[i](x))
            s = self.skips[i](x)
            try:
                skip = skip[:, :, -s.size(2) :]
            except TypeError:
                skip = 0
            skip = s + skip
            x = self.res[i](x) + residual[:, :, -x.size(2) :]
        return self.end2(F.relu(self.end1(F.relu(skip))))


class Chomp1d(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, i, o, d):
        super().__init__()
        self.net = nn.Sequential(
            weight_norm(nn.Conv1d(i, o, 3, padding=2 * d, dilation=d)),
            Chomp1d(2 * d),
            nn.ReLU(),
            nn.Dropout(0.2),
            weight_norm(nn.Conv1d(o, o, 3, padding=2 * d, dilation=d)),
            Chomp1d(2 * d),
            nn.ReLU(),
            nn.Dropout(0.2),
        )
        self.downsample = nn.Conv1d(i, o, 1) if i != o else None

    def forward(self, x):
        res = x if self.downsample is None else self.downsample(x)
        return F.relu(self.net(x) + res)


@stranger(image(5, 40))
class TCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.tcn = nn.Sequential(TemporalBlock(5, 12, 1), TemporalBlock(12, 12, 2), TemporalBlock(12, 16, 4))
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        return self.linear(self.tcn(x)[:, :, -1])


@stranger(image(4, 3, 16, 16))
class ShiftsInTime(nn.Module):
    def __init__(self, segments=4, div=4):
        super().__init__()
        self.segments, self.div = segments, div
        self.conv1, self.conv2, self.conv3 = conv_bn(3, 16, 3, 2), conv_bn(16, 16), conv_bn(16, 24, 3, 2)
        self.fc = nn.Linear(24, 6)

    def shift(self, x):
        nt, c, h, w = x.size()
        x = x.view(nt // self.segments, self.segments, c, h, w)
        fold = c // self.div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(nt, c, h, w)

    def forward(self, x):
        b = x.size(0)
        x = self.conv1(x.view((-1, 3) + x.size()[-2:]))
        x = x + self.conv2(self.shift(x))
        x = self.fc(self.conv3(x).mean((2, 3)))
        return x.view((b, self.segments) + x.size()[1:]).mean(dim=1)


@stranger(image(3, 4, 16, 16))
class VideoNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.spatial, self.temporal = (
            nn.Conv3d(3, 14, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.Conv3d(14, 12, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.bn, self.slow, self.fast = (
            nn.BatchNorm3d(12),
            nn.Conv3d(12, 20, 3, padding=1),
            nn.Conv3d(12, 8, 3, (2, 1, 1), 1),
        )
        self.fc = nn.Linear(28, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.temporal(self.spatial(x))))
        slow, fast = self.slow(x[:, :, ::2]), self.fast(x)
        x = F.relu(torch.cat([slow, fast], 1))
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


@stranger(words(40, 12))
class TextGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Embedding(40, 16), nn.GRU(16, 12, batch_first=True, bidirectional=True)
        self.attn, self.fc = nn.Linear(24, 1), nn.Linear(24, 3)

    def forward(self, tokens):
        h, _ = self.gru(self.embed(tokens))
        weights = F.softmax(self.attn(torch.tanh(h)), dim=1)
        return self.fc((weights * h).sum(1))


@stranger(words(40, 10))
class LanguageModel(nn.Module):
    """The table of words is also the last layer."""

    def __init__(self, vocab=40, dim=20, length=10):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.ln, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim))
        self.ln_f, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.tok.weight
        self.register_buffer("mask", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, idx):
        b, t = idx.size()
        x = self.tok(idx) + self.pos(torch.arange(0, t, dtype=torch.long, device=idx.device).unsqueeze(0))
        q, k, v = self.qkv(self.ln(x)).split(x.size(2), dim=2)
        q, k, v = (y.view(b, t, 2, y.size(2) // 2).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = F.softmax(att.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")), dim=-1)
        y = (att @ v).transpose(1, 2).contiguous().view(b, t, x.size(2))
        x = x + self.proj(y)
        x = x + self.mlp(x)
        return self.head(self.ln_f(x))


class GraphConv(nn.Module):
    def __init__(self, i, o, A):
        super().__init__()
        self.conv, self.K = nn.Conv2d(i, o * A.size(0), 1), A.size(0)
        self.tcn = nn.Sequential(
            nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, o, (5, 1), padding=(2, 0)), nn.BatchNorm2d(o)
        )
        self.importance = nn.Parameter(torch.ones(A.size()))

    def forward(self, x, A):
        x = self.conv(x)
        n, kc, t, v = x.size()
        x = x.view(n, self.K, kc // self.K, t, v)
        x = torch.einsum("nkctv,kvw->nctw", (x, A * self.importance))
        return F.relu(self.tcn(x.contiguous()))


@stranger(image(3, 10, 7))
class SkeletonGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("A", torch.rand(3, 7, 7))
        self.data_bn = nn.BatchNorm1d(3 * 7)
        self.blocks = nn.ModuleList([GraphConv(3, 12, self.A), GraphConv(12, 16, self.A)])
        self.fcn = nn.Conv2d(16, 6, 1)

    def forward(self, x):
        N, C, T, V = x.size()
        x = x.permute(0, 3, 1, 2).contiguous().view(N, V * C, T)
        x = self.data_bn(x).view(N, V, C, T).permute(0, 2, 3, 1).contiguous()
        for gcn in self.blocks:
            x = gcn(x, self.A)
        x = F.avg_pool2d(x, x.size()[2:]).view(N, -1, 1, 1)
        return self.fcn(x).view(x.size(0), -1)


@stranger(image(8, 6))
class GraphNet(nn.Module):
    """Nodes with features, an adjacency that does not change."""

    def __init__(self):
        super().__init__()
        a = torch.rand(8, 8)
        self.register_buffer("adj", (a + a.T) / (a + a.T).sum(1, keepdim=True))
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 16) * 0.3), nn.Parameter(torch.zeros(16))
        self.lin2, self.lin3 = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(torch.matmul(self.adj, torch.matmul(x, self.w1)) + self.b1)
        x = F.relu(self.adj @ self.lin2(x))
        return F.log_softmax(self.lin3(self.adj @ x), dim=-1)


class TNet(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k, self.conv, self.fc1, self.fc2 = (
            k,
            nn.Sequential(nn.Conv1d(k, 16, 1), nn.BatchNorm1d(16), nn.ReLU()),
            nn.Linear(16, 12),
            nn.Linear(12, k * k),
        )

    def forward(self, x):
        batchsize = x.size()[0]
        x = torch.max(self.conv(x), 2, keepdim=True)[0].view(-1, 16)
        x = self.fc2(F.relu(self.fc1(x)))
        iden = torch.eye(self.k, dtype=x.dtype, device=x.device).view(1, self.k * self.k).repeat(batchsize, 1)
        return (x + iden).view(-1, self.k, self.k)


@stranger(image(3, 30))
class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stn, self.fstn = TNet(3), TNet(12)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 24, 1), nn.Conv1d(36, 5, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(12), nn.BatchNorm1d(24)

    def forward(self, x):
        n_pts = x.size()[2]
        x = torch.bmm(x.transpose(2, 1), self.stn(x)).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        local = torch.bmm(x.transpose(2, 1), self.fstn(x)).transpose(2, 1)
        x = torch.max(self.bn2(self.conv2(local)), 2, keepdim=True)[0]
        x = x.view(-1, 24, 1).repeat(1, 1, n_pts)
        return F.log_softmax(self.conv3(torch.cat([x, local], 1)).transpose(2, 1).contiguous(), dim=-1)


class ModulatedConv(nn.Module):
    def __init__(self, i, o, style, k=3, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, o, i, k, k))
        self.scale, self.pad, self.o, self.demodulate = 1 / math.sqrt(i * k * k), k // 2, o, demodulate
        self.modulation = nn.Linear(style, i)

    def forward(self, x, style):
        batch, i, height, width = x.shape
        style = self.modulation(style).view(batch, 1, i, 1, 1)
        weight = self.scale * self.weight * style
        if self.demodulate:
            demod = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * demod.view(batch, self.o, 1, 1, 1)
        weight = weight.view(batch * self.o, i, *self.weight.shape[-2:])
        x = x.view(1, batch * i, height, width)
        return F.conv2d(x, weight, padding=self.pad, groups=batch).view(batch, self.o, height, width)


@stranger(image(10))
class StyleGenerator(nn.Module):
    """Weights modulated by a style for every sample."""

    def __init__(self):
        super().__init__()
        self.mapping = nn.Sequential(
            nn.Linear(10, 16), nn.LeakyReLU(0.2), nn.Linear(16, 12), nn.LeakyReLU(0.2)
        )
        self.const = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.conv1, self.conv2 = ModulatedConv(16, 12, 12), ModulatedConv(12, 10, 12)
        self.to_rgb = nn.Conv2d(10, 3, 1)

    def forward(self, z):
        z = z * torch.rsqrt(torch.mean(z**2, dim=1, keepdim=True) + 1e-8)
        w = self.mapping(z)
        x = self.const.repeat(w.shape[0], 1, 1, 1)
        x = F.leaky_relu(self.conv1(x, w), 0.2)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.tanh(self.to_rgb(F.leaky_relu(self.conv2(x, w), 0.2)))


@stranger(image(3, 16, 16), image(3, 16, 16))
class AdaIN(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(16, 12, 3),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.ReflectionPad2d(1),
            nn.Conv2d(12, 3, 3),
        )

    @staticmethod
    def mean_std(feat, eps=1e-5):
        N, C = feat.size()[:2]
        std = (feat.view(N, C, -1).var(dim=2) + eps).sqrt().view(N, C, 1, 1)
        return feat.view(N, C, -1).mean(dim=2).view(N, C, 1, 1), std

    def forward(self, content, style):
        content, style = self.encoder(content), self.encoder(style)
        size = content.size()
        (sm, ss), (cm, cs) = self.mean_std(style), self.mean_std(content)
        normalized = (content - cm.expand(size)) / cs.expand(size)
        return self.decoder(normalized * ss.expand(size) + sm.expand(size))


@stranger(image(3, 16, 16), words(5))
class Conditioned(nn.Module):
    """Scales and shifts that follow from a class."""

    def __init__(self):
        super().__init__()
        self.emb, self.film1, self.film2 = nn.Embedding(5, 12), nn.Linear(12, 2 * 16), nn.Linear(12, 2 * 20)
        self.conv1, self.conv2, self.bn1, self.bn2 = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 20, 3, 2, 1),
            nn.BatchNorm2d(16, affine=False),
            nn.BatchNorm2d(20, affine=False),
        )
        self.fc = nn.Linear(20, 4)

    def forward(self, x, y):
        e = self.emb(y)
        gamma, beta = self.film1(e).chunk(2, 1)
        x = F.relu(self.bn1(self.conv1(x)) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None])
        gamma, beta = self.film2(e).view(-1, 2, 20, 1, 1).unbind(1)
        x = F.relu(gamma * self.bn2(self.conv2(x)) + beta)
        return self.fc(x.mean((-1, -2)))


@stranger(image(1, 16, 16))
class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU())
        self.fc_mu, self.fc_var, self.dec_in = (
            nn.Linear(16 * 16, 8),
            nn.Linear(16 * 16, 8),
            nn.Linear(8, 16 * 16),
        )
        self.dec = nn.Sequential(
            nn.ConvTranspose2d(16, 12, 3, 2, 1, 1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 1, 3, 2, 1, 1),
            nn.Sigmoid(),
        )

    def reparameterize(self, mu, logvar):
        if self.training:
            return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return mu

    def forward(self, x):
        h = torch.flatten(self.enc(x), start_dim=1)
        mu, logvar = self.fc_mu(h), self.fc_var(h)
        z = self.reparameterize(mu, logvar)
        return [self.dec(self.dec_in(z).view(-1, 16, 4, 4)), mu, logvar]


@stranger(image(3, 16, 16), words(100))
class Denoiser(nn.Module):
    """A U-Net of diffusion: steps in sines, attention in the middle."""

    def __init__(self, dim=12):
        super().__init__()
        self.dim = dim
        self.time_mlp = nn.Sequential(nn.Linear(dim, 24), nn.SiLU(), nn.Linear(24, 16))
        self.conv_in, self.down = nn.Conv2d(3, dim, 3, padding=1), nn.Conv2d(dim, 20, 4, 2, 1)
        self.t1, self.t2 = nn.Linear(16, dim), nn.Linear(16, 40)
        self.norm1, self.norm2, self.norm3 = nn.GroupNorm(4, dim), nn.GroupNorm(4, 20), nn.GroupNorm(4, 20)
        self.block1, self.block2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1)
        self.qkv, self.proj = nn.Conv1d(20, 60, 1), nn.Conv1d(20, 20, 1)
        self.up, self.out = nn.ConvTranspose2d(20, dim, 4, 2, 1), nn.Conv2d(2 * dim, 3, 3, padding=1)

    def embed(self, t):
        half = self.dim // 2
        freqs = torch.exp(
            -math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float64) / (half - 1)
        )
        args = t[:, None] * freqs[None]
        return torch.cat((args.sin(), args.cos()), dim=-1)

    def forward(self, x, t):
        temb = self.time_mlp(self.embed(t))
        h0 = self.conv_in(x)
        h0 = h0 + self.block1(F.silu(self.norm1(h0)) + self.t1(temb)[:, :, None, None])
        h = self.down(h0)
        scale, shift = self.t2(F.silu(temb))[..., None, None].chunk(2, dim=1)
        h = h + self.block2(F.silu(self.norm2(h) * (scale + 1) + shift))
        b, c, *spatial = h.shape
        y = self.norm3(h).reshape(b, c, -1)
        q, k, v = self.qkv(y).reshape(b * 2, c // 2 * 3, -1).split(c // 2, dim=1)
        weight = torch.einsum("bct,bcs->bts", q / (c // 2) ** 0.25, k / (c // 2) ** 0.25).softmax(-1)
        y = self.proj(torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1))
        h = h + y.reshape(b, c, *spatial)
        return self.out(torch.cat((self.up(h), h0), dim=1))


@stranger(image(4, 8, 8))
class Coupling(nn.Module):
    """Half of the channels are moved by what the other half says."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 16, 1),
                nn.ReLU(),
                nn.Conv2d(16, 4, 3, padding=1),
            )
            for _ in range(2)
        )

    def forward(self, x):
        logdet = 0
        for net in self.nets:
            a, b = x.chunk(2, dim=1)
            s, t = net(a).chunk(2, dim=1)
            s = torch.tanh(s)
            b = b * torch.exp(s) + t
            logdet = logdet + s.flatten(1).sum(1)
            x = torch.cat([b, a], dim=1)
        return x, logdet


@stranger(image(16, 6))
class RadianceField(nn.Module):
    def __init__(self, freqs=4, width=24):
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(freqs))
        d = 3 + 3 * 2 * freqs
        self.pts = nn.ModuleList([nn.Linear(d, width), nn.Linear(width, width), nn.Linear(width + d, width)])
        self.sigma, self.feature, self.view, self.rgb = (
            nn.Linear(width, 1),
            nn.Linear(width, width),
            nn.Linear(width + d, 12),
            nn.Linear(12, 3),
        )

    def encode(self, x):
        x_ = (x[..., None, :] * self.bands[:, None]).reshape(*x.shape[:-1], -1)
        return torch.cat([x, torch.sin(x_), torch.cos(x_)], -1)

    def forward(self, x):
        pts, dirs = torch.split(x, [3, 3], dim=-1)
        pts, dirs = self.encode(pts), self.encode(dirs)
        h = pts
        for i, layer in enumerate(self.pts):
            h = F.relu(layer(torch.cat([pts, h], -1) if i == 2 else h))
        rgb = self.rgb(F.relu(self.view(torch.cat([self.feature(h), dirs], -1))))
        return torch.cat([torch.sigmoid(rgb), F.softplus(self.sigma(h))], -1)


@stranger(image(12, 50))
class Speaker(nn.Module):
    """Time delays, squeeze and excitation, statistics over time."""

    def __init__(self):
        super().__init__()
        self.tdnn1, self.tdnn2 = nn.Conv1d(12, 16, 5, dilation=1), nn.Conv1d(16, 24, 3, dilation=2)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(24)
        self.attention = nn.Sequential(
            nn.Conv1d(24, 8, 1),
            nn.ReLU(),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.Conv1d(8, 24, 1),
            nn.Softmax(dim=2),
        )
        self.bn3, self.fc = nn.BatchNorm1d(48), nn.Linear(48, 16)

    def forward(self, x):
        x = self.bn1(F.relu(self.tdnn1(x)))
        x = self.bn2(F.relu(self.tdnn2(x)))
        w = self.attention(x)
        mu = torch.sum(x * w, dim=2)
        sg = torch.sqrt((torch.sum((x**2) * w, dim=2) - mu**2).clamp(min=1e-4))
        return self.fc(self.bn3(torch.cat((mu, sg), 1)))


@stranger(image(1, 64))
class SoundUNet(nn.Module):
    """Convolutions and gated linear units, cut to what fits."""

    def __init__(self):
        super().__init__()
        self.enc = nn.ModuleList(
            nn.Sequential(nn.Conv1d(i, o, 8, 4), nn.ReLU(), nn.Conv1d(o, 2 * o, 1), nn.GLU(1))
            for i, o in ((1, 8), (8, 16))
        )
        self.lstm, self.linear = nn.LSTM(16, 16, bidirectional=True), nn.Linear(32, 16)
        self.dec = nn.ModuleList(
            nn.Sequential(nn.Conv1d(i, 2 * i, 3, padding=1), nn.GLU(1), nn.ConvTranspose1d(i, o, 8, 4))
            for i, o in ((16, 8), (8, 1))
        )

    @staticmethod
    def center_trim(x, reference):
        diff = x.size(-1) - (reference.size(-1) if torch.is_tensor(reference) else reference)
        return x[..., diff // 2 : x.size(-1) - (diff - diff // 2)] if diff else x

    def forward(self, mix):
        x, saved = mix, []
        for encode in self.enc:
            x = encode(x)
            saved.append(x)
        x = self.linear(self.lstm(x.permute(2, 0, 1))[0]).permute(1, 2, 0)
        for i, decode in enumerate(self.dec):
            skip = saved.pop(-1)
            x = decode(x + self.center_trim(skip, x))
            x = F.relu(x) if i == 0 else x
            if saved:
                saved[-1] = self.center_trim(saved[-1], min(x.shape[-1], saved[-1].shape[-1]))
                x = self.center_trim(x, saved[-1])
        return x


@stranger(words(30, 6), image(4))
class Recommender(nn.Module):
    """Tables of users and things, products of pairs, and a deep part."""

    def __init__(self, fields=6, dim=8):
        super().__init__()
        self.emb, self.linear = nn.Embedding(30, dim), nn.Embedding(30, 1)
        self.dense = nn.Linear(4, dim)
        self.mlp = nn.Sequential(
            nn.Linear((fields + 1) * dim, 24),
            nn.BatchNorm1d(24),
            nn.ReLU(),
            nn.Linear(24, 12),
            nn.ReLU(),
            nn.Linear(12, 1),
        )

    def forward(self, sparse, dense):
        e = torch.cat([self.emb(sparse), self.dense(dense).unsqueeze(1)], dim=1)
        square_of_sum, sum_of_square = torch.sum(e, dim=1) ** 2, torch.sum(e**2, dim=1)
        fm = 0.5 * torch.sum(square_of_sum - sum_of_square, dim=1, keepdim=True)
        return torch.sigmoid(
            torch.sum(self.linear(sparse), dim=1) + fm + self.mlp(e.view(e.size(0), -1))
        ).squeeze(1)


@stranger(image(24, 10))
class StateSpace(nn.Module):
    """A selective recurrence, step by step."""

    def __init__(self, dim=12, state=4, rank=3):
        super().__init__()
        self.dim, self.state, self.rank = dim, state, rank
        self.in_proj, self.conv = (
            nn.Linear(10, 2 * dim, bias=False),
            nn.Conv1d(dim, dim, 4, padding=3, groups=dim),
        )
        self.x_proj, self.dt_proj = nn.Linear(dim, rank + 2 * state, bias=False), nn.Linear(rank, dim)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(dim, 1))
        self.D, self.out_proj = nn.Parameter(torch.ones(dim)), nn.Linear(dim, 10, bias=False)

    def forward(self, x):
        b, l, _ = x.shape
        x, z = self.in_proj(x).split([self.dim, self.dim], dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[:, :, :l].transpose(1, 2))
        dt, B, C = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        delta = F.softplus(self.dt_proj(dt))
        A = -torch.exp(self.A_log)
        dA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        dBx = torch.einsum("bld,bln,bld->bldn", delta, B, x)
        h = torch.zeros(b, self.dim, self.state, dtype=x.dtype, device=x.device)
        ys = []
        for i in range(l):
            h = dA[:, i] * h + dBx[:, i]
            ys.append(torch.einsum("bdn,bn->bd", h, C[:, i]))
        y = torch.stack(ys, dim=1) + x * self.D
        return self.out_proj(y * F.silu(z))


@stranger(image(1, 80))
class LearnedFilters(nn.Module):
    """Band passes with learned edges, on a raw wave."""

    def __init__(self, filters=12, k=15):
        super().__init__()
        self.low, self.band = (
            nn.Parameter(torch.linspace(0.02, 0.3, filters).view(-1, 1)),
            nn.Parameter(torch.full((filters, 1), 0.05)),
        )
        self.register_buffer("n", torch.arange(-(k // 2), k // 2 + 1).view(1, -1) * 2 * math.pi)
        self.register_buffer("window", torch.hamming_window(k, periodic=False))
        self.bn, self.conv, self.fc = nn.BatchNorm1d(filters), nn.Conv1d(filters, 20, 5, 2), nn.Linear(20, 4)

    def forward(self, x):
        low = self.low.abs() + 0.01
        high = torch.clamp(low + self.band.abs(), 0.02, 0.5)
        band = (torch.sin(high * self.n) - torch.sin(low * self.n)) / (self.n / 2 + 1e-3) * self.window
        x = F.conv1d(x, band.view(band.size(0), 1, -1), stride=2, padding=7)
        x = F.max_pool1d(F.leaky_relu(self.bn(torch.abs(x)), 0.2), 3)
        return self.fc(F.relu(self.conv(x)).mean(-1))
