"""Numbers that an ONNX file keeps in files beside it, read without leaving its folder.

Files come from anywhere and may name any file of the machine. What they name is opened below their own
folder, without following a link, and has to be a regular file.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo

from graphcomp.errors import LoadError, first_line

MOST_BYTES = 1 << 36
"""Of one tensor."""


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    """All that a graph stores, in its nodes and in graphs within it as well."""
    stack = [graph]
    while stack:
        here = stack.pop()
        yield from here.initializer
        for sparse in here.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in here.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    yield attribute.t
                yield from attribute.tensors
                if attribute.type == AttributeProto.GRAPH:
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def is_external(tensor: TensorProto) -> bool:
    """Whether its numbers are in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def locations(model: ModelProto) -> list[str]:
    """What its tensors call the files that they are in, each once, sorted."""
    return sorted({ExternalDataInfo(t).location for t in tensors_of(model.graph) if is_external(t)})


def content_of(path: Path, location: str) -> bytes:
    """A whole file beside the model at `path`; LoadError if it is not there, or elsewhere."""
    with _opened(path, location, path.name) as (file, _):
        return file.read()


def numbers_of(path: Path, tensor: TensorProto) -> bytes:
    """The bytes of one tensor in a file beside the model's; LoadError if they are not there, or elsewhere."""
    place = f"{path.name}: tensor {tensor.name!r:.120}"
    try:
        info = ExternalDataInfo(tensor)
        offset, length = int(info.offset or 0), info.length
    except (ValueError, TypeError) as error:
        raise LoadError.at(
            place, "external data without numbers", "offset and length", "it is not valid"
        ) from error
    with _opened(path, info.location or "", place) as (file, size):
        length = size - offset if length is None else int(length)
        needed = bytes_of(tensor)
        if offset < 0 or length != needed or offset + length > size:
            raise LoadError.at(
                place,
                f"{length} bytes at {offset} of a file of {size}",
                f"{needed} bytes of a regular file",
                "the file was cut off, or belongs to another model",
            )
        file.seek(offset)
        return file.read(length)


def take_in(path: Path, tensor: TensorProto) -> None:
    """Put the numbers of a tensor into the model at `path`, in place; LoadError as `numbers_of`."""
    tensor.raw_data = numbers_of(path, tensor)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


@contextmanager
def _opened(path: Path, location: str, place: str) -> Iterator[tuple[BinaryIO, int]]:
    """The file, and its size."""
    parts = Path(location).parts
    inside = bool(parts) and not Path(location).is_absolute() and ".." not in parts and "\\" not in location
    if not inside or "\0" in location:
        raise LoadError.at(
            place,
            f"external data in {location!r:.120}",
            "a file in the folder of the model",
            "files from others may name any file of yours; put its data beside it",
        )
    try:
        descriptor = _open_beneath(path.resolve().parent, parts)
    except OSError as error:
        raise LoadError.at(
            place,
            f"external data: {first_line(error)}",
            "a regular file, reached without links",
            "put it there",
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise LoadError.at(
                place, f"external data in {location!r:.120}", "a regular file", "put its data beside it"
            )
        yield file, status.st_size


def bytes_of(tensor: TensorProto) -> int:
    """What its numbers take, by type and shape; LoadError for a type that there is not."""
    try:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError as error:
        raise LoadError.at(f"tensor {tensor.name!r:.120}", "no type", "one", "it is not valid") from error
    for n in tensor.dims:
        size = size * n if 0 <= n <= MOST_BYTES and size <= MOST_BYTES else -1
    return int(size)


def _open_beneath(folder: Path, parts: tuple[str, ...]) -> int:
    """Open a file below a folder, following no link on the way."""
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
