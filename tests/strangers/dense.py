"""Detection, segmentation, restoration, flow."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d

from tests.strangers.images import conv_bn
from tests.strangers.registry import image, stranger


class DoubleConv(nn.Module):
    def __init__(self, i, o, mid=None):
        super().__init__()
        mid = mid or o
        self.double_conv = nn.Sequential(conv_bn(i, mid), conv_bn(mid, o))

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, i, o, bilinear):
        super().__init__()
        self.up = (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            if bilinear
            else nn.ConvTranspose2d(i, i // 2, 2, 2)
        )
        self.conv = DoubleConv(i + i // 2 if bilinear else i, o)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        diffY, diffX = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diffX // 2, diffX - diffX // 2, diffY // 2, diffY - diffY // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


@stranger(image(3, 36, 44))
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inc, self.down1, self.down2 = (
            DoubleConv(3, 8),
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16)),
            nn.Sequential(nn.MaxPool2d(2), DoubleConv(16, 32)),
        )
        self.down3 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(32, 64))
        self.up0, self.up1, self.up2 = Up(64, 32, False), Up(32, 16, False), Up(16, 8, False)
        self.outc = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up0(self.down3(x3), x3)
        return self.outc(self.up2(self.up1(x, x2), x1))


@stranger(image(3, 32, 32))
class AttentionUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc1, self.enc2, self.pool = DoubleConv(3, 8), DoubleConv(8, 16), nn.MaxPool2d(2)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), conv_bn(16, 8))
        self.W_g, self.W_x, self.psi = (
            conv_bn(8, 6, 1, act=False),
            conv_bn(8, 6, 1, act=False),
            nn.Sequential(nn.Conv2d(6, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid()),
        )
        self.dec, self.out = DoubleConv(16, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        e1 = self.enc1(x)
        d = self.up(self.enc2(self.pool(e1)))
        a = e1 * self.psi(F.relu(self.W_g(d) + self.W_x(e1), inplace=True))
        return self.out(self.dec(torch.cat((a, d), dim=1)))


class Backbone(nn.Module):
    def __init__(self, widths=(12, 16, 24)):
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2)
        self.c3, self.c4, self.c5 = (
            conv_bn(8, widths[0]),
            conv_bn(widths[0], widths[1], 3, 2),
            conv_bn(widths[1], widths[2], 3, 2),
        )

    def forward(self, x):
        c3 = self.c3(self.stem(x))
        c4 = self.c4(c3)
        return c3, c4, self.c5(c4)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return x * self.scale


@stranger(image(3, 48, 40))
class PyramidDetector(nn.Module):
    """A pyramid of features, heads that all levels share, anchor-free."""

    def __init__(self, dim=16, classes=3):
        super().__init__()
        self.backbone = Backbone()
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in (12, 16, 24))
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(3))
        self.cls_tower, self.box_tower = (
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(4, dim), nn.ReLU())
            for _ in range(2)
        )
        self.cls, self.box, self.centre = (
            nn.Conv2d(dim, classes, 3, padding=1),
            nn.Conv2d(dim, 4, 3, padding=1),
            nn.Conv2d(dim, 1, 3, padding=1),
        )
        self.scales = nn.ModuleList(Scale() for _ in range(3))

    def forward(self, x):
        feats = [lat(f) for lat, f in zip(self.lateral, self.backbone(x))]
        for i in range(len(feats) - 1, 0, -1):
            feats[i - 1] = feats[i - 1] + F.interpolate(
                feats[i], size=feats[i - 1].shape[-2:], mode="nearest"
            )
        logits, boxes, centres = [], [], []
        for level, (f, smooth) in enumerate(zip(feats, self.smooth)):
            f = smooth(f)
            c, b = self.cls_tower(f), self.box_tower(f)
            logits.append(self.cls(c).flatten(2))
            boxes.append(F.relu(self.scales[level](self.box(b))).flatten(2))
            centres.append(self.centre(b).flatten(2))
        return torch.cat(logits, 2), torch.cat(boxes, 2), torch.cat(centres, 2)


class BiFPNLayer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)
            )
            for _ in range(4)
        )
        self.w1, self.w2 = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 3))
        self.eps = 1e-4

    def forward(self, inputs):
        p3, p4, p5 = inputs
        w1, w2 = F.relu(self.w1), F.relu(self.w2)
        w1, w2 = w1 / (w1.sum(dim=0) + self.eps), w2 / (w2.sum(dim=0) + self.eps)
        t4 = self.convs[0](F.silu(w1[0, 0] * p4 + w1[1, 0] * F.interpolate(p5, scale_factor=2)))
        o3 = self.convs[1](F.silu(w1[0, 1] * p3 + w1[1, 1] * F.interpolate(t4, scale_factor=2)))
        o4 = self.convs[2](F.silu(w2[0, 0] * p4 + w2[0, 1] * t4 + w2[0, 2] * F.max_pool2d(o3, 2)))
        o5 = self.convs[3](F.silu(w2[1, 0] * p5 + w2[1, 1] * F.max_pool2d(o4, 2)))
        return o3, o4, o5


@stranger(image(3, 32, 32))
class BiFPN(nn.Module):
    def __init__(self, dim=16, anchors=2, classes=3):
        super().__init__()
        self.backbone, self.classes = Backbone(), classes
        self.proj = nn.ModuleList(conv_bn(c, dim, 1, act=False) for c in (12, 16, 24))
        self.layers = nn.Sequential(BiFPNLayer(dim), BiFPNLayer(dim))
        self.head = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Conv2d(dim, anchors * classes, 1)
        )

    def forward(self, x):
        feats = self.layers([p(f) for p, f in zip(self.proj, self.backbone(x))])
        outs = []
        for f in feats:
            f = self.head(f).permute(0, 2, 3, 1)
            outs.append(f.contiguous().view(f.shape[0], -1, self.classes))
        return torch.cat(outs, dim=1).sigmoid()


class CSP(nn.Module):
    def __init__(self, i, o, n=1):
        super().__init__()
        c = o // 2
        self.cv1, self.cv2, self.cv3 = conv_bn(i, c, 1), conv_bn(i, c, 1), conv_bn(2 * c, o, 1)
        self.m = nn.ModuleList(nn.Sequential(conv_bn(c, c, 1), conv_bn(c, c)) for _ in range(n))

    def forward(self, x):
        y = self.cv1(x)
        for m in self.m:
            y = y + m(y)
        return self.cv3(torch.cat((y, self.cv2(x)), 1))


@stranger(image(3, 32, 48))
class Yolo(nn.Module):
    """Focus, CSP, SPPF, a path up and down, and boxes from a grid."""

    def __init__(self, nc=3, na=3):
        super().__init__()
        self.na, self.no = na, nc + 5
        self.focus, self.c1, self.c2 = (
            conv_bn(12, 12),
            CSP(12, 16),
            nn.Sequential(conv_bn(16, 24, 3, 2), CSP(24, 24, 2)),
        )
        self.spp_in, self.spp_out = conv_bn(24, 12, 1), conv_bn(48, 24, 1)
        self.reduce, self.up_csp = conv_bn(24, 16, 1), CSP(32, 16)
        self.down, self.down_csp = conv_bn(16, 16, 3, 2), CSP(32, 24)
        self.detect = nn.ModuleList([nn.Conv2d(16, na * self.no, 1), nn.Conv2d(24, na * self.no, 1)])
        self.stride = (2, 4)
        self.register_buffer("anchor_grid", torch.rand(2, 1, na, 1, 1, 2) + 0.5)

    @staticmethod
    def _make_grid(nx, ny):
        yv, xv = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
        return torch.stack((xv, yv), 2).view((1, 1, ny, nx, 2)).double()

    def forward(self, x):
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        p3 = self.c1(self.focus(x))
        y = self.spp_in(self.c2(p3))
        y1 = F.max_pool2d(y, 5, 1, 2)
        y2 = F.max_pool2d(y1, 5, 1, 2)
        top = self.reduce(self.spp_out(torch.cat([y, y1, y2, F.max_pool2d(y2, 5, 1, 2)], 1)))
        p3 = self.up_csp(torch.cat([F.interpolate(top, scale_factor=2.0), p3], 1))
        p4 = self.down_csp(torch.cat([self.down(p3), top], 1))
        z = []
        for i, p in enumerate((p3, p4)):
            p = self.detect[i](p)
            bs, _, ny, nx = p.shape
            p = p.view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            xy = (p[..., 0:2] * 2.0 - 0.5 + self._make_grid(nx, ny)) * self.stride[i]
            wh = (p[..., 2:4] * 2) ** 2 * self.anchor_grid[i]
            z.append(torch.cat((xy, wh, p[..., 4:]), -1).view(bs, -1, self.no))
        return torch.cat(z, 1)


@stranger(image(3, 24, 32))
class Keypoints(nn.Module):
    """Features of several resolutions woven into each other; every third number of a point is a probability, and is
    written where it lies.
    """

    def __init__(self, points=4):
        super().__init__()
        self.stem = conv_bn(3, 12, 3, 2)
        self.coarse, self.fine = conv_bn(12, 9, 3, 2), conv_bn(12, 9)
        self.mix, self.points = conv_bn(18, 16), nn.Conv2d(16, 3 * points, 1)

    def forward(self, x):
        x = self.stem(x)
        fine = self.fine(x)
        both = torch.zeros_like(torch.cat([fine, fine], 1))
        both[:, ::2] = fine
        both[:, 1::2] = F.interpolate(self.coarse(x), size=fine.shape[2:])
        y = self.points(self.mix(both)).flatten(2)
        y = y.clone()
        y[:, 2::3] = y[:, 2::3].sigmoid()
        grid_y, grid_x = torch.meshgrid(
            torch.arange(fine.shape[2], dtype=y.dtype),
            torch.arange(fine.shape[3], dtype=y.dtype),
            indexing="ij",
        )
        y[:, 0::3] = y[:, 0::3] * 2.0 + grid_x.flatten()
        y[:, 1::3] = y[:, 1::3] * 2.0 + grid_y.flatten()
        return y


@stranger(image(3, 33, 33))
class DeepLab(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.low, self.high = conv_bn(3, 12, 3, 2), conv_bn(12, 24, 3, 2)
        self.branches = nn.ModuleList(
            [
                conv_bn(24, 10, 1),
                *(
                    nn.Sequential(
                        nn.Conv2d(24, 10, 3, padding=d, dilation=d, bias=False), nn.BatchNorm2d(10), nn.ReLU()
                    )
                    for d in (2, 4)
                ),
            ]
        )
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(24, 10, 1), nn.ReLU())
        self.project, self.low_proj = conv_bn(40, 16, 1), conv_bn(12, 6, 1)
        self.classifier = nn.Sequential(conv_bn(22, 16), nn.Conv2d(16, classes, 1))

    def forward(self, x):
        size = x.shape[-2:]
        low = self.low(x)
        x = self.high(low)
        res = [branch(x) for branch in self.branches]
        res.append(F.interpolate(self.image_pool(x), size=x.shape[2:], mode="bilinear", align_corners=False))
        x = F.interpolate(
            self.project(torch.cat(res, dim=1)), size=low.shape[2:], mode="bilinear", align_corners=False
        )
        x = self.classifier(torch.cat([x, self.low_proj(low)], dim=1))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@stranger(image(3, 24, 24))
class PyramidPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, 2), conv_bn(12, 24))
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(s),
                nn.Conv2d(24, 6, 1, bias=False),
                nn.BatchNorm2d(6),
                nn.ReLU(inplace=True),
            )
            for s in (1, 2, 3, 6)
        )
        self.bottleneck = nn.Sequential(conv_bn(48, 16), nn.Dropout2d(0.1), nn.Conv2d(16, 4, 1))

    def forward(self, x):
        x = self.body(x)
        h, w = x.size(2), x.size(3)
        priors = [
            F.interpolate(input=stage(x), size=(h, w), mode="bilinear", align_corners=False)
            for stage in self.stages
        ] + [x]
        return self.bottleneck(torch.cat(priors, 1))


@stranger(image(3, 32, 32))
class SingleShot(nn.Module):
    def __init__(self, classes=4, boxes=3):
        super().__init__()
        self.classes, self.backbone = classes, Backbone()
        self.loc = nn.ModuleList(nn.Conv2d(c, boxes * 4, 3, padding=1) for c in (12, 16, 24))
        self.conf = nn.ModuleList(nn.Conv2d(c, boxes * classes, 3, padding=1) for c in (12, 16, 24))
        self.norm = nn.Parameter(torch.full((12,), 2.0))

    def forward(self, x):
        sources = list(self.backbone(x))
        s = sources[0]
        sources[0] = self.norm.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(s) * (
            s / (s.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)
        )
        loc, conf = [], []
        for x, l, c in zip(sources, self.loc, self.conf):
            loc.append(l(x).permute(0, 2, 3, 1).contiguous())
            conf.append(c(x).permute(0, 2, 3, 1).contiguous())
        loc = torch.cat([o.view(o.size(0), -1) for o in loc], 1)
        conf = torch.cat([o.view(o.size(0), -1) for o in conf], 1)
        return loc.view(loc.size(0), -1, 4), F.softmax(conf.view(conf.size(0), -1, self.classes), dim=-1)


class Hourglass(nn.Module):
    def __init__(self, depth, dim):
        super().__init__()
        self.up1, self.low1 = conv_bn(dim, dim), conv_bn(dim, dim + 4)
        self.low2 = Hourglass(depth - 1, dim + 4) if depth > 1 else conv_bn(dim + 4, dim + 4)
        self.low3 = conv_bn(dim + 4, dim)

    def forward(self, x):
        low = self.low3(self.low2(self.low1(F.max_pool2d(x, 2))))
        return self.up1(x) + F.interpolate(low, scale_factor=2, mode="nearest")


@stranger(image(3, 32, 32))
class StackedHourglass(nn.Module):
    """Two of them; heat maps of the first go into the second."""

    def __init__(self, dim=12, joints=5):
        super().__init__()
        self.pre = conv_bn(3, dim, 7, 2)
        self.glasses = nn.ModuleList(Hourglass(2, dim) for _ in range(2))
        self.features = nn.ModuleList(conv_bn(dim, dim, 1) for _ in range(2))
        self.heat = nn.ModuleList(nn.Conv2d(dim, joints, 1) for _ in range(2))
        self.merge_f, self.merge_h = nn.Conv2d(dim, dim, 1), nn.Conv2d(joints, dim, 1)

    def forward(self, x):
        x = self.pre(x)
        combined = []
        for i in range(2):
            feature = self.features[i](self.glasses[i](x))
            preds = self.heat[i](feature)
            combined.append(preds)
            if i == 0:
                x = x + self.merge_h(preds) + self.merge_f(feature)
        return torch.stack(combined, 1)


@stranger(image(3, 16, 16))
class SuperResolution(nn.Module):
    def __init__(self, dim=16, scale=2):
        super().__init__()
        self.head = nn.Conv2d(3, dim, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, 24, 3, padding=1), nn.ReLU(True), nn.Conv2d(24, dim, 3, padding=1))
            for _ in range(3)
        )
        self.tail = nn.Sequential(
            nn.Conv2d(dim, dim * scale**2, 3, padding=1),
            nn.PixelShuffle(scale),
            nn.Conv2d(dim, 3, 3, padding=1),
        )
        self.register_buffer("mean", torch.tensor([0.4, 0.45, 0.4]).view(1, 3, 1, 1))

    def forward(self, x):
        x = self.head(x - self.mean)
        res = x
        for block in self.body:
            res = res + block(res) * 0.1
        return self.tail(res + x) + self.mean


@stranger(image(3, 16, 16))
class ResidualDense(nn.Module):
    def __init__(self, nf=12, gc=8):
        super().__init__()
        self.first = nn.Conv2d(3, nf, 3, 1, 1)
        self.convs = nn.ModuleList(nn.Conv2d(nf + i * gc, gc if i < 3 else nf, 3, 1, 1) for i in range(4))
        self.upconv, self.last = nn.Conv2d(nf, nf, 3, 1, 1), nn.Conv2d(nf, 3, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(negative_slope=0.2, inplace=True)

    def forward(self, x):
        fea = self.first(x)
        outs = [fea]
        for conv in self.convs[:-1]:
            outs.append(self.lrelu(conv(torch.cat(outs, 1))))
        fea = self.convs[-1](torch.cat(outs, 1)) * 0.2 + fea
        fea = self.lrelu(self.upconv(F.interpolate(fea, scale_factor=2, mode="nearest")))
        return self.last(fea)


class ConvGRU(nn.Module):
    def __init__(self, hidden, inp):
        super().__init__()
        self.convz, self.convr, self.convq = (nn.Conv2d(hidden + inp, hidden, 3, padding=1) for _ in range(3))

    def forward(self, h, x):
        hx = torch.cat([h, x], dim=1)
        z, r = torch.sigmoid(self.convz(hx)), torch.sigmoid(self.convr(hx))
        q = torch.tanh(self.convq(torch.cat([r * h, x], dim=1)))
        return (1 - z) * h + z * q


@stranger(image(3, 32, 32), image(3, 32, 32))
class Flow(nn.Module):
    """All pairs of two pictures' features, looked up around a flow that is refined step by step."""

    def __init__(self, dim=16, hidden=12, radius=1):
        super().__init__()
        self.fnet = nn.Sequential(
            nn.Conv2d(3, 16, 7, 4, 3), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, dim, 3, padding=1)
        )
        self.cnet = nn.Sequential(conv_bn(3, 16, 3, 4), nn.Conv2d(16, 2 * hidden, 1))
        self.hidden, self.radius = hidden, radius
        self.motion = nn.Sequential(nn.Conv2d((2 * radius + 1) ** 2 + 2, 16, 3, padding=1), nn.ReLU())
        self.gru, self.flow_head = ConvGRU(hidden, hidden + 16), nn.Conv2d(hidden, 2, 3, padding=1)

    def lookup(self, corr, coords):
        b, _, h, w = coords.shape
        r = self.radius
        d = torch.linspace(-r, r, 2 * r + 1)
        delta = torch.stack(torch.meshgrid(d, d, indexing="ij"), dim=-1).view(1, 2 * r + 1, 2 * r + 1, 2)
        around = coords.permute(0, 2, 3, 1).reshape(b * h * w, 1, 1, 2) + delta.to(coords)
        grid = 2 * around / torch.tensor([w - 1, h - 1]).to(coords) - 1
        return F.grid_sample(corr, grid, align_corners=True).view(b, h, w, -1).permute(0, 3, 1, 2)

    def forward(self, one, two):
        f1, f2 = self.fnet(one), self.fnet(two)
        b, d, h, w = f1.shape
        corr = torch.matmul(f1.view(b, d, h * w).transpose(1, 2), f2.view(b, d, h * w)) / d**0.5
        corr = corr.view(b * h * w, 1, h, w)
        net, inp = torch.split(self.cnet(one), [self.hidden, self.hidden], dim=1)
        net, inp = torch.tanh(net), torch.relu(inp)
        ys, xs = torch.meshgrid(
            torch.arange(h, dtype=one.dtype), torch.arange(w, dtype=one.dtype), indexing="ij"
        )
        coords0 = torch.stack([xs, ys])[None].repeat(b, 1, 1, 1)
        coords1 = coords0
        for _ in range(2):
            flow = coords1 - coords0
            motion = self.motion(torch.cat([self.lookup(corr, coords1), flow], dim=1))
            net = self.gru(net, torch.cat([inp, motion], dim=1))
            coords1 = coords1 + self.flow_head(net)
        return F.interpolate(coords1 - coords0, scale_factor=4, mode="bilinear", align_corners=True) * 4


@stranger(image(3, 24, 24))
class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 12, 3, 2)
        self.offset, self.mask = nn.Conv2d(12, 18, 3, padding=1), nn.Conv2d(12, 9, 3, padding=1)
        self.deform, self.bn = DeformConv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.tail = nn.Sequential(conv_bn(16, 20), nn.Conv2d(20, 4, 1))

    def forward(self, x):
        x = self.stem(x)
        x = self.deform(x, self.offset(x), torch.sigmoid(self.mask(x)))
        return self.tail(F.relu(self.bn(x)))


@stranger(image(3, 32, 32))
class TokensDecoder(nn.Module):
    """Linear layers on every level, resized and concatenated."""

    def __init__(self, dim=12):
        super().__init__()
        self.backbone = Backbone()
        self.linear = nn.ModuleList(nn.Linear(c, dim) for c in (12, 16, 24))
        self.fuse, self.pred = conv_bn(3 * dim, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        feats, outs = self.backbone(x), []
        for lin, f in zip(self.linear, feats):
            n, _, h, w = f.shape
            y = lin(f.flatten(2).transpose(1, 2)).permute(0, 2, 1).reshape(n, -1, h, w)
            outs.append(F.interpolate(y, size=feats[0].size()[2:], mode="bilinear", align_corners=False))
        return self.pred(self.fuse(torch.cat(outs[::-1], dim=1)))


@stranger(image(3, 24, 24))
class MasksByKernels(nn.Module):
    """Prototypes, combined by coefficients that are found for every sample."""

    def __init__(self, protos=8, instances=4):
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 20))
        self.proto = nn.Sequential(
            conv_bn(20, 12),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(12, protos, 1),
        )
        self.coef = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, instances * protos), nn.Tanh()
        )
        self.protos, self.instances = protos, instances

    def forward(self, x):
        x = self.body(x)
        proto = F.relu(self.proto(x))
        coef = self.coef(x).view(-1, self.instances, self.protos)
        return torch.sigmoid(torch.einsum("bnk,bkhw->bnhw", coef, proto))


@stranger(image(3, 16, 32), image(3, 16, 32))
class Stereo(nn.Module):
    """A volume of costs, written slice by slice, and 3-D convolutions on it."""

    def __init__(self, dim=8, disparities=4):
        super().__init__()
        self.feature = nn.Sequential(conv_bn(3, 12, 3, 2), nn.Conv2d(12, dim, 3, padding=1))
        self.disparities = disparities
        self.dres = nn.Sequential(
            nn.Conv3d(2 * dim, 12, 3, padding=1),
            nn.BatchNorm3d(12),
            nn.ReLU(),
            nn.Conv3d(12, 1, 3, padding=1),
        )
        self.register_buffer("levels", torch.arange(disparities).view(1, -1, 1, 1).double())

    def forward(self, left, right):
        l, r = self.feature(left), self.feature(right)
        b, c, h, w = l.shape
        cost = torch.zeros(b, 2 * c, self.disparities, h, w, dtype=l.dtype, device=l.device)
        for i in range(self.disparities):
            if i > 0:
                cost[:, :c, i, :, i:] = l[:, :, :, i:]
                cost[:, c:, i, :, i:] = r[:, :, :, :-i]
            else:
                cost[:, :c, i] = l
                cost[:, c:, i] = r
        prob = F.softmax(self.dres(cost).squeeze(1), dim=1)
        return torch.sum(prob * self.levels, 1, keepdim=True)


@stranger(image(3, 16, 16))
class MaxUnpooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc1, self.enc2 = conv_bn(3, 12), conv_bn(12, 20)
        self.dec2, self.dec1 = conv_bn(20, 12), nn.Conv2d(12, 2, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)

    def forward(self, x):
        x, i1 = self.pool(self.enc1(x))
        x, i2 = self.pool(self.enc2(x))
        x = self.dec2(self.unpool(x, i2))
        return self.dec1(self.unpool(x, i1))


@stranger(image(3, 32, 32))
class HighResolution(nn.Module):
    """Branches of several resolutions that exchange all with all."""

    def __init__(self):
        super().__init__()
        self.stem, self.trans = conv_bn(3, 12, 3, 2), conv_bn(12, 20, 3, 2)
        self.b0, self.b1 = conv_bn(12, 12), conv_bn(20, 20)
        self.fuse = nn.ModuleList(
            [
                nn.ModuleList([None, nn.Sequential(nn.Conv2d(20, 12, 1, bias=False), nn.BatchNorm2d(12))]),
                nn.ModuleList([conv_bn(12, 20, 3, 2, act=False), None]),
            ]
        )
        self.heat = nn.Conv2d(12 + 20, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        xs = [self.b0(x), self.b1(self.trans(x))]
        fused = []
        for i in range(2):
            y = 0
            for j in range(2):
                if i == j:
                    y = y + xs[j]
                elif j > i:
                    y = y + F.interpolate(
                        self.fuse[i][j](xs[j]),
                        size=[xs[i].shape[-2], xs[i].shape[-1]],
                        mode="bilinear",
                        align_corners=True,
                    )
                else:
                    y = y + self.fuse[i][j](xs[j])
            fused.append(F.relu(y))
        return self.heat(
            torch.cat(
                [fused[0], F.interpolate(fused[1], scale_factor=2, mode="bilinear", align_corners=True)], 1
            )
        )
