"""What an 8 bit file is made from and judged by: batches of samples in the shape that its input has."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from graphcomp.data import Split
from graphcomp.errors import DataError
from graphcomp.measure import paired_difference, wilson
from graphcomp.onnx.quantization.checks import run_all
from graphcomp.onnx.quantization.sessions import Feeds
from graphcomp.records import Interval, Score

BATCH = 8
"""All tensors of a batch are in memory at once."""
HELD = 4
"""Of so many samples one is held out."""
LEAST = HELD * BATCH
"""Samples that an open batch needs."""


def calibration(
    model: ModelProto, samples: Split, count: int, batch: int | None
) -> tuple[list[Feeds], list[Feeds]]:
    """Batches to take statistics of, and batches that are held out: `count` samples, evenly spaced.

    Raises DataError: too few samples, or of another shape.
    """
    size = batch or BATCH
    chosen = samples.spread(count)
    held = np.arange(HELD - 1, len(chosen), HELD)
    fitted = np.setdiff1d(np.arange(len(chosen)), held)
    if min(len(held), len(fitted)) < size:
        raise DataError.at("samples", len(chosen), f"at least {HELD * size}", "calibrate on more")
    return batches(model, chosen.subset(fitted), size), batches(model, chosen.subset(held), size)


def batches(model: ModelProto, split: Split, size: int) -> list[Feeds]:
    """All whole batches: a file may take no other."""
    name = input_name(model)
    found = [x.numpy() for x, _ in split.batches(size) if len(x) == size]
    (value,) = (i for i in model.graph.input if i.name == name)  # files may list stored weights before it
    dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
    shape = found[0].shape
    if len(shape) != len(dims) or any(d and d != n for d, n in zip(dims[1:], shape[1:], strict=True)):
        raise DataError.at("samples", "x".join(map(str, shape[1:])), f"{name} of {dims[1:]}", "give others")
    return [{name: x} for x in found]


def input_name(model: ModelProto) -> str:
    """Of the only input."""
    stored = {i.name for i in model.graph.initializer}
    return str(next(i.name for i in model.graph.input if i.name not in stored))


def counted(fed: Sequence[Feeds]) -> int:
    """How many samples there are."""
    return sum(len(x) for feeds in fed for x in feeds.values())


def outputs(model: bytes, fed: Sequence[Feeds]) -> list[NDArray[Any]]:
    """All float outputs on all batches."""
    found = [y for batch in run_all(model, fed) for y in batch]
    return [y for y in found if y.dtype == np.float32]


def require_classes(split: Split) -> None:
    """DataError unless labels are classes."""
    if not split.labelled or split.regression:
        raise DataError.at("evaluate", split.labels.dtype, "classes", "give labelled samples")


def compare(
    before: bytes, after: bytes, model: ModelProto, split: Split, batch: int | None
) -> tuple[Score, Interval]:
    """How good `after` is, and how many more, or fewer, of the same samples it gets right than `before`.

    Raises DataError unless the first output is a number for each of the classes that labels name.
    """
    size = batch or math.gcd(len(split), 16)  # open batches leave no sample out
    fed = batches(model, split, size)
    labels = split.labels.numpy()[: len(fed) * size]
    was, now = (
        np.concatenate([_logits(y[0], labels).argmax(1) for y in run_all(each, fed)]) == labels
        for each in (before, after)
    )
    low, high = wilson(int(now.sum()), len(now))
    score = Score(measure="accuracy", value=float(now.mean()), samples=len(now), low=low, high=high)
    return score, paired_difference(was, now)


def _logits(output: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """The output, if classes can be told by it."""
    if output.ndim != 2 or output.shape[1] <= max(1, int(labels.max())):
        raise DataError.at(
            "evaluate",
            f"a first output of {'x'.join(map(str, output.shape))} and labels up to {int(labels.max())}",
            "(samples, classes) with a number for each label",
            "leave evaluate out, or give the file whose first output is the classifier's",
        )
    return output
