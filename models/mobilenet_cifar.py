"""MobileNet-V2 for 32x32 images: torchvision's, whose first convolution has stride 1, so that its planes are
those of 64x64 images; 2,236,682 parameters with ten classes.
"""

from torch import nn
from torchvision.models import MobileNetV2


def mobilenet_v2_cifar(classes: int = 10) -> nn.Module:
    """MobileNet-V2: images `[N, 3, 32, 32]` to logits `[N, classes]`; random weights."""
    model: nn.Module = MobileNetV2(num_classes=classes)
    first = model.get_submodule("features.0.0")
    assert isinstance(first, nn.Conv2d)
    first.stride = (1, 1)
    return model
