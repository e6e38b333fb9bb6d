"""Augmentation: every sample by itself, against windows cut by hand and torchvision's own arithmetic."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from graphcomp.data.augment import CropAndFlip, ResizedCropAndFlip, Unchanged, find_augmentation
from graphcomp.errors import DataError


def images(n: int = 6, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn((n, 3, height, width), generator=torch.Generator().manual_seed(0))


def test_cifar_cuts_windows_of_the_padded_image() -> None:
    """Padding 4 at 32 pixels (He et al. 2016): 9 x 9 windows, mirrored or not."""
    x = images()
    random = np.array([[k / 9 + 0.01, (8 - k) / 9 + 0.01, k % 2] for k in range(6)], dtype=float)
    found = CropAndFlip()(x, random)
    padded = F.pad(x, (4, 4, 4, 4))
    for k, image in enumerate(found):
        window = padded[k, :, k : k + 32, 8 - k : 40 - k]
        assert torch.equal(image, window.flip(2) if k % 2 == 0 else window)


def test_cifar_margins_are_reached_and_not_left() -> None:
    x = torch.ones(2, 1, 16, 16)
    corner = CropAndFlip(8)(x, np.array([[0.0, 0.0, 0.9], [1 - 1e-12] * 2 + [0.9]]))
    assert corner[0, 0].sum() == 64 and corner[0, 0, 8:, 8:].all()
    assert corner[1, 0].sum() == 64 and corner[1, 0, :8, :8].all()


def test_cifar_padding_zero_only_mirrors() -> None:
    x = images()
    assert torch.equal(CropAndFlip(0)(x, np.full((6, 3), 0.7)), x)
    assert torch.equal(CropAndFlip(0)(x, np.full((6, 3), 0.2)), x.flip(3))


def test_imagenet_window_is_resized_as_torchvision_does() -> None:
    x, augment = images(4, 48, 40), ResizedCropAndFlip()
    random = np.random.RandomState(0).random_sample((4, augment.numbers))
    found = augment(x, random)
    assert found.shape == x.shape
    for k in range(4):
        top, left, height, width = augment.window(48, 40, random[k, :-1])
        cut = x[k, :, top : top + height, left : left + width]
        expected = v2.functional.resize(cut, [48, 40], antialias=True)
        expected = expected.flip(2) if random[k, -1] < 0.5 else expected
        assert torch.allclose(found[k], expected, atol=1e-6)


def test_imagenet_windows_have_the_asked_area_and_shape() -> None:
    augment = ResizedCropAndFlip()
    random = np.random.RandomState(1).random_sample((2000, augment.numbers - 1))
    windows = np.array([augment.window(224, 224, row) for row in random])
    top, left, height, width = windows.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 224).all() and (left + width <= 224).all()
    area = height * width / 224**2
    assert 0.075 < area.min() < 0.1 and area.max() > 0.9
    assert abs(area.mean() - 0.5) < 0.05  # large ones with an extreme shape do not fit
    assert (width / height).min() > 0.73 and (width / height).max() < 1.37


def test_imagenet_falls_back_to_the_middle() -> None:
    """No window of at least 99 % fits into a strip: the largest allowed shape, in the middle."""
    augment = ResizedCropAndFlip(area=(0.99, 1.0))
    random = np.zeros(augment.numbers - 1)
    assert augment.window(10, 100, random) == (0, 43, 10, 13)
    assert augment.window(100, 10, random) == (43, 0, 13, 10)


def test_what_a_sample_gets_does_not_depend_on_the_others() -> None:
    x = images(6)
    for augment in (CropAndFlip(), ResizedCropAndFlip()):
        random = np.random.RandomState(2).random_sample((6, augment.numbers))
        parts = [augment(x[i : i + 2], random[i : i + 2]) for i in (0, 2, 4)]
        assert torch.equal(augment(x, random), torch.cat(parts))


@pytest.mark.parametrize(
    ("source", "sample", "expected"),
    [
        ("cifar10:DIR?limit=5", (3, 32, 32), CropAndFlip()),
        ("imagefolder:DIR", (3, 224, 224), ResizedCropAndFlip()),
        ("imagefolder:DIR", (3, 32, 32), CropAndFlip()),
        ("digits", (3, 32, 32), Unchanged()),  # a mirrored 2 is no digit
        ("npz:FILE", (3, 32, 32), Unchanged()),
        ("npz:FILE", (7,), Unchanged()),
    ],
)
def test_auto(source: str, sample: tuple[int, ...], expected: object) -> None:
    assert find_augmentation("auto", source, [sample], None) == expected


def test_by_name() -> None:
    assert find_augmentation("cifar", "digits", [(3, 32, 32)], 8) == CropAndFlip(8)
    assert find_augmentation("imagenet", "digits", [(3, 32, 32)], None) == ResizedCropAndFlip()
    assert find_augmentation("none", "cifar10:D", [(3, 32, 32)], None) == Unchanged()
    with pytest.raises(DataError, match=r"augment=cifar: found samples of shape \(7,\)"):
        find_augmentation("cifar", "npz:F", [(7,)], None)


def test_unchanged() -> None:
    x = images()
    assert Unchanged()(x, np.empty((6, 0))) is x
