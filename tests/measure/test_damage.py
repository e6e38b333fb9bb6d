"""Damaged images: what each kind does, that all see the same ones, and how normalised pixels are treated."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphcomp.data.sources import load_data
from graphcomp.data.split import Split
from graphcomp.errors import DataError
from graphcomp.measure.damage import (
    NUMBERS,
    Corruption,
    black_and_white,
    corrupted,
    require_images,
    robustness,
)
from graphcomp.measure.evaluate import accuracy
from tests.learnable import SHAPE, make_split, normalised_net
from tests.tiny import random_data, traced

EVERY = [Corruption("motion-blur", 0.3), Corruption("occlusion", 0.25), Corruption("brightness", 0.5)]


def random_numbers(*rows: tuple[float, float]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.array(rows)


def test_motion_blur_along_a_line() -> None:
    """A white pixel becomes a line of L, to the right and left at angle 0, up and down at pi / 2."""
    images = torch.zeros(2, 1, 9, 9)
    images[:, 0, 4, 4] = 1
    blurred = Corruption("motion-blur", 1 / 3)(images, random_numbers((0.0, 0), (0.5, 0)))
    expected = torch.zeros(2, 1, 9, 9)
    expected[0, 0, 4, 3:6] = expected[1, 0, 3:6, 4] = 1 / 3
    assert torch.allclose(blurred, expected, atol=1e-6)


def test_motion_blur_keeps_what_is_even() -> None:
    """Nothing darkens towards the border, and channels are treated alike."""
    images = torch.tensor([0.2, 0.7, 1.0]).view(1, 3, 1, 1).expand(5, 3, 8, 6)
    random = np.random.RandomState(0).random_sample((5, NUMBERS))
    assert torch.allclose(Corruption("motion-blur", 0.5)(images, random), images, atol=1e-6)


def test_occlusion_hides_a_window() -> None:
    images = torch.ones(3, 2, 8, 12)
    hidden = Corruption("occlusion", 0.25)(images, random_numbers((0, 0), (0.999, 0.999), (0.5, 0)))
    expected = images.clone()
    expected[0, :, :4, :6] = 0
    expected[1, :, 4:, 6:] = 0
    expected[2, :, 2:6, :6] = 0
    assert torch.equal(hidden, expected)


def test_brightness_is_cut_off_at_white() -> None:
    images = torch.tensor([0.0, 0.25, 0.75, 1.0]).view(1, 1, 2, 2)
    random = random_numbers((0, 0))
    assert Corruption("brightness", 0.5)(images, random).flatten().tolist() == [0, 0.125, 0.375, 0.5]
    assert Corruption("brightness", 2.0)(images, random).flatten().tolist() == [0, 0.5, 1, 1]


def bytes_file(tmp_path: Path) -> str:
    x = np.random.RandomState(0).randint(0, 256, (12, 6, 6, 3)).astype(np.uint8)
    np.savez(tmp_path / "bytes.npz", x=x, y=np.arange(12) % 2)
    return f"npz:{tmp_path / 'bytes.npz'}?mean=0.5,0.4,0.3&std=0.25,0.2,0.1"


def test_pixels_are_damaged_before_their_normalisation(tmp_path: Path) -> None:
    split = load_data(bytes_file(tmp_path), input_shape=(3, 6, 6), seed=0).eval
    ((mean, std),) = split.pixels
    darker = corrupted(split, Corruption("brightness", 0.5), black_and_white(split), 0)
    ((before,), labels), ((after,), same_labels) = next(split.batches(99)), next(darker.batches(99))
    assert torch.allclose(after * std + mean, 0.5 * (before * std + mean), atol=1e-6)
    assert torch.equal(labels, same_labels)
    covered = corrupted(split, Corruption("occlusion", 0.25), black_and_white(split), 0)
    found = next(covered.batches(99))[0][0] * std + mean
    assert int((found.abs().amax(1) < 1e-6).sum()) >= 9 * len(split)  # black, not the mean colour


def test_unknown_pixels_go_from_the_smallest_to_the_largest_value() -> None:
    split = make_split(30)
    assert split.pixels == ()
    ((black, white),) = black_and_white(split)
    x = next(split.batches(30))[0][0]
    assert (float(black), float(white)) == (float(x.min()), float(x.max()))
    dark = next(corrupted(split, Corruption("brightness", 0.25), [(black, white)], 0).batches(30))[0][0]
    assert torch.allclose(dark - black, 0.25 * (x - black), atol=1e-5)


def test_even_data_are_no_division_by_zero() -> None:
    split = Split(torch.zeros(2, dtype=torch.int64), np.arange(2), lambda i: (torch.ones(len(i), 1, 2, 2),))
    found = next(corrupted(split, EVERY[0], black_and_white(split), 0).batches(2))[0][0]
    assert torch.equal(found, torch.ones(2, 1, 2, 2))


@pytest.mark.parametrize("corruption", EVERY)
def test_a_sample_is_always_damaged_alike(corruption: Corruption) -> None:
    """Whatever the batch, and whatever part of the split is looked at; another seed is another damage."""
    split = make_split(20)
    scale = black_and_white(split)

    def images(split: Split, seed: int, size: int) -> Tensor:
        damaged = corrupted(split, corruption, scale, seed)
        return torch.cat([x for (x,), _ in damaged.batches(size)])

    whole = images(split, 0, 20)
    assert torch.allclose(images(split, 0, 3), whole, atol=1e-6)
    part = corrupted(split, corruption, scale, 0).subset(np.array([3, 11]))
    assert torch.allclose(next(part.batches(2))[0][0], whole[[3, 11]], atol=1e-6)
    if corruption.kind != "brightness":
        assert not torch.allclose(images(split, 1, 20), whole, atol=1e-3)


def test_scores() -> None:
    """One for each corruption, by the same accuracy as everywhere; the strongest damage costs most."""
    program, split = normalised_net(), make_split(40)
    found = robustness(program, split, EVERY, seed=3)
    assert [(row.corruption, row.amount) for row in found] == [(c.kind, c.amount) for c in EVERY]
    scale = black_and_white(split)
    for row, corruption in zip(found, EVERY, strict=True):
        assert row.score == accuracy(program, corrupted(split, corruption, scale, 3))
        assert row.score.measure == "accuracy"
    assert found == robustness(program, split, EVERY, seed=3)


def test_regression() -> None:
    """The mean error of a network that yields the mean of an image: brightness halves its pixels."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1))
    with torch.no_grad():
        net[2].weight.fill_(1)  # type: ignore[operator]
        net[2].bias.zero_()  # type: ignore[operator]
    x = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1  # black and white
    split = Split(x.mean((1, 2, 3)), np.arange(8), lambda i: (x[torch.from_numpy(i)],))
    (row,) = robustness(traced(net, 1, 1, 4, 4), split, [Corruption("brightness", 0.5)])
    assert row.score.measure == "error"
    assert row.score.value == pytest.approx(float(x.mean()) / 2, rel=1e-5)


def test_refusals() -> None:
    with pytest.raises(DataError, match="robustness: found data without labels"):
        require_images(random_data(*SHAPE).eval, normalised_net())
    with pytest.raises(DataError, match=r"found samples of shape \(7,\), expected images"):
        require_images(make_split(), traced(nn.Linear(7, 2), 1, 7))
    with pytest.raises(DataError, match="expected a classifier"):
        robustness(traced(nn.Conv2d(3, 4, 3), 1, *SHAPE), make_split(), EVERY)
    with pytest.raises(DataError, match="without labels"):
        robustness(normalised_net(), replace(make_split(), labelled=False), EVERY)
