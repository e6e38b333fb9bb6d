"""How good a program is: accuracy or mean error with its interval, and drift between two programs."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import distributed
from graphcomp.data import Data, Split
from graphcomp.errors import DataError
from graphcomp.ir import Batch, Program, input_names, output_tensors
from graphcomp.measure.calibrate import batch_size
from graphcomp.records import Drift, Interval, Score

BATCH = 250
FEW = 5
"""Of top-5."""
NORMAL_95 = 1.959964
"""Standard deviations on each side of the mean that hold 95 % of a normal distribution."""


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 %."""
    if total == 0:
        return 0.0, 1.0
    p, z = correct / total, NORMAL_95
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Interval:
    """How many more of the same samples `after` gets right, as a share, with its 95 % interval.

    Only samples that one of them alone gets right tell: two accuracies with an interval each know nothing of
    that. Adjusted Wald interval of Bonett and Price (2012), which has a width even where none differs.

    Args:
        before, after: whether each sample is right, of one length, at least 1.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise DataError.at(
            "samples",
            f"{before.shape} and {after.shape}",
            "as many of both, at least 1",
            "judge the same samples",
        )
    won, lost, n = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    p, q = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = NORMAL_95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval(value=(won - lost) / n, low=max(-1.0, p - q - half), high=min(1.0, p - q + half))


def is_classifier(program: Program) -> bool:
    """Whether the program yields one tensor (batch, classes)."""
    value = program.output
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] > 1


def count_outputs(program: Program) -> int | None:
    """How many classes a program knows; None if it is no classifier."""
    return int(program.output.shape[1]) if is_classifier(program) else None


def require_classes(program: Program, data: Data) -> None:
    """DataError if a classifier has not one output for each class of the data."""
    outputs = count_outputs(program)
    if outputs is not None:
        data.require_outputs(outputs)


def require_inputs(program: Program, data: Data) -> None:
    """DataError unless samples have a tensor of the right kind for every input of a program."""
    names = input_names(program)
    (batch, _) = next(data.train.batches(1))
    if len(batch) != len(names):
        raise DataError.at(
            data.spec,
            f"{len(batch)} tensor(s) a sample",
            f"one for each of {', '.join(names)}",
            "load data for this network: load_data(..., program=program)",
        )
    for name, x, example in zip(names, batch, program.example_inputs, strict=True):
        kinds = [t.is_floating_point() for t in (x, example)]
        if kinds[0] != kinds[1] or x.dim() != example.dim():
            found, expected = (f"{t.dtype} of shape {tuple(t.shape[1:])}" for t in (x, example))
            raise DataError.at(f"{data.spec}: {name}", found, expected, "convert the samples")


@torch.no_grad()
def accuracy(program: Program, split: Split, *, shared: bool = False) -> Score | None:
    """Top-1 and top-5 on a split; None without labels, for values, or for a network that is no classifier.

    Of equal outputs the first counts as the likelier one.

    Args:
        program: the network.
        split: labelled samples.
        shared: every process calls this and looks at its share of the samples (see `distributed`).

    Raises:
        DataError: if the split is empty or has labels that the network has no output for.
    """
    if not _has_classes(program, split):
        return None

    def right(logits: Tensor, y: Tensor) -> Tensor:
        require_outputs(logits, y)
        likeliest = logits.argsort(dim=1, descending=True, stable=True)[:, :FEW]
        found = likeliest == y[:, None]
        return torch.stack([found[:, 0].sum(), found.sum()])

    counts = _summed(program, split, right, torch.zeros(2, dtype=torch.int64), shared)
    correct, among = counts.tolist()
    low, high = wilson(correct, len(split))
    some = among / len(split) if program.output.shape[1] > FEW else None
    value = correct / len(split)
    return Score(measure="accuracy", value=value, samples=len(split), low=low, high=high, top5=some)


def score(program: Program, split: Split, *, shared: bool = False) -> Score | None:
    """Accuracy for classes, the mean error for values; see these. None where neither says anything."""
    return accuracy(program, split, shared=shared) or mean_error(program, split, shared=shared)


@torch.no_grad()
def mean_error(program: Program, split: Split, *, shared: bool = False) -> Score | None:
    """Mean absolute error on a split whose labels are values; None without labels, or for classes.

    Args:
        program: the network.
        split: samples with values.
        shared: every process calls this and looks at its share of the samples (see `distributed`).

    Raises:
        DataError: if the split is empty, or the network does not yield one number for each value.
    """
    if not split.regression:
        return None

    def moments(outputs: Any, y: Tensor) -> Tensor:
        errors = absolute_errors(outputs, y).double()
        return torch.stack([errors.sum(), errors.square().sum()])

    sums = _summed(program, split, moments, torch.zeros(2, dtype=torch.float64), shared)
    mean, square = (sums / len(split)).tolist()
    half = NORMAL_95 * math.sqrt(max(square - mean * mean, 0.0) / len(split))
    low, high = max(0.0, mean - half), mean + half
    return Score(measure="error", value=mean, samples=len(split), low=low, high=high)


def absolute_errors(outputs: Any, labels: Tensor) -> Tensor:
    """|output - label| of each sample, the mean over its values; shape (n,). See `values_like`."""
    errors: Tensor = (outputs - values_like(outputs, labels)).abs()
    return errors.reshape(len(errors), -1).mean(1)


def values_like(outputs: Any, labels: Tensor) -> Tensor:
    """Labels in the shape and type of the outputs: `[n]` for outputs `[n, 1]`, which would broadcast.

    Raises:
        DataError: if the network does not yield one number for each value.
    """
    if not isinstance(outputs, Tensor) or len(outputs) != len(labels) or outputs.numel() != labels.numel():
        found = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(
            f"labels: found values of shape {tuple(labels.shape[1:])} for outputs of shape {found}, expected "
            "one number for each; check that the data belongs to this network"
        )
    return labels.reshape(outputs.shape).to(outputs)


def require_outputs(logits: Tensor, labels: Tensor) -> None:
    """DataError if the network has no output for some label."""
    if int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"labels: found class {int(labels.max())}, expected classes below {logits.shape[1]}, the number "
            "of the network's outputs; check that the data belongs to this network"
        )


@torch.no_grad()
def confusion(program: Program, split: Split) -> Tensor | None:
    """How often each class was taken for which one; None as for `accuracy`, which is its trace's share.

    Args:
        program: the network.
        split: labelled samples.

    Returns:
        int64 (classes, classes), a row for each true class, a column for each predicted one.

    Raises:
        DataError: as for `accuracy`.
    """
    if not _has_classes(program, split):
        return None
    classes = program.output.shape[1]

    def taken(logits: Tensor, y: Tensor) -> Tensor:
        require_outputs(logits, y)
        return torch.bincount(y * classes + logits.argmax(1), minlength=classes * classes)

    pairs = _summed(program, split, taken, torch.zeros(classes * classes, dtype=torch.int64))
    return pairs.view(classes, classes)


def _has_classes(program: Program, split: Split) -> bool:
    """Whether the labels are classes that the network tells apart; DataError if there are no samples."""
    return split.labelled and is_classifier(program) and not _some(split).regression


def _some(split: Split) -> Split:
    """The split; DataError if it is empty."""
    if not len(split):
        raise DataError("evaluation data: found no samples, expected at least one")
    return split


def _summed(
    program: Program,
    split: Split,
    of: Callable[[Any, Tensor], Tensor],
    total: Tensor,
    shared: bool = False,
) -> Tensor:
    """What `of` makes of outputs and labels, added to `total` batch by batch; see `accuracy`."""
    batch = batch_size(program)
    part = _some(split).subset(distributed.share(len(split), batch)) if shared else _some(split)
    for x, y in part.batches(batch):
        total += of(program(*x), y)
    if shared:
        distributed.all_reduce([total])
    return total


@torch.no_grad()
def drift(before: Program, after: Program, batches: Iterable[Batch]) -> Drift:
    """Relative L2 of the outputs, and the share of samples with the same top-1 class."""
    difference = norm = 0.0
    same = total = 0
    classifier = is_classifier(before)
    for x in (part for batch in batches for part in _split(batch, batch_size(before))):
        old, new = output_tensors(before(*x)), output_tensors(after(*x))
        difference += sum(
            float((a.double() - b.double()).square().sum()) for a, b in zip(old, new, strict=True)
        )
        norm += sum(float(a.double().square().sum()) for a in old)
        if classifier:
            same += int((old[0].argmax(1) == new[0].argmax(1)).sum())
        total += len(x[0])
    ratio = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    return Drift(relative_l2=ratio, top1_agreement=same / total if classifier and total else None)


def _split(batch: Batch, size: int) -> Iterator[Batch]:
    return zip(*(torch.split(x, size) for x in batch), strict=True)


def first_inputs(split: Split, samples: int) -> list[Batch]:
    """The inputs of the first `samples` samples, in batches."""
    some = split.subset(np.arange(min(samples, len(split))))
    return [x for x, _ in some.batches(BATCH)]
