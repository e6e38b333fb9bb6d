"""A DenseNet for 32x32 images: torchvision's, whose first convolution is 3x3, stride 2, without a pool."""

from torch import nn
from torchvision.models import DenseNet

GROWTH, BLOCKS, STEM, BOTTLENECK = 32, (4, 6, 8), 32, 2
"""Channels that a layer adds, layers a block, channels of the first convolution, and of the 1x1 convolutions
for each channel that a layer adds."""


def densenet_cifar(classes: int = 10) -> nn.Module:
    """Eighteen layers of 32 channels: images `[N, 3, 32, 32]` to logits `[N, classes]`; random weights."""
    model: nn.Module = DenseNet(GROWTH, BLOCKS, STEM, BOTTLENECK, num_classes=classes)
    features = model.get_submodule("features")
    features.conv0 = nn.Conv2d(3, STEM, 3, stride=2, padding=1, bias=False)
    features.pool0 = nn.Identity()
    return model
