"""Samples in a fixed order: splits, the data of a run, and what a hash of them is made of."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import Buffer, sha256
from graphcomp.errors import DataError
from graphcomp.ir import Batch

SPLIT_SEED = 0
LONGEST_SHOWN = 40
"""Of a name in an error, in characters."""
READ = 1000
"""Samples at a time when they are only read."""

Indices = NDArray[np.int64]
Labels = NDArray[np.int64] | NDArray[np.float32]
Fetch = Callable[[Indices], Batch]
Pixels = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """A fetch that can say what it would yield without doing so.

    Attributes:
        fetch: see `Split`.
        identify: what decides the samples at some positions, for a hash.
        pixels: see `Split`.
        held: whether the samples are in memory, where they stay what they are; files may change.
    """

    fetch: Fetch
    identify: Callable[[Indices], Iterable[Buffer]]
    pixels: tuple[Pixels | None, ...] = ()
    held: bool = True
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    def digest(self, indices: Indices) -> str:
        """sha256 of the samples at some positions; those in memory are only hashed once."""
        key = sha256([np.ascontiguousarray(indices).data])
        if key in self._digests:
            return self._digests[key]
        digest = sha256(self.identify(indices))
        if self.held:
            self._digests[key] = digest
        return digest

    def __call__(self, indices: Indices) -> Batch:
        """See `fetch`."""
        return self.fetch(indices)


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in a fixed order.

    Attributes:
        labels: int64 `[len]`, the class of every sample; float32 `[len]` or `[len, k]`, its values, for
            regression; zeros if not `labelled`.
        indices: int64 `[len]`, the position of every sample in its source.
        fetch: reads the samples at some positions of the source, as a network takes them.
        labelled: whether the labels mean anything.
    """

    labels: Tensor
    indices: Indices = field(repr=False)
    fetch: Fetch = field(repr=False)
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def regression(self) -> bool:
        """Whether the labels are values and no classes."""
        return self.labelled and self.labels.is_floating_point()

    @property
    def pixels(self) -> tuple[Pixels | None, ...]:
        """Of every input the mean and std that pixels in [0, 1] are normalised by; None for other samples.

        `[C, 1, 1]`, or `[1, 1, C]` where samples have their channels last. Empty where nothing is known.
        """
        return self.fetch.pixels if isinstance(self.fetch, Source) else ()

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Yield (inputs, labels): of every input `[n, …]`, n = `size` but for a smaller last batch.

        The order is that of the source, or shuffled by `shuffle_seed`. Raises DataError if `size` < 1, or
        if an image cannot be decoded when its batch is due.
        """
        if size < 1:
            raise DataError.at("batch size", size, "at least 1", "give a positive number")
        order = np.arange(len(self)) if shuffle_seed is None else _rng(shuffle_seed).permutation(len(self))
        chunks = (order[start : start + size] for start in range(0, len(self), size))
        return ((self.fetch(self.indices[chunk]), self.labels[torch.from_numpy(chunk)]) for chunk in chunks)

    def fingerprint(self) -> str:
        """sha256 of the samples, their order, their normalisation and their labels.

        Arrays are hashed, once; image files are known by path, size and time of change, looked up at every
        call. Where only `fetch` knows the samples, they are read, at every call: they may have changed.
        """
        if isinstance(self.fetch, Source):
            samples: Iterable[Buffer] = [bytes.fromhex(self.fetch.digest(self.indices))]
        else:
            samples = (x.contiguous().numpy().data for batch, _ in self.batches(READ) for x in batch)
        return sha256(chain([f"{self.labelled}\n".encode(), self.labels.numpy().data], samples))

    def subset(self, positions: Indices) -> "Split":
        """The samples at `positions` of this split."""
        return replace(self, labels=self.labels[torch.from_numpy(positions)], indices=self.indices[positions])

    def spread(self, samples: int) -> "Split":
        """So many samples, or all, evenly spaced: the split may be sorted by class."""
        count = min(samples, len(self))
        return self if count == len(self) else self.subset(np.arange(count) * len(self) // count)

    def hold_out(self, fraction: float) -> tuple["Split", "Split"]:
        """Two parts: most samples, and a fixed `fraction`, every class in proportion to within one sample.

        Values have no classes: there the part is drawn from all samples alike.
        """
        held = stratified(self.labels.numpy(), round(fraction * len(self)), SPLIT_SEED)
        return self.subset(np.setdiff1d(np.arange(len(self)), held)), self.subset(held)


def choose_others(outputs: int) -> str:
    """The advice where a source has none of its own."""
    return "choose data and network that belong to each other"


@dataclass(frozen=True, eq=False)
class Data:
    """Calibration and training samples (`train`), evaluation samples (`eval`) and where they came from.

    `num_classes` is None without classes, for `npz` the largest label plus one; `description` is one line;
    `advice` says what to do if there are not as many classes as a network has outputs; `names` are those that
    classes are known by, with the class's id.
    """

    train: Split
    eval: Split
    num_classes: int | None
    spec: str
    description: str
    advice: Callable[[int], str] = field(default=choose_others, repr=False)
    names: Mapping[str, int] = field(default_factory=dict, repr=False)

    @property
    def labelled(self) -> bool:
        """Whether accuracy (or the error of predicted values) can be computed."""
        return self.eval.labelled

    @property
    def regression(self) -> bool:
        """Whether the labels are values and no classes."""
        return self.eval.regression

    def require_outputs(self, outputs: int) -> None:
        """DataError unless there are as many classes as a network has outputs: scores would mean nothing."""
        if not self.labelled or self.regression or self.num_classes in (None, outputs):
            return
        raise DataError.at(
            self.spec,
            f"{self.num_classes} classes",
            f"{outputs}, the number of the network's outputs",
            self.advice(outputs),
        )

    def ids_of(self, classes: Sequence[int | str]) -> tuple[int, ...]:
        """The ids of classes that are given by id or by name.

        Raises:
            DataError: a name that the data do not have.
        """
        return tuple(c if isinstance(c, int) else self._id_of(c) for c in classes)

    def _id_of(self, name: str) -> int:
        if name in self.names:
            return self.names[name]
        near = difflib.get_close_matches(name, self.names, 3)
        raise DataError.at(
            "classes",
            f"the name {name[:LONGEST_SHOWN]!r}",
            f"one of the {len(self.names)} names of {self.spec!r}"
            if self.names
            else "ids: these data have no names",
            f"did you mean {' or '.join(near)}?" if near else "correct it, or give ids from 0",
        )

    def only(self, classes: Sequence[int]) -> "Data":
        """The samples of some classes; label i becomes that of the i-th smallest.

        Raises DataError without labels, or if a class has no samples to calibrate or to evaluate with.
        """
        if not self.labelled:
            raise DataError.at(
                "classes", f"{self.spec!r} without labels", "labelled data", "give other --data"
            )
        if self.regression:
            raise DataError.at(
                "classes", f"{self.spec!r} with values", "whole numbers as labels", "give other --data"
            )
        ids = torch.tensor(sorted(set(classes)))
        kept = {old: new for new, old in enumerate(ids.tolist())}
        named = {i: f"{name} ({i})" for name, i in self.names.items()}
        listed = ", ".join(named.get(i, str(i)) for i in kept)
        return replace(
            self,
            train=_only(self.train, ids),
            eval=_only(self.eval, ids),
            num_classes=len(ids),
            description=f"{self.description}; classes {listed} only",
            names={name: kept[i] for name, i in self.names.items() if i in kept},
        )


def _only(split: Split, ids: Tensor) -> Split:
    for label in ids.tolist():
        if not bool((split.labels == label).any()):
            raise DataError.at(
                "classes", f"no sample of class {label}", "some of every class", "choose others"
            )
    chosen = split.subset(torch.isin(split.labels, ids).nonzero().flatten().numpy())
    return replace(chosen, labels=torch.searchsorted(ids, chosen.labels))


def _rng(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


def stratified(labels: Labels, count: int, seed: int) -> Indices:
    """Positions (sorted) of `count` random samples, every class in proportion to within one sample."""
    if labels.dtype.kind == "f":
        labels = np.zeros(len(labels), np.int64)
    order = _rng(seed).permutation(len(labels))
    by_class = np.argsort(labels[order], kind="stable")
    _, starts, sizes = np.unique(labels[order][by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)
    # The k-th sample of a class of n comes at (k + 1/2) / n: any prefix of that order is in proportion.
    place = np.empty(len(labels))
    place[by_class] = (rank + 0.5) / np.repeat(sizes, sizes)
    return np.sort(order[np.argsort(place, kind="stable")[:count]])


def split_in_two(labels: Labels, fetch: Fetch, fraction: float) -> tuple[Split, Split]:
    """A fixed stratified split: `fraction` of the samples, and the others."""
    others, first = whole_split(labels, fetch).hold_out(fraction)
    return first, others


def unlabelled(split: Split) -> Split:
    """The same samples, whose labels mean nothing."""
    return replace(split, labels=torch.zeros(len(split), dtype=torch.int64), labelled=False)


def joined(sources: Sequence[Source]) -> Source:
    """One fetch of what several yield, an input each."""
    if len(sources) == 1:
        return sources[0]
    return Source(
        lambda indices: tuple(x for source in sources for x in source(indices)),
        lambda indices: (buffer for source in sources for buffer in source.identify(indices)),
        tuple(pixels for source in sources for pixels in source.pixels or (None,)),
        all(source.held for source in sources),
    )


def whole_split(labels: Labels, fetch: Fetch) -> Split:
    """All samples, in the order of their source."""
    return Split(torch.from_numpy(labels), np.arange(len(labels)), fetch)


def describe(what: str, train: Split, evaluation: Split) -> str:
    """One line about the data."""
    return f"{what}: {len(train)} for calibration and training, {len(evaluation)} for evaluation"
