"""CIFAR ResNets of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2.

A 3x3 stem and three stages of n blocks of two 3x3 convolutions with 16, 32 and 64 channels: 6n + 2 layers.
The first block of stages 2 and 3 halves the map and doubles the channels. Its shortcut is

    option "A": take every second pixel, then put half of the new channels, all zero, on each side;
    option "B": a 1x1 convolution of stride 2 with batch normalisation.

Parameters with 10 classes: 269,722 (depth 20, A) ... 853,018 (depth 56, A); option B adds 2,752.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PaddedShortcut(nn.Module):
    """Option A: `[N, C, H, W]` to `[N, C + 2 * padding, ceil(H / 2), ceil(W / 2)]`, without parameters."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Slice the map, then pad the channels with zeros on both sides."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""

    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, option)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual(x) + shortcut(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int, option: str) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Sequential()  # the identity, and no node in a trace
    if option == "A":
        return PaddedShortcut((outputs - inputs) // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """CIFAR ResNet of `depth` = 6n + 2 layers: images `[N, 3, H, W]` to logits `[N, classes]`.

    Raises ValueError for another depth, or for an option that is not "A" or "B".
    """

    def __init__(self, depth: int, option: str = "A", classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: found {depth}, expected 6n + 2 with n >= 1; use 20, 32, 44, 56 or 110")
        if option not in ("A", "B"):
            raise ValueError(
                f"option: found {option!r}, expected 'A' (padded) or 'B' (projected); use one of them"
            )
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, 1, option)
        self.layer2 = _stage(blocks, 16, 32, 2, option)
        self.layer3 = _stage(blocks, 32, 64, 2, option)
        self.linear = nn.Linear(64, classes)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(F.adaptive_avg_pool2d(y, 1).flatten(1))  # type: ignore[no-any-return]


def _stage(blocks: int, inputs: int, outputs: int, stride: int, option: str) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, option)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, option) for _ in range(blocks - 1)))


def initialise(module: nn.Module) -> None:
    """Kaiming's normal weights (He et al. 2015) for a convolution or linear layer."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
