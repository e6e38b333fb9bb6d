"""Data sources: `load_data("cifar10:DIR?limit=1000", program=program, seed=0)`.

| spec | what it reads | options |
| --- | --- | --- |
| `digits` | scikit-learn's handwritten digits, 32x32x3 | limit |
| `imagefolder:DIR` | class folders of images, in DIR, or in DIR/train and DIR/val or DIR/test | N, classes |
| | or images without folders: no labels, enough to calibrate and to fit | N |
| `cifar10:DIR` | the standard python batches, in DIR or DIR/cifar-10-batches-py | N |
| `cifar100:DIR` | the same, in DIR or DIR/cifar-100-python | N, labels |
| `npz:FILE` | `x`, `y`, or `x_train`, `y_train`, `x_test`, `y_test`; uint8 NHWC or float NCHW | N, classes |
| `FILE.py:NAME` | the dataset (see `data.dataset`) that NAME is or returns | limit, classes |
| `random` | standard normal samples without labels, whole numbers where the network takes such | limit |

N: limit, mean and std. In `npz` whole numbers as `y` are classes; floats, `[N]` or `[N, k]`, are values to
predict (regression); without `y` there are no labels. `y` is called `labels` or `targets` where an input has
that name.

For networks of several inputs: `random`, `FILE.py:NAME`, and `npz` with an array for each input, by its name
(`left`, `right`, `y`, or each with `_train` and `_test`), images and numbers side by side. mean and std are
of all inputs that are images, or of one: `?left.mean=0.5&left.std=0.25`.

Options follow a question mark: `?limit=1000&mean=0.485,0.456,0.406&std=0.229,0.224,0.225`.
`classes` says whose output a folder is (see `data.classes`); for `npz`, how many classes its labels are
indices of, where they are not all there: `?classes=1000`. `labels=coarse`: CIFAR-100's 20.
uint8 images are scaled to [0, 1] and normalised by mean and std (default: ImageNet's); float data is taken as
it is unless mean and std are given. `limit` keeps a random part of each split, in proportion to the classes.

Every split of a source into halves is fixed; `seed` only chooses random samples and the subset of `limit`.
All random numbers come from numpy's RandomState, whose streams never change from version to version.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphcomp.base import Buffer, call_in_file
from graphcomp.data.arrays import fetch_bytes, how_to_count
from graphcomp.data.cifar import load_cifar10, load_cifar100
from graphcomp.data.classes import how_to_map
from graphcomp.data.dataset import Dataset, load_dataset
from graphcomp.data.imagefolder import load_imagefolder
from graphcomp.data.npz import load_npz
from graphcomp.data.request import Request, Slot, read_options, sizes, slots_of
from graphcomp.data.split import (
    Data,
    Indices,
    Source,
    Split,
    choose_others,
    describe,
    joined,
    split_in_two,
    stratified,
    unlabelled,
    whole_split,
)
from graphcomp.errors import DataError
from graphcomp.ir import Program

RANDOM_SAMPLES = 64
"""Of `random`, where no limit says how many."""

SampleShape = tuple[int, ...] | Mapping[str, tuple[int, ...]]
"""Without the batch: of the only input, or of inputs by name."""


@dataclass(frozen=True)
class _Kind:
    load: Callable[[Request], Data]
    location: str | None
    options: tuple[str, ...]
    advice: Callable[[int], str] = choose_others

    def usage(self, name: str) -> str:
        return f"{name}:{self.location}" if self.location else name


def load_data(
    spec: Any,
    *,
    input_shape: SampleShape | None = None,
    program: Program | None = None,
    seed: int,
    outputs: int | None = None,
) -> Data:
    """Open data (see the module's table) for a network.

    Args:
        spec: the source and its options; or a dataset of your own, or `{"train": …, "eval": …}` of two, see
            `data.dataset`.
        input_shape: the shape of one sample that the model takes, (C, H, W), without the batch; of several
            inputs by name, in their order. All are floating point.
        program: instead of that: the network, whose inputs have names, shapes and types.
        seed: 0 or larger; chooses the samples of `random` and the subset of `limit`, never a split.
        outputs: of the classifier that the data is for: folders have to say which of them are theirs.

    Raises DataError for whatever is missing, empty, damaged or does not fit.
    """
    if (program is None) == (not input_shape):
        raise DataError(
            "data: found an input shape and a program, or no input shape and none, expected one of them"
        )
    inputs = slots_of(program) if program is not None else _named(input_shape)
    if not isinstance(spec, str):
        text = f"a {type(spec).__name__} of your own"
        return _checked(load_dataset(spec, _request(text, text, "", inputs, seed, DATASET)), text, seed)
    name, where, query = _parts(spec)
    kind = _KINDS[name]
    request = replace(_request(spec, where, query, inputs, seed, kind), outputs=outputs)
    return _checked(replace(kind.load(request), advice=kind.advice), spec, seed, request.limit)


def _named(shapes: SampleShape | None) -> tuple[Slot, ...]:
    by_name = shapes if isinstance(shapes, Mapping) else {"input": tuple(shapes or ())}
    return tuple(Slot(name, tuple(shape)) for name, shape in by_name.items())


def _checked(data: Data, spec: str, seed: int, limit: int | None = None) -> Data:
    for name, split in (("calibration", data.train), ("evaluation", data.eval)):
        if len(split) == 0:
            raise DataError.at(spec, f"no {name} samples", "at least one", "add samples")
    return data if limit is None else _limited(data, limit, seed)


def _limited(data: Data, limit: int, seed: int) -> Data:
    train, evaluation = (
        s.subset(stratified(s.labels.numpy(), min(limit, len(s)), seed)) for s in (data.train, data.eval)
    )
    note = f"; limited to {len(train)} of {len(data.train)} and {len(evaluation)} of {len(data.eval)} samples"
    return replace(data, train=train, eval=evaluation, description=data.description + note)


def _parts(spec: str) -> tuple[str, str, str]:
    """A spec's kind, location and options."""
    source, _, query = spec.partition("?")
    name, _, where = source.partition(":")
    if source.rpartition(":")[0].endswith(".py"):
        return PYTHON, source, query
    kind = _KINDS.get(name)
    if kind is None:
        known = ", ".join(k.usage(n) for n, k in _KINDS.items())
        raise DataError.at(f"data spec {spec!r}", f"source {name!r}", f"one of {known}", "use one of them")
    if bool(where) != bool(kind.location):
        raise DataError.at(
            f"data spec {spec!r}", f"{source!r}", f"{kind.usage(name)!r}", "write it like that"
        )
    return name, where, query


def _request(spec: str, where: str, query: str, inputs: tuple[Slot, ...], seed: int, kind: _Kind) -> Request:
    for slot in inputs:
        if min(slot.shape, default=1) < 1:
            raise DataError.at(
                "input shape", slot.shape, "positive sizes of one sample", "e.g. (3, 224, 224)"
            )
    if not inputs:
        raise DataError("data: found a network without inputs, expected one at least")
    if not 0 <= seed < 2**32:
        raise DataError.at("seed", seed, "0 to 2**32 - 1", "choose another")
    options = read_options(spec, query, kind.options, inputs) if "?" in spec else {}
    return Request(spec, where, inputs, seed, **options)


def _digits(request: Request) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError.at("digits", "no scikit-learn", "it", "pip install graphcomp[demo]") from error
    source = load_digits()
    grey = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    labels = source.target.astype(np.int64)
    train, evaluation = split_in_two(labels, fetch_bytes(images, request), 0.8)
    return Data(
        train,
        evaluation,
        10,
        request.spec,
        describe("scikit-learn digits at 32x32x3, fixed stratified 80/20 split", train, evaluation),
    )


def _random(request: Request) -> Data:
    train, evaluation = (_noise(request, part) for part in (0, 1))
    what = " and ".join(_drawn_of(slot) for slot in request.inputs)
    return Data(
        train,
        evaluation,
        None,
        request.spec,
        describe(f"{what} samples without labels", train, evaluation),
    )


def _drawn_of(slot: Slot) -> str:
    if slot.numbers is not None:
        return f"whole ({slot.numbers}) {sizes(slot.shape)}"
    return f"{'standard normal' if slot.dtype.is_floating_point else 'the same'} {sizes(slot.shape)}"


def _noise(request: Request, part: int) -> Split:
    # An input's numbers depend on its place, and not on what is beside it.
    keys = ([request.seed, part, *([place] if place else [])] for place in range(len(request.inputs)))
    count = RANDOM_SAMPLES if request.limit is None else request.limit
    source = joined([_drawn(slot, key, count) for slot, key in zip(request.inputs, keys, strict=True)])
    return unlabelled(whole_split(np.zeros(count, np.int64), source))


def _drawn(slot: Slot, key: list[int], count: int) -> Source:
    """Drawn when it is first asked for: without labels nothing reads what would be evaluated on."""
    shape, numbers = (count, *slot.shape), slot.numbers
    unknown = numbers is None and not slot.dtype.is_floating_point  # which numbers it takes

    @cache
    def drawn() -> Tensor:
        rng = np.random.RandomState(key)
        if numbers is not None:
            return torch.from_numpy(rng.randint(numbers.low, numbers.high + 1, shape)).to(numbers.dtype)
        if unknown and slot.example is not None:
            return slot.example.expand(shape).clone()
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(slot.dtype)

    def identify(indices: Indices) -> Iterator[Buffer]:
        yield f"random {key} {shape} {numbers} {slot.dtype}\n".encode()
        yield np.ascontiguousarray(indices).data
        if unknown:
            yield drawn().numpy().data

    return Source(lambda indices: (drawn()[torch.from_numpy(indices)],), identify)


def _from_python(request: Request) -> Data:
    path, _, name = request.where.rpartition(":")
    return load_dataset(call_in_file(Path(path), name, Dataset), request)


PYTHON = "FILE.py"
DATASET = _Kind(_from_python, "NAME", ("limit", "classes"), how_to_count)
_KINDS: dict[str, _Kind] = {
    "digits": _Kind(_digits, None, ("limit",)),
    "imagefolder": _Kind(load_imagefolder, "DIR", ("limit", "mean", "std", "classes"), how_to_map),
    "cifar10": _Kind(load_cifar10, "DIR", ("limit", "mean", "std")),
    "cifar100": _Kind(load_cifar100, "DIR", ("limit", "mean", "std", "labels")),
    "npz": _Kind(load_npz, "FILE", ("limit", "mean", "std", "classes"), how_to_count),
    "random": _Kind(_random, None, ("limit",)),
    PYTHON: DATASET,
}
