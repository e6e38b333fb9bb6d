"""Data sources: `load_data("cifar10:DIR?limit=1000", input_shape=(3, 32, 32), seed=0)`.

| spec | what it reads | options |
| --- | --- | --- |
| `digits` | scikit-learn's handwritten digits, 32x32x3 | limit |
| `imagefolder:DIR` | class folders of images, in DIR, or in DIR/train and DIR/val or DIR/test | N, classes |
| | or images without folders: no labels, enough to calibrate and to fit | N |
| `cifar10:DIR` | the standard python batches, in DIR or DIR/cifar-10-batches-py | N |
| `cifar100:DIR` | the same, in DIR or DIR/cifar-100-python | N, labels |
| `npz:FILE` | `x`, `y`, or `x_train`, `y_train`, `x_test`, `y_test`; uint8 NHWC or float NCHW | N, classes |
| `random` | standard normal samples without labels | limit |

N: limit, mean and std. In `npz` whole numbers as `y` are classes; floats, `[N]` or `[N, k]`, are values to
predict (regression).

Options follow a question mark: `?limit=1000&mean=0.485,0.456,0.406&std=0.229,0.224,0.225`.
`classes` says whose output a folder is (see `data.classes`); for `npz`, how many classes its labels are
indices of, where they are not all there: `?classes=1000`. `labels=coarse`: CIFAR-100's 20.
uint8 images are scaled to [0, 1] and normalised by mean and std (default: ImageNet's); float data is taken as
it is unless mean and std are given. `limit` keeps a random part of each split, in proportion to the classes.

Every split of a source into halves is fixed; `seed` only chooses random samples and the subset of `limit`.
All random numbers come from numpy's RandomState, whose streams never change from version to version.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from graphcomp.base import Buffer
from graphcomp.data.arrays import fetch_bytes, how_to_count, load_npz
from graphcomp.data.cifar import load_cifar10, load_cifar100
from graphcomp.data.classes import how_to_map
from graphcomp.data.imagefolder import load_imagefolder
from graphcomp.data.request import Request, read_options, sizes
from graphcomp.data.split import (
    Data,
    Indices,
    Source,
    Split,
    choose_others,
    describe,
    split_in_two,
    stratified,
    whole_split,
)
from graphcomp.errors import DataError
from graphcomp.ir import Numbers

RANDOM_SAMPLES = 64


@dataclass(frozen=True)
class _Kind:
    load: Callable[[Request], Data]
    location: str | None
    options: tuple[str, ...]
    advice: Callable[[int], str] = choose_others

    def usage(self, name: str) -> str:
        return f"{name}:{self.location}" if self.location else name


def load_data(
    spec: str,
    *,
    input_shape: tuple[int, ...],
    seed: int,
    outputs: int | None = None,
    numbers: Numbers | None = None,
) -> Data:
    """Open the data that `spec` names (see the module's table).

    Args:
        spec: the source and its options.
        input_shape: the shape of one sample that the model takes, (C, H, W), without the batch.
        seed: 0 or larger; chooses the samples of `random` and the subset of `limit`, never a split.
        outputs: of the classifier that the data is for: folders have to say which of them are theirs.
        numbers: that the samples of `random` consist of; None for standard normal ones.

    Raises DataError for whatever is missing, empty, damaged or does not fit.
    """
    request = replace(_parse(spec, input_shape, seed), outputs=outputs, numbers=numbers)
    kind = _KINDS[spec.partition("?")[0].partition(":")[0]]
    data = replace(kind.load(request), advice=kind.advice)
    for name, split in (("calibration", data.train), ("evaluation", data.eval)):
        if len(split) == 0:
            raise DataError.at(spec, f"no {name} samples", "at least one", "add samples")
    return data if request.limit is None else _limited(data, request.limit, seed)


def _limited(data: Data, limit: int, seed: int) -> Data:
    train, evaluation = (
        s.subset(stratified(s.labels.numpy(), min(limit, len(s)), seed)) for s in (data.train, data.eval)
    )
    note = f"; limited to {len(train)} of {len(data.train)} and {len(evaluation)} of {len(data.eval)} samples"
    return replace(data, train=train, eval=evaluation, description=data.description + note)


def _parse(spec: str, shape: tuple[int, ...], seed: int) -> Request:
    source, question, query = spec.partition("?")
    name, _, where = source.partition(":")
    kind = _KINDS.get(name)
    if kind is None:
        known = ", ".join(k.usage(n) for n, k in _KINDS.items())
        raise DataError.at(f"data spec {spec!r}", f"source {name!r}", f"one of {known}", "use one of them")
    if bool(where) != bool(kind.location):
        raise DataError.at(
            f"data spec {spec!r}", f"{source!r}", f"{kind.usage(name)!r}", "write it like that"
        )
    if not shape or min(shape) < 1:
        raise DataError.at("input shape", shape, "positive sizes of one sample", "e.g. (3, 224, 224)")
    if not 0 <= seed < 2**32:
        raise DataError.at("seed", seed, "0 to 2**32 - 1", "choose another")
    options = read_options(spec, query, kind.options) if question else {}
    return Request(spec, where, shape, seed, **options)


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
    what = "standard normal" if request.numbers is None else f"whole ({request.numbers})"
    return Data(
        train,
        evaluation,
        None,
        request.spec,
        describe(f"{what} {sizes(request.shape)} samples without labels", train, evaluation),
    )


def _noise(request: Request, part: int) -> Split:
    """Drawn when it is first asked for: without labels nothing reads what would be evaluated on."""
    shape, numbers = (RANDOM_SAMPLES, *request.shape), request.numbers

    @cache
    def drawn() -> Tensor:
        rng = np.random.RandomState([request.seed, part])
        if numbers is None:
            return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        return torch.from_numpy(rng.randint(numbers.low, numbers.high + 1, shape)).to(numbers.dtype)

    def identify(indices: Indices) -> Iterator[Buffer]:
        yield f"random {[request.seed, part]} {shape} {numbers}\n".encode()
        yield np.ascontiguousarray(indices).data

    fetch = Source(lambda indices: (drawn()[torch.from_numpy(indices)],), identify)
    return replace(whole_split(np.zeros(RANDOM_SAMPLES, np.int64), fetch), labelled=False)


_KINDS: dict[str, _Kind] = {
    "digits": _Kind(_digits, None, ("limit",)),
    "imagefolder": _Kind(load_imagefolder, "DIR", ("limit", "mean", "std", "classes"), how_to_map),
    "cifar10": _Kind(load_cifar10, "DIR", ("limit", "mean", "std")),
    "cifar100": _Kind(load_cifar100, "DIR", ("limit", "mean", "std", "labels")),
    "npz": _Kind(load_npz, "FILE", ("limit", "mean", "std", "classes"), how_to_count),
    "random": _Kind(_random, None, ("limit",)),
}
