"""Samples that lie in memory, as images or as they are; and `npz` files of them."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import Buffer, is_file
from graphcomp.data.layout import as_taken, in_front
from graphcomp.data.request import Request, either, read_limit, sizes
from graphcomp.data.split import (
    READ,
    Data,
    Fetch,
    Indices,
    Labels,
    Source,
    describe,
    split_in_two,
    whole_split,
)
from graphcomp.errors import DataError
from graphcomp.ir import Batch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def statistics(request: Request) -> tuple[Tensor, Tensor]:
    """Mean and std as `[C, 1, 1]`; ImageNet's by default."""
    mean, std = request.mean or IMAGENET_MEAN, request.std or IMAGENET_STD
    channels = in_front(request.shape)[0]
    if not len(mean) == len(std) == channels:
        raise DataError.at(
            request.spec,
            f"{len(mean)} mean and {len(std)} std values",
            f"one for each of the {channels} channels that the model takes",
            f"give ?mean=..&std=.. with {channels} values each",
        )
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def fetch_bytes(images: NDArray[np.uint8], request: Request) -> Fetch:
    """Fetch from uint8 `[N, H, W, C]`, for networks that take `[N, C, H, W]` or the same order."""
    _require_sample(request, images.shape[3:] + images.shape[1:3], in_front(request.shape))
    mean, std = statistics(request)

    def fetch(indices: Indices) -> Batch:
        batch = np.ascontiguousarray(images[indices].transpose(0, 3, 1, 2))
        return (as_taken(torch.from_numpy(batch).float().div_(255).sub_(mean).div_(std), request.shape),)

    pixels = as_taken(mean, request.shape), as_taken(std, request.shape)
    return Source(fetch, lambda indices: identity(images, indices, request), (pixels,))


def fetch_floats(samples: NDArray[np.float32], request: Request) -> Fetch:
    """Fetch from float32 in the order that the network takes; images if there is something to normalise."""
    _require_sample(request, samples.shape[1:], request.shape)

    def identify(indices: Indices) -> Iterator[Buffer]:
        return identity(samples, indices, request)

    if request.mean is None:
        return Source(lambda indices: (torch.from_numpy(samples[indices]),), identify)
    if samples.ndim != 4:
        raise DataError.at(
            request.spec, f"mean and std for samples of shape {samples.shape[1:]}", "CxHxW", "leave them out"
        )
    mean, std = (as_taken(n, request.shape) for n in statistics(request))
    return Source(lambda indices: (torch.from_numpy(samples[indices]).sub_(mean).div_(std),), identify)


def identity(samples: NDArray[Any], indices: Indices, request: Request) -> Iterator[Buffer]:
    """What decides the samples at `indices` of an array, for a hash."""
    yield f"{samples.dtype} {samples.shape[1:]} {request.mean} {request.std}\n".encode()
    for start in range(0, len(indices), READ):
        yield np.ascontiguousarray(samples[indices[start : start + READ]]).data


def _require_sample(request: Request, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise DataError.at(
            request.spec,
            f"samples of shape {sizes(found)}",
            f"{sizes(expected)} as the model takes them",
            "convert the data, or give the input shape that it has",
        )


PAIR = ("x", "y")
FOUR = ("x_train", "y_train", "x_test", "y_test")


def load_npz(request: Request) -> Data:
    """The data of an `npz` file."""
    arrays = _read_npz(Path(request.where))
    if set(FOUR) <= set(arrays):
        train = whole_split(*_samples(request, arrays, "x_train", "y_train"))
        evaluation = whole_split(*_samples(request, arrays, "x_test", "y_test"))
        what = "arrays with their own test set"
    elif set(PAIR) <= set(arrays) and not set(FOUR) & set(arrays):
        train, evaluation = split_in_two(*_samples(request, arrays, *PAIR), 0.5)
        what = "arrays, fixed stratified split into halves"
    else:
        found = either(tuple(sorted(arrays))) or "nothing"
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
        train, evaluation, classes, request.spec, describe(f"{request.where}, {what}", train, evaluation)
    )


def _index_count(request: Request, largest: int) -> int:
    """How many classes labels are indices of."""
    if request.classes is None:
        return largest + 1
    count = read_limit(request.spec, "classes", request.classes)
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
    request: Request, arrays: dict[str, NDArray[Any]], x_key: str, y_key: str
) -> tuple[Labels, Fetch]:
    x, y = arrays[x_key], arrays[y_key]
    place, count = f"{request.where}[{y_key}]", x.shape[:1]
    labels: Labels = _values(place, y, count) if y.dtype.kind == "f" else class_ids(place, y, count)
    place = f"{request.where}[{x_key}]"
    if x.dtype == np.uint8:
        if x.ndim != 4:
            raise DataError.at(place, f"uint8 of shape {x.shape}", "images (N, H, W, C)", "reshape them")
        return labels, fetch_bytes(x, request)
    if x.dtype.kind != "f":
        raise DataError.at(place, x.dtype, "uint8 (N, H, W, C) or float (N, C, H, W)", "convert it")
    with np.errstate(over="ignore"):
        samples = np.ascontiguousarray(x, dtype=np.float32)
    if bad := samples.size - int(np.isfinite(samples).sum()):
        raise DataError.at(place, f"{bad} NaN or infinite values", "finite float32", "clean the data")
    return labels, fetch_floats(samples, request)


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


def class_ids(place: str, y: NDArray[Any], samples: tuple[int, ...], classes: int | None = None) -> Indices:
    """Labels of classes, 0 to `classes` - 1; int64 `[N]`."""
    if y.dtype.kind not in "iu" or y.shape != samples:
        raise DataError.at(
            place,
            f"{y.dtype} labels of shape {y.shape}",
            f"integers of shape {samples}",
            "one class id a sample",
        )
    if y.size:
        require_ids(place, int(y.min()), int(y.max()), classes)
    return y.astype(np.int64)


def require_ids(place: str, low: int, high: int, classes: int | None = None) -> None:
    """DataError unless labels from `low` to `high` are ids of `classes`, or of as many as int64 counts."""
    top = np.iinfo(np.int64).max if classes is None else classes - 1
    if low < 0 or high > top:
        limits = "0 or larger, below 2**63" if classes is None else f"0 to {top}"
        raise DataError.at(place, f"labels from {low} to {high}", limits, "correct the class ids")


def how_to_count(outputs: int) -> str:
    """What to do where the labels of an `npz` file are fewer than the outputs."""
    return (
        "if the labels are indices of the network's outputs, of which some are missing, add "
        f"?classes={outputs}; else correct them"
    )
