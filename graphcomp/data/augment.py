"""Random changes of training images, sample by sample, on whole batches of normalised tensors.

    cifar       pad by 1/8 of the side with the mean colour, cut a random window, mirror half of the images
                (He et al. 2016, section 4.2)
    imagenet    cut a random window of 8 to 100 % of the area and 3/4 to 4/3 in shape, resize it, mirror half
                (Szegedy et al. 2015)

The arithmetic is that of torchvision.transforms.v2, whose transforms would change all images of a batch
alike. An augmentation takes its random numbers as an argument: which ones a sample gets depends on the seed,
the epoch and its place in the batch, and neither on how the batch is shared out nor on what ran before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from graphcomp.data.layout import as_planes, as_taken, in_front
from graphcomp.errors import DataError
from graphcomp.ir import Batch

Numbers = NDArray[np.float64]
"""Uniform in [0, 1), one row a sample."""

Name = Literal["none", "cifar", "imagenet", "auto"]

AUTO: dict[str, Name] = {"cifar10": "cifar", "cifar100": "cifar", "imagefolder": "imagenet"}
"""Data source -> what suits it. Others may not survive mirroring: digits, or arrays of anything at all."""

SMALL_SIDE = 64
"""Image folders with images up to this size are augmented like CIFAR."""


class Augmentation(Protocol):
    """Changes images `[N, C, H, W]`."""

    @property
    def numbers(self) -> int:
        """How many random numbers a sample needs."""
        ...

    def __call__(self, images: Tensor, random: Numbers) -> Tensor:
        """New images of the same shape, given `random` of shape (N, numbers)."""
        ...


@dataclass(frozen=True)
class Unchanged:
    """No augmentation."""

    numbers: ClassVar[int] = 0

    def __call__(self, images: Tensor, random: Numbers) -> Tensor:
        """The images themselves."""
        return images


@dataclass(frozen=True)
class CropAndFlip:
    """A window of the padded image, mirrored or not; None pads by 1/8 of the shorter side."""

    padding: int | None = None
    numbers: ClassVar[int] = 3

    def __call__(self, images: Tensor, random: Numbers) -> Tensor:
        """New images; 0, the mean colour of normalised images, beyond the border."""
        height, width = images.shape[2:]
        margin = min(height, width) // 8 if self.padding is None else self.padding
        padded = transform.pad(images, [margin])
        top, left = (torch.from_numpy((random[:, i] * (2 * margin + 1)).astype(np.int64)) for i in (0, 1))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        return _mirrored(windows[torch.arange(len(images)), :, top, left], random[:, 2])


@dataclass(frozen=True)
class ResizedCropAndFlip:
    """A window of random area and shape, resized to the size of the image, mirrored or not."""

    area: tuple[float, float] = (0.08, 1.0)
    shape: tuple[float, float] = (3 / 4, 4 / 3)
    attempts: int = 10

    @property
    def numbers(self) -> int:
        """Four for each attempt to find a window inside the image, one for the mirror."""
        return 4 * self.attempts + 1

    def __call__(self, images: Tensor, random: Numbers) -> Tensor:
        """New images."""
        height, width = images.shape[2:]
        # between whole numbers (a mask's classes) there is nothing
        how = InterpolationMode.BILINEAR if images.is_floating_point() else InterpolationMode.NEAREST
        changed = [
            transform.resized_crop(image, *self.window(height, width, row[:-1]), [height, width], how)
            for image, row in zip(images, random, strict=True)
        ]
        return _mirrored(torch.stack(changed), random[:, -1])

    def window(self, height: int, width: int, random: Numbers) -> tuple[int, int, int, int]:
        """Top, left, height and width; the largest allowed window in the middle if no attempt fits."""
        low, high = (math.log(r) for r in self.shape)
        for u in random.reshape(-1, 4):
            area = height * width * (self.area[0] + u[0] * (self.area[1] - self.area[0]))
            ratio = math.exp(low + u[1] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
        w, h = min(width, round(height * self.shape[1])), min(height, round(width / self.shape[0]))
        return (height - h) // 2, (width - w) // 2, h, w


def _mirrored(images: Tensor, random: Numbers) -> Tensor:
    chosen = torch.from_numpy(random < 0.5).view(-1, 1, 1, 1)
    return torch.where(chosen, transform.horizontal_flip(images), images)


def augmented(augmentation: Augmentation, batch: Batch, random: Numbers) -> Batch:
    """A batch whose images are changed, all inputs of a sample alike: what was registered stays so.

    Images are inputs with three dimensions a sample, wherever their channels are; others stay as they are.
    """
    if not augmentation.numbers:
        return batch

    def one(x: Tensor) -> Tensor:
        sample = tuple(x.shape[1:])
        if len(sample) != 3:
            return x
        return as_taken(augmentation(as_planes(x, sample), random), sample)

    return tuple(map(one, batch))


def find_augmentation(
    name: Name, source: str, samples: Sequence[tuple[int, ...]], padding: int | None
) -> Augmentation:
    """The augmentation called `name`.

    Args:
        name: "auto" chooses by `source`.
        source: the data spec, e.g. `cifar10:DIR?limit=100`.
        samples: shape of a sample of every input; what has no height and width stays as it is.
        padding: of "cifar".

    Raises:
        DataError: where no input takes images.
    """
    image = next((sample for sample in samples if len(sample) == 3), None)
    if name == "auto":
        kind = source.partition("?")[0].partition(":")[0]
        name = AUTO.get(kind, "none") if image is not None else "none"
        small = image is not None and max(in_front(image)[1:]) <= SMALL_SIDE
        name = "cifar" if name == "imagenet" and small else name
    if name == "none":
        return Unchanged()
    if image is None:
        raise DataError(
            f"augment={name}: found samples of shape {' and '.join(map(str, samples))}, expected images "
            "(C, H, W); use augment=none"
        )
    return CropAndFlip(padding) if name == "cifar" else ResizedCropAndFlip()
