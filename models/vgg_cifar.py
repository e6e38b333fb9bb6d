"""VGG-16 for 32x32 images: the thirteen convolutions of Simonyan and Zisserman (ICLR 2015), each with bias,
batch normalisation and ReLU, five 2x2 max pools (down to a 1x1 map), and one of two heads:

    "two":    linear 512-512, batch normalisation, ReLU, linear 512-classes;  14,991,946 parameters
    "single": linear 512-classes;                                             14,728,266 parameters
"""

from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG-16 with batch normalisation: images `[N, 3, 32, 32]` to logits `[N, classes]`.

    Raises ValueError for a head that is not "two" or "single".
    """

    def __init__(self, head: str = "two", classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(*_features())
        self.classifier = _head(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


def _features() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for stage in STAGES:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers


def _head(head: str, classes: int) -> nn.Sequential:
    if head == "single":
        return nn.Sequential(nn.Linear(512, classes))
    if head == "two":
        return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, classes))
    raise ValueError(f"head: found {head!r}, expected 'two' or 'single'; use one of them")
