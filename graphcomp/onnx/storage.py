"""A model becomes one file; or, where protobuf cannot hold it, a file and its numbers beside it.

    model.onnx                      nodes, and where in the other file the numbers of each weight are
    model-0123456789abcdef.data     called by its content, so that no older model.onnx ever reads a newer one

Both are complete on the disk before either is seen; `model.onnx` comes last, and then data of an older one
goes.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto
from onnx.external_data_helper import set_external_data

from graphcomp.base import atomic_entries, atomic_file, remove
from graphcomp.errors import ExportError
from graphcomp.runtime import external

MOST_BYTES = 2**31 - 2**24
"""Of numbers in one file: protobuf's limit, less room for the graph around them."""
_LEAST = 1024  # bytes of a tensor that goes: smaller ones may be shapes, which others read without the data
_ALIGNED = 64


@dataclass(frozen=True)
class Placed:
    """Where a model is.

    Attributes:
        file: what a session opens: the content, or the path of a file whose numbers are beside it.
        data: name of the file of these; None without one.
        bytes: of all together.
    """

    file: bytes | Path
    data: str | None
    bytes: int


def stored_bytes(model: ModelProto) -> int:
    """Of all the numbers that a model holds."""
    return sum(map(external.bytes_of, model.graph.initializer))


def is_too_large(model: ModelProto) -> bool:
    """Whether it takes more than one file."""
    return stored_bytes(model) > MOST_BYTES


@contextmanager
def tried(model: ModelProto) -> Iterator[bytes | Path]:
    """What a session opens, for the body alone; the model is as it was afterwards."""
    if not is_too_large(model):
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _put(model, path)
        try:
            yield path
        finally:
            for tensor in filter(external.is_external, model.graph.initializer):
                external.take_in(path, tensor)


@contextmanager
def written(model: ModelProto, path: Path) -> Iterator[Placed]:
    """The model at `path` if the body ends well, else nothing; numbers that go beside it leave the model.

    Raises:
        ExportError: a large model whose path has no suffix. OutputError: `path` cannot be written.
    """
    if not is_too_large(model):
        content = model.SerializeToString()
        yield Placed(content, None, len(content))
        before = _data_of(path)
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
        _remove(path, before)
        return
    if not path.suffix:  # the data would come second
        raise ExportError(
            f"{path}: found no suffix, expected one, since its weights take another file; name it .onnx"
        )
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_entries(path.parent) as folder:  # in the order of their names: the data first
        placed = _put(model, folder / path.name)
        yield placed
        before = _data_of(path)
    _remove(path, before - {placed.data})


def data_names(path: Path) -> set[str]:
    """Names of files beside a model's that are called as files of its numbers are."""
    named = re.compile(re.escape(path.stem) + r"-[0-9a-f]{16}\.data")
    return (
        {p.name for p in path.parent.iterdir() if named.fullmatch(p.name)} if path.parent.is_dir() else set()
    )


def _data_of(path: Path) -> set[str]:
    """Those that the model which is there now reads, if there is one."""
    names = data_names(path) if path.is_file() else set()
    if not names:
        return names
    try:
        return names & set(external.locations(onnx.load(path, load_external_data=False)))
    # What is there need be no model; protobuf's own error is not ours to import.
    except Exception:
        return set()


def _remove(path: Path, names: Iterable[str | None]) -> None:
    for name in names:
        remove(path.with_name(str(name)))


def _put(model: ModelProto, path: Path) -> Placed:
    """Both files, where there are none; the numbers leave the model."""
    large = [t for t in model.graph.initializer if len(t.raw_data) >= _LEAST]
    digest, size, offsets = hashlib.sha256(), 0, list[tuple[int, int]]()
    with atomic_file(path.with_name("data")) as temporary, temporary.open("wb") as file:
        for tensor in large:
            gap = -size % _ALIGNED
            for piece in (bytes(gap), tensor.raw_data):
                file.write(piece)
                digest.update(piece)
            offsets.append((size + gap, len(tensor.raw_data)))
            size += gap + len(tensor.raw_data)
    data = f"{path.stem}-{digest.hexdigest()[:16]}.data"
    path.with_name("data").rename(path.with_name(data))
    for tensor, (offset, length) in zip(large, offsets, strict=True):
        set_external_data(tensor, data, offset, length)
        tensor.ClearField("raw_data")
    content = model.SerializeToString()
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return Placed(path, data, len(content) + size)
