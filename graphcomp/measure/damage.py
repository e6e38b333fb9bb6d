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
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import Progress, quiet
from graphcomp.data import Indices, Pixels, Split, as_planes, as_taken
from graphcomp.errors import DataError
from graphcomp.ir import Batch, Program
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


def require_images(split: Split, program: Program) -> None:
    """DataError unless there are labels to score by and an input that takes images."""
    if not split.labelled:
        raise DataError("robustness: found data without labels, expected some to score by; give other --data")
    samples = [tuple(x.shape[1:]) for x in program.example_inputs]
    if all(len(sample) != 3 for sample in samples):
        found = " and ".join(map(str, samples))
        raise DataError(f"robustness: found samples of shape {found}, expected images (C, H, W)")


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
        split: labelled samples. All of their inputs that are images are damaged, alike; others stay.
        corruptions: what is done to them, one score each.
        seed: of directions and places.
        progress: told what is scored, and which fraction is done.

    Raises:
        DataError: no labels, no images, or labels that the network has no outputs for.
    """
    require_images(split, program)
    scales = black_and_white(split)
    scores = []
    for i, corruption in enumerate(corruptions):
        progress(f"robustness: {corruption.kind} {corruption.amount:g}", i / len(corruptions))
        found = score(program, corrupted(split, corruption, scales, seed), shared=True)
        if found is None:
            raise DataError("robustness: found outputs that the labels say nothing of, expected a classifier")
        scores.append(CorruptedScore(corruption=corruption.kind, amount=corruption.amount, score=found))
    return scores


def black_and_white(split: Split) -> list[Pixels]:
    """The values of black and of white pixels of every input, each `[C, 1, 1]` or `[]`."""
    seen = None if split.pixels and all(split.pixels) else _extremes(split)
    count = len(seen or split.pixels)
    known = split.pixels or (None,) * count
    return [_ends(of, None if seen is None else seen[i]) for i, of in enumerate(known)]


def _extremes(split: Split) -> list[Pixels]:
    """The smallest and the largest value of every input."""

    def ends(x: Tensor) -> Any:
        return (x if x.is_floating_point() else x.float()).aminmax()

    columns = zip(*(map(ends, batch) for batch, _ in split.batches(1000)), strict=True)
    return [(torch.stack([r.min for r in c]).min(), torch.stack([r.max for r in c]).max()) for c in columns]


def _ends(pixels: Pixels | None, seen: Pixels | None) -> Pixels:
    if pixels is not None:
        mean, std = pixels
        return -mean / std, (1 - mean) / std
    low, high = cast(Pixels, seen)
    return low, torch.where(high > low, high, low + 1)


def corrupted(split: Split, corruption: Corruption, scales: Sequence[Pixels], seed: int) -> Split:
    """The same samples and labels with damaged images; `scales` are those of `black_and_white`."""
    state = np.random.RandomState([seed, list(DAMAGE).index(corruption.kind)])
    random = state.random_sample((int(split.indices.max()) + 1, NUMBERS))

    def fetch(indices: Indices) -> Batch:
        inputs = zip(split.fetch(indices), scales, strict=True)
        return tuple(damaged(x, *scale, random[indices]) for x, scale in inputs)

    def damaged(images: Tensor, black: Tensor, white: Tensor, random: Numbers) -> Tensor:
        if images.ndim != 4 or not images.is_floating_point():
            return images
        pixels = (images - black) / (white - black)
        sample = tuple(pixels.shape[1:])
        return as_taken(corruption(as_planes(pixels, sample), random), sample) * (white - black) + black

    return replace(split, fetch=fetch)
