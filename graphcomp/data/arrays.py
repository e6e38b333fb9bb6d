"""Samples that lie in memory, as images, as numbers or as they are; and what labels may be."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphcomp.base import Buffer
from graphcomp.data.layout import as_taken, in_front
from graphcomp.data.request import Request, Slot, sizes
from graphcomp.data.split import READ, Indices, Source, Split
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


def fetch_bytes(images: NDArray[np.uint8], request: Request) -> Source:
    """Fetch from uint8 `[N, H, W, C]`, for networks that take `[N, C, H, W]` or the same order."""
    _require_sample(request, images.shape[3:] + images.shape[1:3], in_front(request.shape))
    mean, std = statistics(request)

    def fetch(indices: Indices) -> Batch:
        batch = np.ascontiguousarray(images[indices].transpose(0, 3, 1, 2))
        return (as_taken(torch.from_numpy(batch).float().div_(255).sub_(mean).div_(std), request.shape),)

    pixels = as_taken(mean, request.shape), as_taken(std, request.shape)
    return Source(fetch, lambda indices: identity(images, indices, request), (pixels,))


def fetch_numbers(samples: NDArray[Any], request: Request) -> Source:
    """Fetch from whole numbers, for an input that takes such: tokens, masks, bytes as they are."""
    slot = request.slot
    place = f"{request.where}[{slot.name}]"
    kept = torch.from_numpy(samples[:0]).to(slot.dtype).numpy().dtype
    if samples.dtype.kind not in "iub" or (kept.kind == "b") != (samples.dtype.kind == "b"):
        raise DataError.at(place, samples.dtype, f"{slot.dtype} as the model takes", "convert it")
    _require_sample(request, samples.shape[1:], slot.shape)
    if samples.size and kept.kind != "b":
        require_numbers(place, int(samples.min()), int(samples.max()), slot)
    held = np.ascontiguousarray(samples, dtype=kept)
    return Source(
        lambda indices: (torch.from_numpy(held[indices]),), lambda indices: identity(held, indices, request)
    )


def require_numbers(place: str, low: int, high: int, slot: Slot) -> None:
    """DataError unless an input takes whole numbers from `low` to `high`."""
    limits = torch.iinfo(slot.dtype)
    low_end, high_end = (None, None) if slot.numbers is None else slot.numbers.ends
    least, most = limits.min if low_end is None else low_end, limits.max if high_end is None else high_end
    if low < least or high > most:
        raise DataError.at(
            place, f"numbers from {low} to {high}", f"{least} to {most}, which {slot} takes", "correct them"
        )


def fetch_floats(samples: NDArray[np.float32], request: Request) -> Source:
    """Fetch from float32 in the order that the network takes; images if there is something to normalise."""
    _require_sample(request, samples.shape[1:], request.shape)
    dtype = request.slot.dtype

    def identify(indices: Indices) -> Iterator[Buffer]:
        return identity(samples, indices, request)

    if request.mean is None:
        return Source(lambda indices: (torch.from_numpy(samples[indices]).to(dtype),), identify)
    if samples.ndim != 4:
        raise DataError.at(
            request.spec, f"mean and std for samples of shape {samples.shape[1:]}", "CxHxW", "leave them out"
        )
    mean, std = (as_taken(n, request.shape) for n in statistics(request))
    return Source(
        lambda indices: (torch.from_numpy(samples[indices]).sub_(mean).div_(std).to(dtype),), identify
    )


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
            f"{sizes(expected)} as the model takes them for {request.slot.name}",
            "convert the data, or give the input shape that it has",
        )


def values(place: str, y: NDArray[Any], samples: tuple[int, ...]) -> NDArray[np.float32]:
    """Labels of a regression: (N,) or (N, k)."""
    if y.shape[:1] != samples or y.ndim > 2:
        raise DataError.at(
            place, f"{y.dtype} of shape {y.shape}", f"({samples[0]},) or ({samples[0]}, k)", "reshape it"
        )
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(y, dtype=np.float32)
    if bad := found.size - int(np.isfinite(found).sum()):
        raise DataError.at(place, f"{bad} NaN or infinite values", "finite float32", "clean the data")
    return found


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


def largest_of(*splits: Split) -> int:
    """The largest label of all."""
    return max((int(split.labels.max()) for split in splits if len(split)), default=0)


def how_to_count(outputs: int) -> str:
    """What to do where the labels of an `npz` file are fewer than the outputs."""
    return (
        "if the labels are indices of the network's outputs, of which some are missing, add "
        f"?classes={outputs}; else correct them"
    )
