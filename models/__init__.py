"""The networks of the papers, by name: `MODELS`. On the command line: `models:NAME`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torchvision.models import resnet50

from graphcomp.models.densenet_cifar import densenet_cifar
from graphcomp.models.mobilenet_cifar import mobilenet_v2_cifar
from graphcomp.models.preact_resnet import PreActResNet
from graphcomp.models.quick import QuickNet
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.models.simple_cnn import SimpleCNN
from graphcomp.models.vgg_cifar import VGG16

__all__ = ["MODELS", "ModelSpec"]


@dataclass(frozen=True)
class ModelSpec:
    """How to build one network, the shape of one sample (C, H, W), and what comes with it."""

    factory: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    weights: Path | None = None
    data: str | None = None


def _cifar(family: Callable[..., nn.Module], *args: object) -> ModelSpec:
    return ModelSpec(functools.partial(family, *args), (3, 32, 32))


MODELS: dict[str, ModelSpec] = {
    "resnet20": _cifar(ResNet, 20, "A"),
    "resnet32": _cifar(ResNet, 32, "A"),
    "resnet44": _cifar(ResNet, 44, "A"),
    "resnet56": _cifar(ResNet, 56, "A"),
    "resnet110": _cifar(ResNet, 110, "A"),
    "resnet20-b": _cifar(ResNet, 20, "B"),
    "resnet32-b": _cifar(ResNet, 32, "B"),
    "resnet44-b": _cifar(ResNet, 44, "B"),
    "resnet56-b": _cifar(ResNet, 56, "B"),
    "resnet110-b": _cifar(ResNet, 110, "B"),
    "resnet56-cifar100": _cifar(ResNet, 56, "A", 100),
    "preact-resnet164": _cifar(PreActResNet, 164),
    "preact-resnet164-cifar100": _cifar(PreActResNet, 164, 100),
    "vgg16-cifar": _cifar(VGG16, "two"),
    "vgg16-cifar-single": _cifar(VGG16, "single"),
    "vgg16-cifar100": _cifar(VGG16, "two", 100),
    "simple-cnn": _cifar(SimpleCNN),
    "simple-cnn-cifar100": _cifar(SimpleCNN, 100),
    "mobilenet-v2-cifar": _cifar(mobilenet_v2_cifar),
    "densenet-cifar": _cifar(densenet_cifar),
    "quick": _cifar(QuickNet),
    "quick-pose": _cifar(QuickNet, 3),
    "resnet50-pose": ModelSpec(functools.partial(resnet50, num_classes=3), (3, 224, 224)),
    "resnet20-digits": ModelSpec(
        functools.partial(ResNet, 20, "A"),
        (3, 32, 32),
        weights=Path(__file__).parent / "resnet20_digits.safetensors",
        data="digits",
    ),
}
