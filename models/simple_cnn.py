"""SimpleCNN of PFA (Suau et al. 2020, appendix C.1): nine convolutions, no linear layer.

    3 x conv 96 3x3, dropout, 3 x conv 192 3x3, dropout, conv 192 3x3, conv 192 1x1, conv classes 1x1, mean

Each convolution has a bias, batch normalisation and ReLU behind it, the last one too. The paper does not say
where the map is halved: here by the third and the sixth layer, as in the network that it is a form of
("All-CNN-C", Springenberg et al. 2015). 1,372,254 parameters with 10 classes, 1,389,804 with 100.
"""

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((96, 96, 96), (192, 192, 192))


class SimpleCNN(nn.Module):
    """Images `[N, 3, H, W]` to logits `[N, classes]`; `dropout` of a stage's values are zero in training."""

    def __init__(self, classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in STAGES:
            for place, width in enumerate(widths):
                layers += _block(channels, width, 3, stride=2 if place == len(widths) - 1 else 1)
                channels = width
            layers.append(nn.Dropout(dropout))
        layers += [*_block(channels, 192, 3), *_block(192, 192, 1), *_block(192, classes, 1)]
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)


def _block(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
