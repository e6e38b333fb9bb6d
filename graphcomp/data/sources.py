"""Data sources: `load_data("cifar10:DIR?limit=1000", input_shape=(3, 32, 32), seed=0)`.

| spec | what it reads | options |
| --- | --- | --- |
| `digits` | scikit-learn's handwritten digits, 32x32x3 | limit |
| `imagefolder:DIR` | class folders of images, in DIR, or in DIR/train and DIR/val or DIR/test | all |
| `cifar10:DIR` | the standard python batches, in DIR or DIR/cifar-10-batches-py | all but classes |
| `npz:FILE` | `x`, `y`, or `x_train`, `y_train`, `x_test`, `y_test`; x is uint8 NHWC or float NCHW | all |
| `random` | standard normal samples without labels | limit |

In `npz` whole numbers as `y` are classes; floats, `[N]` or `[N, k]`, are values to predict (regression).

Options follow a question mark: `?limit=1000&mean=0.485,0.456,0.406&std=0.229,0.224,0.225`.
`classes` says whose output a folder is (see `data.classes`); for `npz`, how many classes its labels are
indices of, where they are not all there: `?classes=1000`.
uint8 images are scaled to [0, 1] and normalised by mean and std (default: ImageNet's); float data is taken as
it is unless mean and std are given. `limit` keeps a random part of each split, in proportion to the classes.

Every split of a source into halves is fixed; `seed` only chooses random samples and the subset of `limit`.
All random numbers come from numpy's RandomState, whose streams never change from version to version.
"""

import hashlib
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import is_dir, is_file
from graphcomp.data.classes import Folders, folder_classes, how_to_map
from graphcomp.data.images import CROP_FRACTION, DECODED, SUFFIXES, decode, is_image
from graphcomp.errors import DataError
from graphcomp.ir import Numbers

__all__ = ["Data", "Split", "load_data"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPLIT_SEED = 0
RANDOM_SAMPLES = 64
READ = 1000
"""Samples at a time when they are only read."""

Indices = NDArray[np.int64]
Labels = NDArray[np.int64] | NDArray[np.float32]
Fetch = Callable[[Indices], Tensor]
Buffer = bytes | memoryview


@dataclass(frozen=True, eq=False)
class _Source:
    """A fetch that can say what it would yield without doing so.

    Attributes:
        fetch: see `Split`.
        identify: what decides the samples at some positions, for a hash.
        pixels: see `Split`.
        held: whether the samples are in memory, where they stay what they are; files may change.
    """

    fetch: Fetch
    identify: Callable[[Indices], Iterable[Buffer]]
    pixels: tuple[Tensor, Tensor] | None = None
    held: bool = True
    _digests: dict[bytes, bytes] = field(default_factory=dict, repr=False)

    def digest(self, indices: Indices) -> bytes:
        """sha256 of the samples at some positions; those in memory are only hashed once."""
        key = hashlib.sha256(np.ascontiguousarray(indices).data).digest()
        if key in self._digests:
            return self._digests[key]
        digest = hashlib.sha256()
        for part in self.identify(indices):
            digest.update(part)
        if self.held:
            self._digests[key] = digest.digest()
        return digest.digest()

    def __call__(self, indices: Indices) -> Tensor:
        return self.fetch(indices)


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in a fixed order.

    Attributes:
        labels: int64 `[len]`, the class of every sample; float32 `[len]` or `[len, k]`, its values, for
            regression; zeros if not `labelled`.
        indices: int64 `[len]`, the position of every sample in its source.
        fetch: reads the samples at some positions of the source as one float32 tensor.
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
    def pixels(self) -> tuple[Tensor, Tensor] | None:
        """Mean and std, `[C, 1, 1]`, that pixels in [0, 1] are normalised by; None for other samples."""
        return self.fetch.pixels if isinstance(self.fetch, _Source) else None

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (float32 `[n, C, H, W]` normalised, labels), n = `size` but for a smaller last batch.

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
        digest = hashlib.sha256(f"{self.labelled}\n".encode())
        digest.update(self.labels.numpy().data)
        if isinstance(self.fetch, _Source):
            digest.update(self.fetch.digest(self.indices))
        else:
            for x, _ in self.batches(READ):
                digest.update(x.contiguous().numpy().data)
        return digest.hexdigest()

    def subset(self, positions: Indices) -> "Split":
        """The samples at `positions` of this split."""
        return replace(self, labels=self.labels[torch.from_numpy(positions)], indices=self.indices[positions])

    def hold_out(self, fraction: float) -> tuple["Split", "Split"]:
        """Two parts: most samples, and a fixed `fraction`, every class in proportion to within one sample.

        Values have no classes: there the part is drawn from all samples alike.
        """
        held = _stratified(self.labels.numpy(), round(fraction * len(self)), SPLIT_SEED)
        return self.subset(np.setdiff1d(np.arange(len(self)), held)), self.subset(held)


def _choose(outputs: int) -> str:
    return "choose data and network that belong to each other"


@dataclass(frozen=True, eq=False)
class Data:
    """Calibration and training samples (`train`), evaluation samples (`eval`) and where they came from.

    `num_classes` is None without classes, for `npz` the largest label plus one; `description` is one line;
    `advice` says what to do if there are not as many classes as a network has outputs.
    """

    train: Split
    eval: Split
    num_classes: int | None
    spec: str
    description: str
    advice: Callable[[int], str] = field(default=_choose, repr=False)

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
        listed = ", ".join(map(str, ids.tolist()))
        return replace(
            self,
            train=_only(self.train, ids),
            eval=_only(self.eval, ids),
            num_classes=len(ids),
            description=f"{self.description}; classes {listed} only",
        )


def _only(split: Split, ids: Tensor) -> Split:
    for label in ids.tolist():
        if not bool((split.labels == label).any()):
            raise DataError.at(
                "classes", f"no sample of class {label}", "some of every class", "choose others"
            )
    chosen = split.subset(torch.isin(split.labels, ids).nonzero().flatten().numpy())
    return replace(chosen, labels=torch.searchsorted(ids, chosen.labels))


@dataclass(frozen=True)
class _Request:
    spec: str
    where: str
    shape: tuple[int, ...]
    seed: int
    limit: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: str | None = None
    outputs: int | None = None
    numbers: Numbers | None = None


@dataclass(frozen=True)
class _Kind:
    load: Callable[[_Request], Data]
    location: str | None
    options: tuple[str, ...]
    advice: Callable[[int], str] = _choose

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
        s.subset(_stratified(s.labels.numpy(), min(limit, len(s)), seed)) for s in (data.train, data.eval)
    )
    note = f"; limited to {len(train)} of {len(data.train)} and {len(evaluation)} of {len(data.eval)} samples"
    return replace(data, train=train, eval=evaluation, description=data.description + note)


# --- the spec -----------------------------------------------------------------------------------------------


def _parse(spec: str, shape: tuple[int, ...], seed: int) -> _Request:
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
    options = _options(spec, query, kind.options) if question else {}
    return _Request(spec, where, shape, seed, **options)


def _options(spec: str, query: str, known: tuple[str, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in query.split("&"):
        name, _, text = item.partition("=")
        if name not in known:
            raise DataError.at(f"data spec {spec!r}", f"option {name!r}", _listed(known), "correct it")
        if name in options:
            raise DataError.at(f"data spec {spec!r}", f"option {name!r} twice", "it once", "remove one")
        options[name] = _READERS[name](spec, name, text)
    if ("mean" in options) != ("std" in options):
        raise DataError.at(f"data spec {spec!r}", "only one of mean and std", "both", "give the other too")
    return options


def _limit(spec: str, name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise DataError.at(f"data spec {spec!r}", f"{name}={text!r}", "a whole number from 1", "correct it")
    return int(text)


def _text(spec: str, name: str, text: str) -> str:
    if not text:
        raise DataError.at(f"data spec {spec!r}", f"{name} without a value", "one", "correct it")
    return text


def _floats(spec: str, name: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(v) for v in values) or (name == "std" and min(values) <= 0):
        expected = "positive numbers" if name == "std" else "numbers"
        raise DataError.at(f"data spec {spec!r}", f"{name}={text!r}", expected, f"e.g. {name}=0.5,0.5,0.5")
    return values


_READERS: dict[str, Callable[[str, str, str], Any]] = {
    "limit": _limit,
    "mean": _floats,
    "std": _floats,
    "classes": _text,
}


# --- sampling -----------------------------------------------------------------------------------------------


def _rng(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


def _stratified(labels: Labels, count: int, seed: int) -> Indices:
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


def _split(labels: Labels, fetch: Fetch, fraction: float) -> tuple[Split, Split]:
    """A fixed stratified split: `fraction` of the samples, and the others."""
    first = _stratified(labels, round(fraction * len(labels)), SPLIT_SEED)
    whole = _whole(labels, fetch)
    return whole.subset(first), whole.subset(np.setdiff1d(np.arange(len(labels)), first))


def _whole(labels: Labels, fetch: Fetch) -> Split:
    return Split(torch.from_numpy(labels), np.arange(len(labels)), fetch)


# --- images and arrays --------------------------------------------------------------------------------------


def _statistics(request: _Request) -> tuple[Tensor, Tensor]:
    """Mean and std as `[C, 1, 1]`; ImageNet's by default."""
    mean, std = request.mean or IMAGENET_MEAN, request.std or IMAGENET_STD
    channels = request.shape[0]
    if not len(mean) == len(std) == channels:
        raise DataError.at(
            request.spec,
            f"{len(mean)} mean and {len(std)} std values",
            f"one for each of the {channels} channels that the model takes",
            f"give ?mean=..&std=.. with {channels} values each",
        )
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def _bytes_fetch(images: NDArray[np.uint8], request: _Request) -> Fetch:
    """Fetch from uint8 `[N, H, W, C]`."""
    _require_sample(request, images.shape[3:] + images.shape[1:3])
    mean, std = _statistics(request)

    def fetch(indices: Indices) -> Tensor:
        batch = np.ascontiguousarray(images[indices].transpose(0, 3, 1, 2))
        return torch.from_numpy(batch).float().div_(255).sub_(mean).div_(std)

    return _Source(fetch, lambda indices: _identity(images, indices, request), (mean, std))


def _float_fetch(samples: NDArray[np.float32], request: _Request) -> Fetch:
    """Fetch from float32 `[N, C, H, W]`, or any shape if there is nothing to normalise."""
    _require_sample(request, samples.shape[1:])

    def identify(indices: Indices) -> Iterator[Buffer]:
        return _identity(samples, indices, request)

    if request.mean is None:
        return _Source(lambda indices: torch.from_numpy(samples[indices]), identify)
    if samples.ndim != 4:
        raise DataError.at(
            request.spec, f"mean and std for samples of shape {samples.shape[1:]}", "CxHxW", "leave them out"
        )
    mean, std = _statistics(request)
    return _Source(lambda indices: torch.from_numpy(samples[indices]).sub_(mean).div_(std), identify)


def _identity(samples: NDArray[Any], indices: Indices, request: _Request) -> Iterator[Buffer]:
    """What decides the samples at `indices` of an array, for a hash."""
    yield f"{samples.dtype} {samples.shape[1:]} {request.mean} {request.std}\n".encode()
    for start in range(0, len(indices), READ):
        yield np.ascontiguousarray(samples[indices[start : start + READ]]).data


def _require_sample(request: _Request, found: tuple[int, ...]) -> None:
    if found != request.shape:
        raise DataError.at(
            request.spec,
            f"samples of shape {_sizes(found)}",
            f"{_sizes(request.shape)} as the model takes them",
            "convert the data, or give the input shape that it has",
        )


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(names)


# --- digits, random -----------------------------------------------------------------------------------------


def _digits(request: _Request) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError.at("digits", "no scikit-learn", "it", "pip install graphcomp[demo]") from error
    source = load_digits()
    grey = np.rint(source.images * (255 / 16)).astype(np.uint8)
    images = grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    labels = source.target.astype(np.int64)
    train, evaluation = _split(labels, _bytes_fetch(images, request), 0.8)
    return Data(
        train,
        evaluation,
        10,
        request.spec,
        _described("scikit-learn digits at 32x32x3, fixed stratified 80/20 split", train, evaluation),
    )


def _random(request: _Request) -> Data:
    train, evaluation = (_noise(request, part) for part in (0, 1))
    what = "standard normal" if request.numbers is None else f"whole ({request.numbers})"
    return Data(
        train,
        evaluation,
        None,
        request.spec,
        _described(f"{what} {_sizes(request.shape)} samples without labels", train, evaluation),
    )


def _noise(request: _Request, part: int) -> Split:
    rng, shape = np.random.RandomState([request.seed, part]), (RANDOM_SAMPLES, *request.shape)
    labels = np.zeros(RANDOM_SAMPLES, np.int64)
    if request.numbers is None:
        fetch = _float_fetch(rng.standard_normal(shape).astype(np.float32), request)
        return replace(_whole(labels, fetch), labelled=False)
    low, high, dtype = request.numbers.low, request.numbers.high, request.numbers.dtype
    whole = torch.from_numpy(rng.randint(low, high + 1, shape)).to(dtype)
    fetch = _Source(
        lambda indices: whole[torch.from_numpy(indices)],
        lambda indices: _identity(whole.numpy(), indices, request),
    )
    return replace(_whole(labels, fetch), labelled=False)


def _described(what: str, train: Split, evaluation: Split) -> str:
    return f"{what}: {len(train)} for calibration and training, {len(evaluation)} for evaluation"


# --- npz ----------------------------------------------------------------------------------------------------

PAIR = ("x", "y")
FOUR = ("x_train", "y_train", "x_test", "y_test")


def _npz(request: _Request) -> Data:
    arrays = _read_npz(Path(request.where))
    if set(FOUR) <= set(arrays):
        train = _whole(*_samples(request, arrays, "x_train", "y_train"))
        evaluation = _whole(*_samples(request, arrays, "x_test", "y_test"))
        what = "arrays with their own test set"
    elif set(PAIR) <= set(arrays) and not set(FOUR) & set(arrays):
        train, evaluation = _split(*_samples(request, arrays, *PAIR), 0.5)
        what = "arrays, fixed stratified split into halves"
    else:
        found = _listed(tuple(sorted(arrays))) or "nothing"
        raise DataError.at(
            request.where,
            f"arrays {found}",
            f"{', '.join(PAIR)} or {', '.join(FOUR)}",
            "save it with np.savez(file, x=x, y=y)",
        )
    if train.regression != evaluation.regression:
        raise DataError.at(
            request.where, "classes in one set and values in the other", "one kind", "convert them"
        )
    largest = max((int(s.labels.max()) for s in (train, evaluation) if len(s)), default=0)
    classes = None if train.regression else _index_count(request, largest)
    return Data(
        train, evaluation, classes, request.spec, _described(f"{request.where}, {what}", train, evaluation)
    )


def _index_count(request: _Request, largest: int) -> int:
    """How many classes labels are indices of."""
    if request.classes is None:
        return largest + 1
    count = _limit(request.spec, "classes", request.classes)
    if largest >= count:
        raise DataError.at(
            request.where, f"label {largest}", f"0 to {count - 1} (classes={count})", "correct one"
        )
    return count


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not is_file(path):
        raise DataError.at(path, "no such file", "an .npz file", "correct the path")
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise DataError.at(
                    path, "a single array", "an .npz file", "save it with np.savez(file, x=x, y=y)"
                )
            return {key: content[key] for key in content.files if key in PAIR + FOUR}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError.at(
            path, f"an unreadable file ({error})", "plain arrays", "save it again with np.savez"
        ) from error


def _samples(
    request: _Request, arrays: dict[str, NDArray[Any]], x_key: str, y_key: str
) -> tuple[Labels, Fetch]:
    x, y = arrays[x_key], arrays[y_key]
    place, count = f"{request.where}[{y_key}]", x.shape[:1]
    labels: Labels = _values(place, y, count) if y.dtype.kind == "f" else _labels(place, y, count)
    place = f"{request.where}[{x_key}]"
    if x.dtype == np.uint8:
        if x.ndim != 4:
            raise DataError.at(place, f"uint8 of shape {x.shape}", "images (N, H, W, C)", "reshape them")
        return labels, _bytes_fetch(x, request)
    if x.dtype.kind != "f":
        raise DataError.at(place, x.dtype, "uint8 (N, H, W, C) or float (N, C, H, W)", "convert it")
    with np.errstate(over="ignore"):
        samples = np.ascontiguousarray(x, dtype=np.float32)
    if bad := samples.size - int(np.isfinite(samples).sum()):
        raise DataError.at(place, f"{bad} NaN or infinite values", "finite float32", "clean the data")
    return labels, _float_fetch(samples, request)


def _values(place: str, y: NDArray[Any], samples: tuple[int, ...]) -> NDArray[np.float32]:
    """Labels of a regression: (N,) or (N, k)."""
    if y.shape[:1] != samples or y.ndim > 2:
        raise DataError.at(
            place, f"{y.dtype} of shape {y.shape}", f"({samples[0]},) or ({samples[0]}, k)", "reshape it"
        )
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(y, dtype=np.float32)
    if bad := values.size - int(np.isfinite(values).sum()):
        raise DataError.at(place, f"{bad} NaN or infinite values", "finite float32", "clean the data")
    return values


def _labels(place: str, y: NDArray[Any], samples: tuple[int, ...], classes: int | None = None) -> Indices:
    if y.dtype.kind not in "iu" or y.shape != samples:
        raise DataError.at(
            place,
            f"{y.dtype} labels of shape {y.shape}",
            f"integers of shape {samples}",
            "one class id a sample",
        )
    low, high = (int(y.min()), int(y.max())) if y.size else (0, 0)
    top = np.iinfo(np.int64).max if classes is None else classes - 1
    if low < 0 or high > top:
        limits = f"0 to {top}" if classes else "0 or larger"
        raise DataError.at(place, f"labels from {low} to {high}", limits, "correct the class ids")
    return y.astype(np.int64)


# --- cifar10 ------------------------------------------------------------------------------------------------

CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR_TEST = ("test_batch",)


def _cifar10(request: _Request) -> Data:
    folder = _cifar_folder(Path(request.where))
    train, evaluation = (
        _whole(*_cifar_samples(request, folder, names)) for names in (CIFAR_TRAIN, CIFAR_TEST)
    )
    return Data(train, evaluation, 10, request.spec, _described(f"CIFAR-10 of {folder}", train, evaluation))


def _cifar_folder(where: Path) -> Path:
    folder = where / CIFAR_FOLDER if is_dir(where / CIFAR_FOLDER) else where
    missing = tuple(n for n in CIFAR_TRAIN + CIFAR_TEST if not is_file(folder / n))
    if missing:
        found = f"no {', '.join(missing)}" if is_dir(where) else "no such directory"
        raise DataError.at(
            folder,
            found,
            "the python batches of CIFAR-10",
            f"unpack cifar-10-python.tar.gz and give {CIFAR_FOLDER} or its parent",
        )
    return folder


def _cifar_samples(request: _Request, folder: Path, names: tuple[str, ...]) -> tuple[Indices, Fetch]:
    parts = [_cifar_batch(folder / name) for name in names]
    rows = np.concatenate([data for data, _ in parts])
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.concatenate([labels for _, labels in parts]), _bytes_fetch(images, request)


def _cifar_batch(path: Path) -> tuple[NDArray[np.uint8], Indices]:
    content = _read_pickle(path)
    data, labels = (content.get(k, content.get(k.encode())) for k in ("data", "labels"))
    if not isinstance(data, _PickledArray) or not isinstance(labels, list | _PickledArray):
        raise DataError.at(
            path, "no data and labels", "a python batch of CIFAR-10", "unpack the archive again"
        )
    rows, ids = data.value, labels.value if isinstance(labels, _PickledArray) else _integers(path, labels)
    if rows.dtype != np.uint8 or rows.shape[1:] != (3072,):
        raise DataError.at(
            path, f"data of {rows.dtype} {rows.shape}", "uint8 (N, 3072)", "unpack the archive again"
        )
    return rows, _labels(str(path), ids, rows.shape[:1], 10)


def _integers(path: Path, labels: list[Any]) -> NDArray[Any]:
    if not all(isinstance(v, int) for v in labels):
        raise DataError.at(path, "labels that are not integers", "0 to 9", "unpack the archive again")
    return np.array(labels, dtype=np.int64)


def _read_pickle(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = _BatchUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything at all
        raise DataError.at(
            path, f"an unreadable file ({error})", "a python batch of CIFAR-10", "unpack the archive again"
        ) from error
    if not isinstance(content, dict):
        raise DataError.at(path, f"a {type(content).__name__}", "a dictionary", "unpack the archive again")
    return content


class _PickledDtype:
    """Stands in for numpy.dtype: whole numbers only; of a pickle's state only the byte order is taken."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.value = np.dtype(code.decode() if isinstance(code, bytes) else code)
        if self.value.kind not in "iu":
            raise pickle.UnpicklingError(f"array of {self.value}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in (">", b">"):
            self.value = self.value.newbyteorder(">")


class _PickledArray:
    """Stands in for numpy.ndarray: takes shape, type and bytes, nothing else."""

    value: NDArray[Any] = np.empty(0, np.int64)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: object) -> _PickledArray:
    return _PickledArray()


def _from_buffer(raw: bytes, dtype: _PickledDtype, shape: tuple[int, ...], order: str) -> _PickledArray:
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes in protocols 0 to 2


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


class _BatchUnpickler(pickle.Unpickler):
    """Reads plain containers and arrays of whole numbers; refuses everything that could run code."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of an admitted name; UnpicklingError for all others."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _ADMITTED[module, name]


# --- imagefolder --------------------------------------------------------------------------------------------


def _imagefolder(request: _Request) -> Data:
    root = Path(request.where)
    if not is_dir(root):
        raise DataError.at(root, "no such directory", "class folders of images", "correct the path")
    if len(request.shape) != 3 or request.shape[0] not in (1, 3):
        raise DataError.at(
            request.spec,
            f"a model that takes {_sizes(request.shape)}",
            "1xHxW or 3xHxW for images",
            "use npz",
        )
    parts = {name for name in ("train", "val", "test") if is_dir(root / name)}
    return _separate(request, root, parts) if parts else _halved(request, root)


def _separate(request: _Request, root: Path, parts: set[str]) -> Data:
    held_out = "val" if "val" in parts else "test"
    if not {"train", held_out} <= parts:
        raise DataError.at(
            root,
            f"{_listed(tuple(sorted(parts)))} alone",
            "train and val (or test)",
            "add the other, or give the folder of class folders itself",
        )
    folders = _folders(root / "train")
    extra = sorted(set(_folders(root / held_out)) - set(folders))
    if extra and not _is_mapped(request):
        raise DataError.at(
            root / held_out,
            f"class folder {extra[0]!r}",
            f"only those of {root / 'train'}",
            "make them the same",
        )
    classes = folder_classes(root, sorted([*folders, *extra]), request.outputs, request.classes)
    train, evaluation = (
        _whole(*_image_samples(request, root / part, classes.index)) for part in ("train", held_out)
    )
    what = f"{root}, {_counted(classes)}, train and {held_out}"
    return Data(
        train, evaluation, classes.count, _explicit(request, classes), _described(what, train, evaluation)
    )


def _halved(request: _Request, root: Path) -> Data:
    classes = folder_classes(root, _folders(root), request.outputs, request.classes)
    train, evaluation = _split(*_image_samples(request, root, classes.index), 0.5)
    what = f"{root}, {_counted(classes)}, fixed stratified split into halves"
    return Data(
        train, evaluation, classes.count, _explicit(request, classes), _described(what, train, evaluation)
    )


def _counted(classes: Folders) -> str:
    found = len(classes.index)
    return f"{classes.count} classes" if found == classes.count else f"{found} of {classes.count} classes"


def _explicit(request: _Request, classes: Folders) -> str:
    """The spec, with the reading of the folders' names in it, if the number of outputs decided about it."""
    if request.classes is not None or classes.reading == "sorted":
        return request.spec
    return f"{request.spec}{'&' if '?' in request.spec else '?'}classes={classes.reading}"


def _is_mapped(request: _Request) -> bool:
    """Whether a file names the folders."""
    return request.classes not in (None, "sorted", "index")


def _folders(folder: Path) -> list[str]:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        loose = sum(is_image(p) for p in folder.iterdir())
        raise DataError.at(
            folder,
            f"{loose} images and no class folders",
            "<class>/<image>",
            "move every image into a folder named after its class, or pack the images as npz",
        )
    return classes


def _image_samples(request: _Request, folder: Path, classes: Mapping[str, int]) -> tuple[Indices, Fetch]:
    mapped = _is_mapped(request)
    found = [(p, i) for name, i in classes.items() for p in _images(folder / name, may_be_empty=mapped)]
    labels = np.array([label for _, label in found], dtype=np.int64)
    return labels, _file_fetch([path for path, _ in found], request)


def _images(folder: Path, *, may_be_empty: bool) -> list[Path]:
    """Images of one class; a class that has a folder in train only has none."""
    if not is_dir(folder):
        return []
    images = sorted(p for p in folder.iterdir() if is_image(p))
    if not images and not may_be_empty:
        raise DataError.at(
            folder,
            "no images",
            f"files ending in {', '.join(sorted(SUFFIXES))}",
            "add images, remove the folder, or name it in ?classes=FILE",
        )
    return images


def _file_fetch(paths: list[Path], request: _Request) -> Fetch:
    mean, std = _statistics(request)
    real = cache(lambda i: paths[i].resolve())

    def fetch(indices: Indices) -> Tensor:
        batch = torch.stack([decode(paths[i], request.shape) for i in indices])
        return batch.float().div_(255).sub_(mean).div_(std)

    def identify(indices: Indices) -> Iterator[bytes]:
        yield f"{request.shape} {request.mean} {request.std} {CROP_FRACTION} {DECODED}\n".encode()
        for i in indices:
            try:
                status = paths[i].stat()
            except OSError as error:
                raise DataError.at(
                    paths[i], f"no file ({error})", "the image that was listed", "restore it"
                ) from error
            yield f"{real(i)} {status.st_size} {status.st_mtime_ns}\n".encode()

    return _Source(fetch, identify, (mean, std), held=False)


def _how_to_count(outputs: int) -> str:
    return (
        "if the labels are indices of the network's outputs, of which some are missing, add "
        f"?classes={outputs}; else correct them"
    )


_KINDS: dict[str, _Kind] = {
    "digits": _Kind(_digits, None, ("limit",)),
    "imagefolder": _Kind(_imagefolder, "DIR", ("limit", "mean", "std", "classes"), how_to_map),
    "cifar10": _Kind(_cifar10, "DIR", ("limit", "mean", "std")),
    "npz": _Kind(_npz, "FILE", ("limit", "mean", "std", "classes"), _how_to_count),
    "random": _Kind(_random, None, ("limit",)),
}
