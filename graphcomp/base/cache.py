"""Results that took long to compute, kept on disk by what they were computed from.

    FOLDER/<kind>/<key>.safetensors     key = sha256 of everything that decides the content, see `key`
    FOLDER/<kind>/<key>/                files of somebody else (TensorRT's engines), see `place`

FOLDER is `GRAPHCOMP_CACHE` (empty: nothing is kept), else the platform's place for caches. Entries are
written whole or not at all and carry a checksum of their tensors: an entry that is damaged is named in a
warning, deleted and computed again. Those that were not used for longest go when there are more than `LIMIT`
bytes. A loaded entry decides nothing that its key does not say: the key has to name everything.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from graphcomp.base.digests import json_sha256, sha256, tensor_parts
from graphcomp.base.files import atomic_file
from graphcomp.base.own_code import digest_of
from graphcomp.errors import GraphcompWarning, OutputError
from graphcomp.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "GRAPHCOMP_CACHE"
LIMIT = 4 << 30
"""Bytes that the cache may take; more than one entry of the largest networks."""


def folder() -> Path | None:
    """Where entries are kept; None if the user switched the cache off."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    try:
        return _platform_folder() / "graphcomp"
    except RuntimeError:  # no home directory
        return None


def _platform_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    variable, default = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    chosen = Path(os.environ.get(variable) or "")
    return chosen if chosen.is_absolute() else Path.home() / default  # XDG: relative paths are to be ignored


def key(module: str, /, **parts: Any) -> str:
    """Of an entry: sha256 of `parts`, of the code that computes it and of torch's version.

    Args:
        module: that computes the content; see `base.own_code`.
        parts: JSON values: fingerprints, options.
    """
    import torch

    return json_sha256({**parts, "code": digest_of(module), "versions": [torch.__version__]})


def identity(**parts: Any) -> str:
    """Of work that can be resumed: sha256 of `parts` (JSON values) and of graphcomp's and torch's versions.

    Not of the code: whoever mends what stopped a run wants to go on with it.
    """
    import torch

    return json_sha256({**parts, "versions": [__version__, torch.__version__]})


def load(kind: str, key: str) -> "dict[str, Tensor] | None":
    """What was stored under `key`; None if there is nothing, or (with a warning) if it is damaged."""
    path = _path(kind, key)
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            intact = (file.metadata() or {}).get("sha256") == _checksum(key, tensors)
    except (OSError, SafetensorError, ValueError) as error:
        _discard(path, str(error))
        return None
    if not intact:
        _discard(path, "a wrong checksum")
        return None
    with suppress(OSError):
        os.utime(path)  # in use: it goes last
    return tensors


def store(kind: str, key: str, tensors: "Mapping[str, Tensor]") -> None:
    """Keep `tensors` under `key`. A disk that refuses costs a warning: the result is there anyway."""
    from safetensors.torch import save_file

    path = _path(kind, key)
    if path is None:
        return
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_file(path) as temporary:
            save_file(content, temporary, {"sha256": _checksum(key, content)})
    except (OutputError, SafetensorError) as error:
        _warn(f"cache: {error}; the result is not kept; set {VARIABLE} to another folder")
        return
    _evict(path.parent.parent, keep=path)


def forget(kind: str, key: str) -> None:
    """Delete what was stored under `key`, if anything was."""
    path = _path(kind, key)
    if path is not None:
        _delete(path)


def place(kind: str, key: str) -> Path | None:
    """A folder under `key` for those that write their files themselves; None if nothing can be kept.

    To ask for it is to use it: it goes as the other entries do, with all that is in it.
    """
    root = folder()
    if root is None:
        return None
    path = root / kind / key
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.utime(path)
    except OSError as error:
        _warn(f"cache: {path}: {error}; the result is not kept; set {VARIABLE} to another folder")
        return None
    _evict(root, keep=path)
    return path


def _path(kind: str, key: str) -> Path | None:
    root = folder()
    return None if root is None else root / kind / f"{key}.safetensors"


def _checksum(key: str, tensors: "Mapping[str, Tensor]") -> str:
    return sha256(chain([key.encode()], tensor_parts(tensors)))


def _discard(path: Path, reason: str) -> None:
    _warn(f"cache: {path}: found a damaged entry ({reason}), expected one that reads; it is computed again")
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _warn(message: str) -> None:
    warnings.warn(message, GraphcompWarning, stacklevel=3)


def _evict(root: Path, keep: Path) -> None:
    """Delete the entries that were not used for longest until `LIMIT` is kept."""
    entries = sorted(_entries(root), reverse=True)
    total = 0
    for _, size, path in entries:
        total += size
        if total > LIMIT and path != keep:
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _entries(root: Path) -> Iterable[tuple[float, int, Path]]:
    for path in root.glob("*/*"):
        with suppress(OSError):  # another process may delete it now
            if path.is_dir():
                yield path.stat().st_mtime, sum(p.stat().st_size for p in path.rglob("*")), path
            elif path.suffix == ".safetensors":
                yield path.stat().st_mtime, path.stat().st_size, path
