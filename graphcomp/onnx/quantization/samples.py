"""What an 8 bit file is made from and judged by: batches of samples as its inputs take them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper

from graphcomp.data import Split
from graphcomp.errors import DataError
from graphcomp.measure import paired_difference, wilson
from graphcomp.onnx.quantization.checks import run_all
from graphcomp.onnx.quantization.sessions import Feeds
from graphcomp.onnx.subgraphs import required_inputs
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
    """All whole batches, an array an input: a file may take no other size."""
    inputs = required_inputs(model)
    found = [[x.numpy() for x in batch] for batch, _ in split.batches(size) if len(batch[0]) == size]
    if len(found[0]) != len(inputs):
        names = ", ".join(value.name for value in inputs)
        raise DataError.at(
            "samples", f"{len(found[0])} tensor(s) a sample", f"one for each of {names}", "give others"
        )
    for value, x in zip(inputs, found[0], strict=True):
        _require_fit(value, x)
    return [{value.name: x for value, x in zip(inputs, batch, strict=True)} for batch in found]


def _require_fit(value: ValueInfoProto, x: NDArray[Any]) -> None:
    tensor = value.type.tensor_type
    dims = [d.dim_value for d in tensor.shape.dim]
    kind = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    fits = len(x.shape) == len(dims) and all(d in (0, n) for d, n in zip(dims[1:], x.shape[1:], strict=True))
    if not fits or x.dtype != kind:
        raise DataError.at(
            f"samples of {value.name}",
            f"{x.dtype} of {'x'.join(map(str, x.shape[1:]))}",
            f"{kind} of {'x'.join(str(d or 'any') for d in dims[1:])}",
            "give others",
        )


def counted(fed: Sequence[Feeds]) -> int:
    """How many samples there are."""
    return sum(len(next(iter(feeds.values()))) for feeds in fed)


def outputs(model: bytes, fed: Sequence[Feeds], *, plain: bool = False) -> list[NDArray[Any]]:
    """All float outputs on all batches, computed as `run_all` does."""
    found = [y for batch in run_all(model, fed, plain=plain) for y in batch]
    return [y for y in found if y.dtype == np.float32]


def require_classes(split: Split) -> None:
    """DataError unless labels are classes."""
    if not split.labelled or split.regression:
        raise DataError.at("evaluate", split.labels.dtype, "classes", "give labelled samples")


def compare(
    before: bytes, after: bytes, model: ModelProto, split: Split, batch: int | None, *, plain: bool = False
) -> tuple[Score, Interval]:
    """How good `after` is, and how many more, or fewer, of the same samples it gets right than `before`.

    `plain`: `after` is computed as it is written.

    Raises DataError unless the first output is a number for each of the classes that labels name.
    """
    size = batch or math.gcd(len(split), 16)  # open batches leave no sample out
    fed = batches(model, split, size)
    labels = split.labels.numpy()[: len(fed) * size]
    was, now = (
        np.concatenate([_logits(y[0], labels).argmax(1) for y in run_all(each, fed, plain=written)]) == labels
        for each, written in ((before, False), (after, plain))
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
