"""A problem that a small network learns in a second: four classes of images, a pattern each and noise."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from graphcomp.data.split import Data, Split
from graphcomp.ir.program import Program
from tests.tiny import traced

CLASSES, SHAPE = 4, (3, 8, 8)


def arrays(samples: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images and labels."""
    patterns = np.random.RandomState(123).standard_normal((CLASSES, *SHAPE))
    rng = np.random.RandomState(seed)
    labels = rng.permutation(np.arange(samples) % CLASSES)
    return (patterns[labels] + rng.standard_normal((samples, *SHAPE))).astype(np.float32), labels


def make_split(samples: int = 96, seed: int = 0) -> Split:
    images, labels = arrays(samples, seed)
    x = torch.from_numpy(images)
    return Split(torch.from_numpy(labels), np.arange(samples), lambda i: (x[torch.from_numpy(i)],))


def make_data(samples: int = 120) -> Data:
    return Data(make_split(samples), make_split(60, seed=1), CLASSES, "learnable", "four patterns")


def exact(split: Split) -> Split:
    """The same samples in float64."""
    return replace(split, fetch=lambda i: (split.fetch(i)[0].double(),))


def exact_data() -> Data:
    """In float64, where only the order of sums tells several processes from one."""
    data = make_data()
    return replace(data, train=exact(data.train), eval=exact(data.eval))


def plain_net(dtype: torch.dtype = torch.float32) -> Program:
    """Without normalisation: what a batch does is the sum of what its samples do."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, CLASSES),
    )  # fmt: skip
    return traced(net, 1, *SHAPE).to(dtype)


def normalised_net(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Program:
    """With normalisations, and dropout if asked for."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, CLASSES),
    )  # fmt: skip
    return traced(net, 1, *SHAPE).to(dtype)


def weights(program: Program) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in program.tensors.items()}


def same(a: Program, b: Program) -> bool:
    """Equal to the last bit."""
    return all(torch.equal(x, b.tensors[n]) for n, x in a.tensors.items()) and len(a.tensors) == len(
        b.tensors
    )


def gap(a: Program, b: Program) -> float:
    """The largest difference of two tensors relative to the largest value of the tensor."""
    pairs = [(x.detach().double(), b.tensors[n].detach().double()) for n, x in a.tensors.items()]
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) for x, y in pairs)
