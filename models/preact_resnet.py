"""Pre-activation ResNets of He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016), for CIFAR.

A 3x3 stem with 16 channels and three stages of n bottlenecks, 9n + 2 layers, each

    y = x + conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))))         1x1, 3x3, 1x1

with 16, 32 and 64 channels inside and four times as many outside. The first block of a stage changes the
width: there the shortcut is a 1x1 convolution, without normalisation, of the activated input.

Parameters of depth 164 (n = 18): 1,703,258 with 10 classes, 1,726,388 with 100.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.models.resnet_cifar import initialise

EXPANSION = 4


class PreActBottleneck(nn.Module):
    """Three convolutions, each behind normalisation and ReLU; `[N, inputs, H, W]` to `[N, 4 * width, …]`."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return residual(x) + shortcut(x)."""
        activated = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        y = self.conv3(F.relu(self.bn3(y)))
        return y + (x if self.shortcut is None else self.shortcut(activated))  # type: ignore[no-any-return]


class PreActResNet(nn.Module):
    """Pre-activation ResNet of `depth` = 9n + 2 layers: images `[N, 3, H, W]` to logits `[N, classes]`.

    Raises ValueError for another depth.
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        if depth < 11 or depth % 9 != 2:
            raise ValueError(f"depth: found {depth}, expected 9n + 2 with n >= 1, e.g. 20 or 164")
        blocks = (depth - 2) // 9
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(blocks, 16, 16, 1)
        self.layer2 = _stage(blocks, 64, 32, 2)
        self.layer3 = _stage(blocks, 128, 64, 2)
        self.bn = nn.BatchNorm2d(256)
        self.linear = nn.Linear(256, classes)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        y = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        y = F.adaptive_avg_pool2d(F.relu(self.bn(y)), 1)
        return self.linear(y.flatten(1))  # type: ignore[no-any-return]


def _stage(blocks: int, inputs: int, width: int, stride: int) -> nn.Sequential:
    first = PreActBottleneck(inputs, width, stride)
    return nn.Sequential(first, *(PreActBottleneck(EXPANSION * width, width, 1) for _ in range(blocks - 1)))
