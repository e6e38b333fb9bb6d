"""Networks of two inputs, and the same data for them from files, from Python, and without labels."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.ir import trace
from graphcomp.ir.program import Program
from tests.learnable import CLASSES, SHAPE, arrays

NUMBERS = 5
"""Of the second input."""

TRAIN, EVAL = 96, 48


class Fused(nn.Module):
    """An image and a vector of numbers; `share`: how much of the vector counts."""

    def __init__(self, share: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.share = share
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.numbers = nn.Sequential(nn.Linear(NUMBERS, 12), nn.ReLU(), nn.Linear(12, 108))
        self.head = nn.Sequential(nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.to(dtype)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        x = self.second(self.first(image)) + self.share * self.numbers(numbers)
        return cast(Tensor, self.head(x))


class Alone(Fused):
    """The same without its second input."""

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        return cast(Tensor, self.head(self.second(self.first(image))))


class Tokens(nn.Module):
    """Numbers of words, and a mask of those that count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.words = nn.Embedding(20, 12)
        self.inner = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.inner(self.words(tokens)) * mask.unsqueeze(-1)
        return cast(Tensor, self.head(x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)))


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *SHAPE, generator=generator), torch.randn(1, NUMBERS, generator=generator)


def fused(share: float = 1.0) -> Program:
    return trace(Fused(share), examples())


def alone() -> Program:
    return trace(Alone(), examples()[0])


def tokens() -> Program:
    return trace(Tokens(), (torch.ones(1, 6, dtype=torch.int64), torch.ones(1, 6)))


def samples() -> dict[str, dict[str, Any]]:
    """Images, numbers and labels of both sets."""
    found = {}
    for part, count, seed in (("train", TRAIN, 0), ("eval", EVAL, 1)):
        images, labels = arrays(count, seed)
        numbers = np.random.RandomState(seed).standard_normal((count, NUMBERS)).astype(np.float32)
        numbers[:, 0] += labels
        found[part] = {"image": images, "numbers": numbers, "y": labels}
    return found


def archive(folder: Path, *, labelled: bool = True) -> str:
    """Both sets in a file, as a spec."""
    suffix = {"train": "_train", "eval": "_test"}
    kept = {
        f"{name}{suffix[part]}": array
        for part, given in samples().items()
        for name, array in given.items()
        if labelled or name != "y"
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "two.npz", **kept)
    return f"npz:{folder / 'two.npz'}"


def listed(kind: str) -> dict[str, list[Any]]:
    """Both sets as samples in Python: `order`, `name` or `unlabelled`."""
    found: dict[str, list[Any]] = {}
    for part, given in samples().items():
        rows = zip(given["image"], given["numbers"], given["y"].tolist(), strict=True)
        made = {
            "order": lambda image, numbers, y: ((image, numbers), y),
            "name": lambda image, numbers, y: ({"numbers": numbers, "image": image}, y),
            "unlabelled": lambda image, numbers, y: (image, numbers),
        }[kind]
        found[part] = [made(*row) for row in rows]
    return found


def two_input_data(folder: Path, kind: str, program: Program) -> Data:
    """Of one kind: file, file without labels, order, name, unlabelled, random."""
    if kind == "random":
        return load_data("random?limit=64", program=program, seed=0)
    if kind.startswith("file"):
        return load_data(archive(folder, labelled=kind == "file"), program=program, seed=0)
    return load_data(listed(kind), program=program, seed=0)
