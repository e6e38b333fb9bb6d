"""What a training sees at every step: a function of the seed and of the step's number, and of nothing else.

So a training that was interrupted needs no state of a sampler or of random numbers to go on where it was, and
several processes that share a batch see what one would see.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import distributed
from graphcomp.data import Augmentation, Split, augmented
from graphcomp.ir import Batch

T = TypeVar("T")

ORDER, CHANGE, NOISE = range(3)
"""What random numbers are for; streams of the same seed for different purposes have nothing in common."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Samples that go through the network together.

    Attributes:
        inputs: `[n, …]` each, augmented.
        labels: int64 `[n]`.
        share: n / samples of the step; over all pieces of all processes these add up to 1.
    """

    inputs: Batch
    labels: Tensor
    share: float


class Batches:
    """An epoch's samples in a new random order, cut into steps whose sizes differ by at most one.

    So every sample is seen once an epoch, and no step is so small that normalisations suffer from it.

    Args:
        split: the samples.
        batch: samples a step at most, over all pieces and processes.
        pieces: into which each process cuts its part of a step.
        augmentation: of the inputs that are images.
        seed: of order and augmentation.
    """

    def __init__(self, split: Split, batch: int, pieces: int, augmentation: Augmentation, seed: int) -> None:
        self.split, self.pieces, self.augmentation, self.seed = split, pieces, augmentation, seed
        self.per_epoch = math.ceil(len(split) / batch)
        self.order = lru_cache(maxsize=2)(self._order)  # a GPU's batches are read ahead, into the next epoch

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return random_state(self.seed, ORDER, epoch).permutation(len(self.split))

    def rows(self, step: int) -> NDArray[np.int64]:
        """Positions in the split of all samples of a step, of all processes."""
        epoch, index = divmod(step, self.per_epoch)
        order = self.order(epoch)
        return order[part(len(order), self.per_epoch, index)]

    def __call__(self, step: int) -> list[Piece]:
        """This process's pieces of a step."""
        rows = self.rows(step)
        random = random_state(self.seed, CHANGE, step).random_sample((len(rows), self.augmentation.numbers))
        rank, world = distributed.rank(), distributed.world_size()
        mine = [part(len(rows), self.pieces * world, i * world + rank) for i in range(self.pieces)]
        return [self._piece(rows[p], random[p], len(rows)) for p in mine]

    def _piece(self, rows: NDArray[np.int64], random: NDArray[np.float64], total: int) -> Piece:
        inputs = self.split.fetch(self.split.indices[rows])
        labels = self.split.labels[torch.from_numpy(rows)]
        return Piece(augmented(self.augmentation, inputs, random), labels, len(rows) / total)


def part(count: int, parts: int, index: int) -> slice:
    """The `index`-th of `parts` parts of `count` things, whose sizes differ by at most one."""
    return slice(index * count // parts, (index + 1) * count // parts)


def random_state(*key: int) -> np.random.RandomState:
    """A stream of its own for every key."""
    return np.random.RandomState(list(key))


def noise_seed(seed: int, step: int) -> int:
    """Seed of what the network itself draws in a step (dropout), different in every process."""
    return int(random_state(seed, NOISE, step, distributed.rank()).randint(2**31 - 1))


def ahead(make: Callable[[int], T], steps: Iterable[int], *, threaded: bool) -> Iterator[T]:
    """`make(step)` for every step; if `threaded`, made in the background while the one before is used.

    That helps where the network runs on a GPU. On a CPU both would share the same cores: measured, no gain.
    """
    if not threaded:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[T] | None = None
        for future in chain((pool.submit(make, step) for step in steps), [None]):
            if waiting is not None:
                yield waiting.result()
            waiting = future
