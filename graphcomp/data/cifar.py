"""CIFAR-10's python batches: pickles, of which only containers and arrays of whole numbers are read."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from graphcomp.base import is_dir, is_file
from graphcomp.data.arrays import class_ids, fetch_bytes
from graphcomp.data.request import Request
from graphcomp.data.split import Data, Fetch, Indices, describe, whole_split
from graphcomp.errors import DataError

CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR_TEST = ("test_batch",)


def load_cifar10(request: Request) -> Data:
    """The data of CIFAR-10's python batches."""
    folder = _cifar_folder(Path(request.where))
    train, evaluation = (
        whole_split(*_cifar_samples(request, folder, names)) for names in (CIFAR_TRAIN, CIFAR_TEST)
    )
    return Data(train, evaluation, 10, request.spec, describe(f"CIFAR-10 of {folder}", train, evaluation))


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


def _cifar_samples(request: Request, folder: Path, names: tuple[str, ...]) -> tuple[Indices, Fetch]:
    parts = [_cifar_batch(folder / name) for name in names]
    rows = np.concatenate([data for data, _ in parts])
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.concatenate([labels for _, labels in parts]), fetch_bytes(images, request)


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
    return rows, class_ids(str(path), ids, rows.shape[:1], 10)


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
