"""Files and directories that are there whole or not at all, whatever they hold."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from graphcomp.errors import OutputError


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
    temporary = _beside(final)
    with _as_output_error(final):
        _check_replaceable(final, replaces)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            _replace_directory(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, that replaces `path` if the body ends well, else is removed.

    Raises:
        OutputError: naming `path` and the reason, for any OSError of the body (so only write in it).
    """
    path = path.resolve()
    temporary = _beside(path)
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


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
    staged: dict[Path, Path] = {}
    try:
        for path, text in texts.items():
            with _as_output_error(path):
                final = path.resolve()
                final.parent.mkdir(parents=True, exist_ok=True)
                staged[final] = _beside(final)
                staged[final].write_text(text, encoding="utf-8", newline="\n")
                _sync(staged[final])
        for final, temporary in staged.items():
            with _as_output_error(final):
                temporary.replace(final)
    finally:
        for temporary in staged.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.parent / f".{secrets.token_hex(4)}-{path.name}"


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


def _replace_directory(new: Path, final: Path) -> None:
    if not final.exists():
        new.rename(final)
        return
    old = _beside(final)
    final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(file: Path) -> None:
    """Some file systems report a full disk only here."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
