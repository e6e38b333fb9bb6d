"""Samples from Python: whatever has `len(...)` and `[i]`, as datasets of torch and lists have.

A sample is one of

    x                       or  (x, label)                  of a network with one input
    (a, b)                  or  (a, b, label)               a tensor an input, in the order of its inputs
    ((a, b), label)
    {"left": a, "right": b} or  ({...}, label)              by name, as `graphcomp inspect` shows them
    {"left": a, "right": b, "label": 3}

without the batch. Labels are whole numbers (classes), or numbers or vectors of floats (values to predict).

Every sample is read once when the data are opened: for its label, its shape, and a hash by which work on it
is recognised. After that the same index has to yield the same sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from graphcomp.base import Buffer, sha256
from graphcomp.data.arrays import class_ids, require_numbers, values
from graphcomp.data.npz import class_count
from graphcomp.data.request import Request, Slot, sizes
from graphcomp.data.split import (
    Data,
    Indices,
    Labels,
    Source,
    Split,
    describe,
    split_in_two,
    unlabelled,
    whole_split,
)
from graphcomp.errors import DataError, first_line
from graphcomp.ir import Batch

TRAIN, EVAL = "train", "eval"
LABELS = "label", "labels", "y", "target", "targets"
"""Keys of a label beside inputs by name; one that no input is called."""


@runtime_checkable
class Dataset(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def load_dataset(given: Any, request: Request) -> Data:
    """A dataset, halved, or `{"train": dataset, "eval": dataset}`, as data for a network.

    Raises:
        DataError: naming the sample and the input that does not fit.
    """
    if isinstance(given, Mapping):
        if set(given) != {TRAIN, EVAL}:
            raise DataError.at(
                request.spec, f"datasets {', '.join(map(str, given))}", f"{TRAIN} and {EVAL}", "give both"
            )
        train, evaluation = (_whole(given[part], request, f"{request.where}[{part}]") for part in given)
        train, evaluation = (train, evaluation) if next(iter(given)) == TRAIN else (evaluation, train)
        what = "a dataset with its own test set"
    else:
        whole = _whole(given, request, request.where)
        halves = split_in_two(whole.labels.numpy(), whole.fetch, 0.5)
        train, evaluation = halves if whole.labelled else map(unlabelled, halves)
        what = "a dataset, fixed stratified split into halves"
    if (train.regression, train.labelled) != (evaluation.regression, evaluation.labelled):
        raise DataError.at(
            request.where, "labels of another kind in one set than in the other", "one kind", "convert them"
        )
    classes = class_count(request, train, evaluation)
    what = describe(f"{request.where}, {what}", train, evaluation)
    return Data(train, evaluation, classes, request.spec, what if train.labelled else f"{what}, no labels")


def _whole(dataset: Any, request: Request, place: str) -> Split:
    if not isinstance(dataset, Dataset):
        raise DataError.at(
            place,
            f"a {type(dataset).__name__}",
            "samples with len(...) and [i], as a torch.utils.data.Dataset has them",
            "give the dataset of a DataLoader, or list(...) of what is iterated over",
        )
    reader = _Reader(dataset, request.inputs, place)
    seen = [reader.known(i) for i in range(len(dataset))]
    digests, labels = [digest for digest, _ in seen], [label for _, label in seen]
    source = Source(reader, lambda indices: _chosen(digests, indices))
    if all(label is None for label in labels):
        return unlabelled(whole_split(np.zeros(len(seen), np.int64), source))
    return whole_split(_labels(labels, place), source)


def _chosen(digests: Sequence[bytes], indices: Indices) -> Iterator[Buffer]:
    yield from (digests[i] for i in indices.tolist())


def _labels(given: Sequence[Any], place: str) -> Labels:
    """Classes or values of all samples."""
    where = f"{place}: labels"
    try:
        found = np.stack([np.asarray(label) for label in given])
    except (ValueError, TypeError) as error:
        raise DataError.at(where, first_line(error), "one kind for all samples", "correct them") from error
    if found.dtype.kind == "f":
        return values(where, found, found.shape[:1])
    return class_ids(where, found, found.shape[:1])


class _Reader:
    """Fetches samples of a dataset as a network takes them."""

    def __init__(self, dataset: Dataset, slots: Sequence[Slot], place: str) -> None:
        self.dataset, self.slots, self.place = dataset, slots, place

    def __call__(self, indices: Indices) -> Batch:
        """See `Fetch`."""
        samples = [self.read(i)[0] for i in indices.tolist()]
        if not samples:
            return tuple(torch.empty(0, *slot.shape, dtype=slot.dtype) for slot in self.slots)
        return tuple(torch.stack(list(tensors)) for tensors in zip(*samples, strict=True))

    def known(self, index: int) -> tuple[bytes, Any]:
        """A sample's hash, and its label; None if it has none."""
        inputs, label = self.read(index)
        buffers: list[Buffer] = []
        for slot, x in zip(self.slots, inputs, strict=True):
            if bad := int((~torch.isfinite(x)).sum()):
                where = f"{self.place}[{index}]: {slot.name}"
                raise DataError.at(where, f"{bad} NaN or infinite values", "finite ones", "clean the data")
            buffers += [f"{x.dtype} {tuple(x.shape)}\n".encode(), x.contiguous().numpy().data]
        return bytes.fromhex(sha256(buffers)), label

    def read(self, index: int) -> tuple[Batch, Any]:
        """The inputs of a sample, and its label."""
        place = f"{self.place}[{index}]"
        try:
            sample = self.dataset[index]
        except Exception as error:  # the user's own code can raise anything at all
            raise DataError.at(
                place, f"{type(error).__name__}: {first_line(error)}", "a sample", "correct the dataset"
            ) from error
        given, label = self.parts(place, sample)
        return tuple(_tensor(place, slot, x) for slot, x in zip(self.slots, given, strict=True)), label

    def parts(self, place: str, sample: Any) -> tuple[list[Any], Any]:
        """What a sample has for each input, and its label, as the module's text says."""
        label = None
        if isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[0], _HOLDERS):
            sample, label = sample
        if isinstance(sample, Mapping):
            return self._by_name(place, sample, label)
        items = list(sample) if isinstance(sample, tuple | list) else [sample]
        if len(items) == len(self.slots) + 1 and label is None:
            *items, label = items
        if len(items) != len(self.slots):
            raise DataError.at(
                place,
                f"{len(items)} tensor(s)",
                f"one for each of {', '.join(map(str, self.slots))}, and a label if there is one",
                "yield (inputs, label), with inputs a tuple or a dict by name",
            )
        return items, label

    def _by_name(self, place: str, sample: Mapping[Any, Any], label: Any) -> tuple[list[Any], Any]:
        names = [slot.name for slot in self.slots]
        others = [key for key in sample if key not in names]
        if label is None and len(others) == 1 and others[0] in LABELS:
            label, others = sample[others[0]], []
        if others or not all(name in sample for name in names):
            raise DataError.at(
                place, f"{', '.join(map(str, sample))}", ", ".join(map(str, self.slots)), "yield these names"
            )
        return [sample[name] for name in names], label


_HOLDERS = (tuple, list, Mapping)


def _tensor(place: str, slot: Slot, value: Any) -> Tensor:
    """What a sample has for an input, in the input's type."""
    where, advice = f"{place}: {slot.name}", "convert it in the dataset"
    try:
        x = torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
    except Exception as error:  # whatever a class of the user's own raises
        expected = f"a tensor of {sizes(slot.shape)}"
        raise DataError.at(where, f"a {type(value).__name__}", expected, advice) from error
    if kind_of(x.dtype) != kind_of(slot.dtype) or tuple(x.shape) != slot.shape:
        found, expected = (
            f"{dtype} of {sizes(tuple(shape)) or 'no dimensions'}"
            for dtype, shape in ((x.dtype, x.shape), (slot.dtype, slot.shape))
        )
        raise DataError.at(where, found, f"{expected} as the model takes it, without the batch", advice)
    if kind_of(slot.dtype) == "whole" and x.numel():
        require_numbers(where, int(x.min()), int(x.max()), slot)
    return x.detach().cpu().to(slot.dtype)


def kind_of(dtype: torch.dtype) -> str:
    """What is not converted into each other."""
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "whole"
