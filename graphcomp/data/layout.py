"""Where the channels of images are: in front, as torch has them, or last, as TensorFlow's files have them."""

from torch import Tensor

COLOURS = (1, 3)


def is_channels_last(sample: tuple[int, ...]) -> bool:
    """Whether a sample of this shape is an image (H, W, C), and cannot be one (C, H, W)."""
    return len(sample) == 3 and sample[2] in COLOURS and sample[0] not in COLOURS


def in_front(sample: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an image, (C, H, W), whichever way it is taken; other shapes as they are."""
    return (sample[2], *sample[:2]) if is_channels_last(sample) else sample


def as_taken(images: Tensor, sample: tuple[int, ...]) -> Tensor:
    """Images `[N, C, H, W]`, or numbers `[C, 1, 1]`, as a network takes them that takes such samples."""
    return images.movedim(-3, -1).contiguous() if is_channels_last(sample) else images


def as_planes(images: Tensor, sample: tuple[int, ...]) -> Tensor:
    """The way back."""
    return images.movedim(-1, -3) if is_channels_last(sample) else images
