"""The python batches of CIFAR-10 and CIFAR-100: pickles, read for containers and whole numbers alone.

Names of classes are those of the archive's own meta file; where that is missing they are not known.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from graphcomp.base import is_dir, is_file
from graphcomp.data.arrays import class_ids, fetch_bytes, require_ids
from graphcomp.data.request import Request, either
from graphcomp.data.split import Data, Fetch, Indices, describe, whole_split
from graphcomp.errors import DataError


@dataclass(frozen=True)
class _Labels:
    """One way to label the images: the key of the ids in a batch, of the names in the meta file, how many."""

    key: str
    names: str
    classes: int


@dataclass(frozen=True)
class _Batches:
    """What one of the two data sets is made of."""

    title: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: Mapping[str, _Labels]


CIFAR10 = _Batches(
    "CIFAR-10",
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("test_batch",),
    "batches.meta",
    {"fine": _Labels("labels", "label_names", 10)},
)
CIFAR100 = _Batches(
    "CIFAR-100",
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    ("train",),
    ("test",),
    "meta",
    {
        "fine": _Labels("fine_labels", "fine_label_names", 100),
        "coarse": _Labels("coarse_labels", "coarse_label_names", 20),
    },
)
LONGEST_NAME = 100
"""Of a class, in characters."""


def load_cifar10(request: Request) -> Data:
    """The data of CIFAR-10's python batches."""
    return _load(request, CIFAR10)


def load_cifar100(request: Request) -> Data:
    """The data of CIFAR-100's python batches; labels are fine (100 classes) or coarse (20)."""
    return _load(request, CIFAR100)


def _load(request: Request, batches: _Batches) -> Data:
    asked = request.labels or "fine"
    if asked not in batches.labels:
        raise DataError.at(
            f"data spec {request.spec!r}", f"labels={asked!r}", either(tuple(batches.labels)), "correct it"
        )
    labels = batches.labels[asked]
    folder = _folder(Path(request.where), batches)
    train, evaluation = (
        whole_split(*_samples(request, folder, names, batches.title, labels))
        for names in (batches.train, batches.test)
    )
    which = f" with {asked} labels" if len(batches.labels) > 1 else ""
    what = describe(f"{batches.title} of {folder}{which}", train, evaluation)
    names = _names(folder / batches.meta, batches.title, labels)
    return Data(train, evaluation, labels.classes, request.spec, what, names=names)


def _folder(where: Path, batches: _Batches) -> Path:
    folder = where / batches.folder if is_dir(where / batches.folder) else where
    missing = tuple(n for n in batches.train + batches.test if not is_file(folder / n))
    if missing:
        found = f"no {', '.join(missing)}" if is_dir(where) else "no such directory"
        raise DataError.at(
            folder,
            found,
            f"the python batches of {batches.title}",
            f"unpack {batches.archive} and give {batches.folder} or its parent",
        )
    return folder


def _names(path: Path, title: str, labels: _Labels) -> dict[str, int]:
    """The id of every class by its name; empty where the file that says so is not there."""
    if not is_file(path):
        return {}
    found = _member(_read_pickle(path, title), labels.names)
    items = found if isinstance(found, list) else []
    names = [n.decode("latin1") if isinstance(n, bytes) else n for n in items]
    fine = all(isinstance(n, str) and 0 < len(n) <= LONGEST_NAME and n.isprintable() for n in names)
    if not fine or len(names) != labels.classes or len(set(names)) != len(names):
        raise DataError.at(
            path,
            f"{len(names)} names under {labels.names!r}" if fine else "names that are not short words",
            f"{labels.classes} different ones",
            "unpack the archive again, or remove the file: then classes have no names",
        )
    return {name: i for i, name in enumerate(names)}


def _member(content: dict[Any, Any], key: str) -> Any:
    """Python 2 wrote bytes for keys."""
    return content.get(key, content.get(key.encode()))


def _samples(
    request: Request, folder: Path, names: tuple[str, ...], title: str, labels: _Labels
) -> tuple[Indices, Fetch]:
    parts = [_batch(folder / name, title, labels) for name in names]
    rows = np.concatenate([data for data, _ in parts])
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.concatenate([ids for _, ids in parts]), fetch_bytes(images, request)


def _batch(path: Path, title: str, labels: _Labels) -> tuple[NDArray[np.uint8], Indices]:
    content = _read_pickle(path, title)
    data, found = _member(content, "data"), _member(content, labels.key)
    if not isinstance(data, _PickledArray) or not isinstance(found, list | _PickledArray):
        raise DataError.at(
            path, f"no data and {labels.key}", f"a python batch of {title}", "unpack the archive again"
        )
    rows = data.value
    ids = found.value if isinstance(found, _PickledArray) else _integers(path, found, labels.classes)
    if rows.dtype != np.uint8 or rows.shape[1:] != (3072,):
        raise DataError.at(
            path, f"data of {rows.dtype} {rows.shape}", "uint8 (N, 3072)", "unpack the archive again"
        )
    return rows, class_ids(str(path), ids, rows.shape[:1], labels.classes)


def _integers(path: Path, labels: list[Any], classes: int) -> NDArray[Any]:
    if not all(type(v) is int for v in labels):
        raise DataError.at(
            path, "labels that are not integers", f"0 to {classes - 1}", "unpack the archive again"
        )
    if labels:
        require_ids(str(path), min(labels), max(labels), classes)
    return np.array(labels, dtype=np.int64)


def _read_pickle(path: Path, title: str) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = _BatchUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything at all
        raise DataError.at(
            path, f"an unreadable file ({error})", f"a python file of {title}", "unpack the archive again"
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
