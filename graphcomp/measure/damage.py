"""How good a program still is on damaged images: blurred by motion, partly hidden, too dark or too bright.

    motion-blur    the mean of L copies shifted along a line in a random direction, L = amount * shorter side
    occlusion      a black window of the image's shape and of `amount` of its area, at a random place
    brightness     pixel values times `amount`, cut off at white

Images are damaged as pixels, before their normalisation: 0 is black, 1 is white. Where pixels are not known
(float arrays), the smallest and the largest value of the split stand for black and white. A sample is damaged
alike at every evaluation: what is random depends on the seed, the kind, and the sample's place in its source.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import Progress, quiet
from graphcomp.data import Indices, Split, as_planes, as_taken
from graphcomp.errors import DataError
from graphcomp.ir import Program
from graphcomp.measure.evaluate import score
from graphcomp.records import CorruptedScore

Kind = Literal["motion-blur", "occlusion", "brightness"]
Numbers = NDArray[np.float64]
"""Uniform in [0, 1), one row a sample."""

NUMBERS = 2
"""Random numbers that a sample gets."""


@dataclass(frozen=True)
class Corruption:
    """One kind of damage at one strength; `amount` is explained at the top of this file."""

    kind: Kind
    amount: float

    def __call__(self, images: Tensor, random: Numbers) -> Tensor:
        """Damaged copies of images `[N, C, H, W]` in [0, 1], given random numbers of shape (N, NUMBERS)."""
        return DAMAGE[self.kind](images, self.amount, torch.from_numpy(random).to(images.dtype))


def _motion_blur(images: Tensor, amount: float, random: Tensor) -> Tensor:
    height, width = images.shape[2:]
    length = max(round(amount * min(height, width)), 2)
    angle = math.pi * random[:, 0]
    x, y = ((2 * torch.arange(n, dtype=images.dtype) + 1) / n - 1 for n in (width, height))
    pixel = torch.stack([x.expand(height, width), y.view(-1, 1).expand(height, width)], 2)
    step = torch.stack([2 / width * angle.cos(), 2 / height * angle.sin()], 1).view(-1, 1, 1, 2)
    total = torch.zeros_like(images)
    for i in range(length):
        grid = pixel + (i - (length - 1) / 2) * step
        total += F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return total / length


def _occlusion(images: Tensor, amount: float, random: Tensor) -> Tensor:
    inside = []
    for size, place in zip(images.shape[2:], random.T, strict=True):
        length = max(round(size * math.sqrt(amount)), 1)
        start = (place * (size - length + 1)).floor().view(-1, 1)
        at = torch.arange(size, dtype=images.dtype)
        inside.append((at >= start) & (at < start + length))
    hidden = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return images.masked_fill(hidden.unsqueeze(1), 0.0)


def _brightness(images: Tensor, amount: float, random: Tensor) -> Tensor:
    return (images * amount).clamp(0, 1)


DAMAGE: dict[Kind, Callable[[Tensor, float, Tensor], Tensor]] = {
    "motion-blur": _motion_blur,
    "occlusion": _occlusion,
    "brightness": _brightness,
}


def require_images(split: Split, sample: Sequence[int]) -> None:
    """DataError unless there are labels to score by and samples that are images."""
    if not split.labelled:
        raise DataError("robustness: found data without labels, expected some to score by; give other --data")
    if len(sample) != 3:
        raise DataError(f"robustness: found samples of shape {tuple(sample)}, expected images (C, H, W)")


def robustness(
    program: Program,
    split: Split,
    corruptions: Sequence[Corruption],
    *,
    seed: int = 0,
    progress: Progress = quiet,
) -> list[CorruptedScore]:
    """Score a program on damaged copies of a split; collective (see `distributed`).

    Args:
        program: a network whose outputs the labels can be compared with.
        split: labelled images.
        corruptions: what is done to them, one score each.
        seed: of directions and places.
        progress: told what is scored, and which fraction is done.

    Raises:
        DataError: no labels, no images, or labels that the network has no outputs for.
    """
    require_images(split, program.example_inputs[0].shape[1:])
    scale = black_and_white(split)
    scores = []
    for i, corruption in enumerate(corruptions):
        progress(f"robustness: {corruption.kind} {corruption.amount:g}", i / len(corruptions))
        found = score(program, corrupted(split, corruption, scale, seed), shared=True)
        if found is None:
            raise DataError("robustness: found outputs that the labels say nothing of, expected a classifier")
        scores.append(CorruptedScore(corruption=corruption.kind, amount=corruption.amount, score=found))
    return scores


def black_and_white(split: Split) -> tuple[Tensor, Tensor]:
    """The values of black and of white pixels, each `[C, 1, 1]` or `[]`."""
    if split.pixels is not None:
        mean, std = split.pixels
        return -mean / std, (1 - mean) / std
    ranges = [x.aminmax() for x, _ in split.batches(1000)]
    low, high = torch.stack([r.min for r in ranges]).min(), torch.stack([r.max for r in ranges]).max()
    return low, torch.where(high > low, high, low + 1)


def corrupted(split: Split, corruption: Corruption, scale: tuple[Tensor, Tensor], seed: int) -> Split:
    """The same samples and labels with damaged images; `scale` is that of `black_and_white`."""
    black, white = scale
    state = np.random.RandomState([seed, list(DAMAGE).index(corruption.kind)])
    random = state.random_sample((int(split.indices.max()) + 1, NUMBERS))

    def fetch(indices: Indices) -> Tensor:
        pixels = (split.fetch(indices) - black) / (white - black)
        sample = tuple(pixels.shape[1:])
        damaged = corruption(as_planes(pixels, sample), random[indices])
        return as_taken(damaged, sample) * (white - black) + black

    return replace(split, fetch=fetch)
