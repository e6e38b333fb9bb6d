"""Files and directories that are whole at every moment and one process's at a time, whatever they hold.

What is written lies beside its place, as `.xxxxxxxx-NAME`, until it is complete and on the disk; then it
takes that place in one step. A process that is killed leaves such a name behind, and `sweep` removes it.
"""

import ctypes
import errno
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from graphcomp.errors import GraphcompError, LoadError, OutputError

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)

LOCK = ".lock"
"""In a directory that is `locked`: who works there, as JSON."""

_UNFINISHED = re.compile(r"\.[0-9a-f]{8}-(?P<name>.+)", re.DOTALL)
_AT_CWD, _EXCHANGE, _SWAP = -100, 2, 2  # of linux/fcntl.h, linux/fs.h; of sys/stdio.h on macOS
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_TRIES = 100


def is_file(path: Path) -> bool:
    """Whether there is such a file; False too where there cannot be one, as for names that are too long."""
    with suppress(OSError, ValueError):
        return path.is_file()
    return False


def is_dir(path: Path) -> bool:
    """Whether there is such a directory; False too where there cannot be one."""
    with suppress(OSError, ValueError):
        return path.is_dir()
    return False


@contextmanager
def atomic_directory(final: Path, replaces: Callable[[Path], bool]) -> Iterator[Path]:
    """A new directory beside `final` that becomes `final` if the body ends well, and else is removed.

    Args:
        final: does not exist, is empty, or is something that may be replaced; its parents are made.
        replaces: whether an existing directory may be replaced (never asked about an empty one).

    Raises:
        OutputError: naming `final` and the reason, for any OSError of the body (so only write in it).
    """
    final = final.resolve()
    with _as_output_error(final):
        _check_replaceable(final, replaces)
        with _staged(final) as temporary:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            _replace(temporary, final)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, that replaces `path` if the body ends well, else is removed.

    Raises:
        OutputError: naming `path` and the reason, for any OSError of the body (so only write in it).
    """
    path = path.resolve()
    with _as_output_error(path), _staged(path) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, lines ending as they do in it, whole or not at all; folders on the way are made.

    Raises:
        OutputError: naming `path` and the reason.
    """
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write several files as `write_text` does one; none is replaced before all are on the disk.

    Raises:
        OutputError: naming the file and the reason.
    """
    with ExitStack() as stack:
        staged: dict[Path, Path] = {}
        for path, text in texts.items():
            with _as_output_error(path):
                final = path.resolve()
                staged[final] = stack.enter_context(_staged(final))
                staged[final].write_text(text, encoding="utf-8", newline="\n")
                _sync(staged[final])
        for final, temporary in staged.items():
            with _as_output_error(final):
                temporary.replace(final)


@contextmanager
def atomic_entries(directory: Path) -> Iterator[Path]:
    """A new directory within `directory`, whose entries move up into it if the body ends well.

    Each takes the place of an older one of its name in one step, in the order of their names. Other entries
    stay. Unlike `atomic_directory` this needs no right on the directory around, and `directory` may be a
    mount point or somebody's working directory.

    Errors of the body name the entries where they were to go.

    Raises:
        OutputError: naming `directory` and the reason.
    """
    with ExitStack() as stack:
        with _as_output_error(directory):
            temporary = stack.enter_context(_staged(directory / "entries"))
            temporary.mkdir()
        try:
            yield temporary
            for entry in sorted(temporary.iterdir()):
                with _as_output_error(directory / entry.name):
                    _replace(entry, directory / entry.name)
        except GraphcompError as error:
            error.args = tuple(str(text).replace(f"{temporary.name}{os.sep}", "") for text in error.args)
            raise


def settled(directory: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a directory that others may replace meanwhile: all of it old, or all of it new."""
    for _ in range(_TRIES):
        before = _identity(directory)
        try:
            found = read(directory)
        except Exception:
            if _identity(directory) == before:
                raise
            continue
        if _identity(directory) == before:
            return found
    return read(directory)


def unfinished(name: str) -> str | None:
    """What `name` was to become, if it is one that is given to what is being written."""
    match = _UNFINISHED.fullmatch(name)
    return match and match["name"]


def sweep(directory: Path, names: Container[str] | None = None) -> None:
    """Remove what killed processes left unfinished in `directory`; only for who holds its lock.

    Args:
        directory: need not exist.
        names: what may have been written there, None for anything; all else is left alone.

    Raises:
        OutputError: naming what cannot be removed.
    """
    for path in directory.glob(".*"):
        name = unfinished(path.name)
        if name is not None and (names is None or name in names):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or a directory with all in it, if it is there.

    Raises:
        OutputError: naming it and the reason.
    """
    with _as_output_error(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as JSON, as `write_text` does; `read_record` reads it.

    Raises:
        OutputError: naming `path` and the reason.
    """
    write_text(path, record.model_dump_json(indent=2))


def read_record(path: Path, kind: type[R], expected: str) -> R:
    """The record that is stored as JSON in the file `path`.

    Args:
        path: of the file.
        kind: of the record.
        expected: what the file should hold and what to do about it, for the message.

    Raises:
        LoadError: naming file and field, in one line.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}; expected {expected}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise LoadError(f"{path}: {field}: {first['msg']}; expected {expected}") from error


# ---- one process at a time -------------------------------------------------------------------------------


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """For the body `directory` is this process's alone; it is made, and removed again if it stayed empty.

    The system holds the lock, so that it ends with its process, however that ends.

    Raises:
        OutputError: another process works there (the message says which), or nothing can be written.
    """
    directory = directory.resolve()
    with _as_output_error(directory):
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory}: found a file, expected a directory; choose another place")
        absent = [p for p in (directory, *directory.parents) if not p.exists()]
    try:
        with _as_output_error(directory):
            directory.mkdir(parents=True, exist_ok=True)
            lock = _acquired(directory)
        try:
            yield
        finally:
            with suppress(OSError):
                (directory / LOCK).unlink(missing_ok=True)  # while it is held: nobody else's is deleted
            lock.release()
    finally:
        with suppress(OSError):  # not empty
            for path in absent:
                path.rmdir()


def _acquired(directory: Path) -> FileLock:
    file = directory / LOCK
    for _ in range(_TRIES):
        lock = FileLock(file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise OutputError(
                f"{directory}: found another run at work ({_holder(file)}), expected none; wait for it, stop "
                "it, or choose another place"
            ) from None
        try:
            with file.open("r+", encoding="utf-8") as holder:
                holder.truncate()
                json.dump(_this_process(), holder)
            return lock
        except FileNotFoundError:  # locked after its last holder had deleted it: that lock guards no name
            lock.release()
        except BaseException:
            lock.release()
            raise
    raise OutputError(f"{directory}: found a lock that keeps vanishing, expected one that stays; try again")


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _holder(file: Path) -> str:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} since {found['since']}: {found['command']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or other systems hide it
        return "which one is not known"


# ---- parts -----------------------------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    return path.parent / f".{secrets.token_hex(4)}-{path.name}"


@contextmanager
def _staged(final: Path) -> Iterator[Path]:
    """A name beside `final`, whose parents are made; what is still there at the end is removed."""
    temporary = _beside(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _identity(directory: Path) -> tuple[int, int, int] | None:
    """Changes when another directory takes the place; a number alone may be given to the next one made."""
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{path}: found '{reason}', expected a place to write to; nothing was changed there; free some "
            "space or choose another path"
        ) from error


def _check_replaceable(final: Path, replaces: Callable[[Path], bool]) -> None:
    if not final.exists() or (final.is_dir() and (not any(final.iterdir()) or replaces(final))):
        return
    found = "a directory with other content" if final.is_dir() else "a file"
    raise OutputError(f"{final}: found {found}, expected nothing or an older result; choose another path")


def _replace(new: Path, final: Path) -> None:
    """`new` takes the place of whatever is at `final`: who looks there sees one or the other, never none."""
    if not final.exists() or (new.is_file() and final.is_file()):
        new.replace(final)
        return
    if _exchanged(new, final):
        remove(new)
        return
    old = _beside(final)  # there is a moment in which nothing is there
    final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        old.rename(final)
        raise
    remove(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Give each the other's name, in one step; False if the system or this file system cannot."""
    rename = _rename_call()
    if rename is None:
        return False
    ctypes.set_errno(0)
    if rename(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    if (code := ctypes.get_errno()) in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


@cache
def _rename_call() -> Callable[[bytes, bytes], int] | None:
    """Exchanges two paths: renameat2 on Linux, renamex_np on macOS; 0 if that went well, else see errno."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # Windows
        return None
    if hasattr(library, "renameat2"):
        return lambda one, other: library.renameat2(_AT_CWD, one, _AT_CWD, other, ctypes.c_uint(_EXCHANGE))
    if hasattr(library, "renamex_np"):
        return lambda one, other: library.renamex_np(one, other, ctypes.c_uint(_SWAP))
    return None


def _sync(file: Path) -> None:
    """Some file systems report a full disk only here."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
