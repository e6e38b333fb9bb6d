"""`npz` files: an array for each of a network's inputs, and one of labels."""

import math
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from graphcomp.base import is_file
from graphcomp.data.arrays import class_ids, fetch_bytes, fetch_floats, fetch_numbers, largest_of, values
from graphcomp.data.request import IMAGE, Request, either, read_limit
from graphcomp.data.split import (
    Data,
    Fetch,
    Labels,
    Source,
    Split,
    describe,
    joined,
    split_in_two,
    unlabelled,
    whole_split,
)
from graphcomp.errors import DataError

LABELS = "y", "labels", "targets"
"""What labels are called: one of these that no input is called."""

ALONE = "x"
"""What the only input may be called, whatever its name."""

WHOLE, PARTS = ("",), ("_train", "_test")
"""What is added to the names of arrays: nothing, or which of two sets they are of."""

SHOWN = 20
"""Names of arrays in an error."""

SUFFIX = ".npy"
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    RuntimeError,  # encrypted
    NotImplementedError,  # compressed in a way that Python does not know
    zipfile.BadZipFile,
    zlib.error,
)

SHARE = 2
"""How many times the size of all arrays has to be free: they are converted."""


def load_npz(request: Request) -> Data:
    """The data of an `npz` file."""
    if request.mean is not None and all(len(slot.shape) != IMAGE for slot in request.inputs):
        found = " and ".join(map(str, request.inputs))
        raise DataError.at(request.spec, f"mean and std for {found}", "CxHxW", "leave them out")
    path = Path(request.where)
    layout = _layout(request, _names(path))
    arrays = _read(path, [key for part in layout.parts for key in layout.keys(part)])
    samples = [_samples(request, arrays, layout, part) for part in layout.parts]
    if len(samples) == 2:
        train, evaluation = (whole_split(*found) for found in samples)
        what = "arrays with their own test set"
    else:
        train, evaluation = split_in_two(*samples[0], 0.5)
        what = "arrays, fixed stratified split into halves"
    if layout.label is None:
        train, evaluation, what = unlabelled(train), unlabelled(evaluation), f"{what}, without labels"
    if train.regression != evaluation.regression:
        raise DataError.at(
            request.where, "classes in one set and values in the other", "one kind", "convert them"
        )
    classes = class_count(request, train, evaluation)
    return Data(
        train, evaluation, classes, request.spec, describe(f"{request.where}, {what}", train, evaluation)
    )


def class_count(request: Request, train: Split, evaluation: Split) -> int | None:
    """How many classes labels are indices of; None if they are not."""
    if train.regression or not train.labelled:
        return None
    largest = largest_of(train, evaluation)
    if request.classes is None:
        return largest + 1
    count = read_limit(request.spec, "classes", request.classes)
    if largest >= count:
        raise DataError.at(
            request.where, f"label {largest}", f"0 to {count - 1} (classes={count})", "correct one"
        )
    return count


@dataclass(frozen=True)
class _Layout:
    """Which arrays of a file are which.

    Attributes:
        inputs: their names, in the order of the network's inputs, but for what `parts` add to them.
        label: the same of the labels; None: there are none.
        parts: of the file, training and test set or one.
    """

    inputs: tuple[str, ...]
    label: str | None
    parts: tuple[str, ...]

    def keys(self, part: str) -> list[str]:
        """The arrays of a part: inputs, and labels if there are any."""
        return [f"{name}{part}" for name in (*self.inputs, *([] if self.label is None else [self.label]))]


def _layout(request: Request, stored: Collection[str]) -> _Layout:
    names = tuple(slot.name for slot in request.inputs)
    ways = [(ALONE,), names] if len(names) == 1 else [names]
    free = [name for name in LABELS if not any(name in way for way in ways)]
    for inputs in ways:
        split = any(f"{name}{part}" in stored for name in (*inputs, *free) for part in PARTS)
        parts = PARTS if split else WHOLE
        given = [name for name in free if any(f"{name}{part}" in stored for part in parts)]
        found = _Layout(inputs, given[0] if given else None, parts)
        if len(given) < 2 and all(key in stored for part in parts for key in found.keys(part)):
            return found
    example = _Layout(ways[0], free[0], WHOLE)
    either_way = (", ".join(example.keys("")), ", ".join(key for part in PARTS for key in example.keys(part)))
    raise DataError.at(
        request.where,
        f"arrays {either(tuple(sorted(stored)[:SHOWN])) or 'nothing'}",
        f"{' or '.join(either_way)} ({free[0]} where there are labels)",
        f"save it with np.savez(file, {', '.join(f'{name}={name}' for name in example.keys(''))})",
    )


def _samples(
    request: Request, arrays: Mapping[str, NDArray[Any]], layout: _Layout, part: str
) -> tuple[Labels, Fetch]:
    keys = [f"{name}{part}" for name in layout.inputs]
    counts = {arrays[key].shape[:1] for key in keys}
    if len(counts) > 1:
        told = ", ".join(f"{key} of shape {arrays[key].shape}" for key in keys)
        raise DataError.at(request.where, told, "as many samples of every input", "correct the file")
    (count,) = counts
    fetch = joined(
        [_input(request.of(slot), arrays[key], key) for slot, key in zip(request.inputs, keys, strict=True)]
    )
    if layout.label is None:
        return np.zeros(count, np.int64), fetch
    place, y = f"{request.where}[{layout.label}{part}]", arrays[f"{layout.label}{part}"]
    return values(place, y, count) if y.dtype.kind == "f" else class_ids(place, y, count), fetch


def _input(request: Request, x: NDArray[Any], key: str) -> Source:
    """Samples of one input."""
    place = f"{request.where}[{key}]"
    if not request.slot.dtype.is_floating_point:
        return fetch_numbers(x, request)
    if x.dtype == np.uint8:
        if x.ndim != IMAGE + 1:
            raise DataError.at(place, f"uint8 of shape {x.shape}", "images (N, H, W, C)", "reshape them")
        return fetch_bytes(x, request)
    if x.dtype.kind != "f":
        raise DataError.at(place, x.dtype, "uint8 (N, H, W, C) or float (N, C, H, W)", "convert it")
    with np.errstate(over="ignore"):
        samples = np.ascontiguousarray(x, dtype=np.float32)
    if bad := samples.size - int(np.isfinite(samples).sum()):
        raise DataError.at(place, f"{bad} NaN or infinite values", "finite float32", "clean the data")
    return fetch_floats(samples, request)


# ---------------------------------------------------------------------- the file


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if not is_file(path):
        raise DataError.at(path, "no such file", "an .npz file", "correct the path")
    try:
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                raise DataError.at(
                    path, "a single array", "an .npz file", "save it with np.savez(file, x=x, y=y)"
                )
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UNREADABLE as error:
        raise DataError.at(
            path, f"an unreadable file ({error})", "plain arrays", "save it again with np.savez"
        ) from error


def _names(path: Path) -> list[str]:
    """The arrays in a file."""
    with _opened(path) as archive:
        return [name.removesuffix(SUFFIX) for name in archive.namelist() if name.endswith(SUFFIX)]


def _read(path: Path, keys: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Some arrays; their sizes are checked before memory is taken, and nothing but numbers is read."""
    with _opened(path) as archive:
        sizes = {key: archive.getinfo(f"{key}{SUFFIX}").file_size for key in keys}
        needed, free = SHARE * sum(sizes.values()), psutil.virtual_memory().available
        if needed > free:
            raise DataError.at(
                path,
                f"arrays of {needed / SHARE / 2**30:.3g} GiB",
                f"{SHARE} times less than the {free / 2**30:.3g} GiB of memory that are free",
                "save fewer samples",
            )
        return {key: _array(archive, key, size) for key, size in sizes.items()}


def _array(archive: zipfile.ZipFile, key: str, size: int) -> NDArray[Any]:
    """One array of a file; ValueError unless it is as long as its header says."""
    with archive.open(f"{key}{SUFFIX}") as stream:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise ValueError(f"{key} of format {version}")
        shape, _, dtype = readers[version](stream)
        if math.prod(shape) * dtype.itemsize != size - stream.tell():
            raise ValueError(f"{key} of {size:,} bytes for {dtype} of shape {shape}")
    with archive.open(f"{key}{SUFFIX}") as stream:
        found: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return found
