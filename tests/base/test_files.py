"""Files and directories that are whole at every moment and one process's at a time."""

import itertools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from graphcomp.base import files
from graphcomp.base.files import (
    LOCK,
    atomic_directory,
    atomic_entries,
    atomic_file,
    locked,
    read_record,
    settled,
    sweep,
    write_texts,
)
from graphcomp.errors import LoadError, OutputError


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_a_failure_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old")
    raised = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised), atomic_file(old) as file:
        file.write_text("half")
        raise error
    with pytest.raises(raised), atomic_directory(tmp_path / "new", bool) as directory:
        (directory / "part").write_text("half")
        raise error
    assert [f.name for f in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "old"


def test_an_output_error_names_path_and_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"x\.json: found 'No space left on device', expected"),
        atomic_file(tmp_path / "x.json"),
    ):
        raise OSError(28, "No space left on device")


def test_atomic_file_makes_parents_keeps_the_suffix_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.onnx"
    for text in ("one", "two"):
        with atomic_file(path) as file:
            assert file.suffix == ".onnx" and file.parent == path.parent
            file.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_atomic_directory_asks_before_it_replaces(tmp_path: Path) -> None:
    final = tmp_path / "run"
    final.mkdir()
    for text in ("one", "two"):
        with atomic_directory(final, lambda d: (d / "mark").is_file()) as new:
            assert not any(new.iterdir())
            (new / "mark").write_text(text)
        assert (final / "mark").read_text() == text
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


# ---- somebody looks, or kills, while it is replaced -------------------------------------------------------

SIZES = (0, 1, 5000, 500_000)


def generation(directory: Path, number: int) -> None:
    for index, size in enumerate(SIZES):
        (directory / f"part{index}").write_text(f"{number}:" + "x" * size)


def replace_directory(place: Path, number: int) -> None:
    with atomic_directory(place / "result", lambda d: True) as new:
        generation(new, number)


def replace_entries(place: Path, number: int) -> None:
    with atomic_entries(place) as new:
        (new / "result").mkdir()
        generation(new / "result", number)


def replace_files(place: Path, number: int) -> None:
    write_texts({place / "result" / "part": f"{number}:" + "x" * SIZES[-1]})


Replace = Callable[[Path, int], None]


@pytest.fixture
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written survives the death of a process, if not that of the machine, without waiting for it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


every_way = pytest.mark.parametrize("replace", [replace_directory, replace_entries, replace_files])


def numbers(directory: Path) -> set[int]:
    """Of which generations the files of a directory are; each is whole."""
    found = {}
    for path in directory.iterdir():
        if not path.name.startswith("."):
            number, _, rest = path.read_text().partition(":")
            found[path.name] = int(number), len(rest)
    sizes = [length for name, (_, length) in sorted(found.items())]
    assert sizes in ([SIZES[-1]], list(SIZES)), found
    return {number for number, _ in found.values()}


@every_way
@pytest.mark.usefixtures("_quick_disk")
@pytest.mark.parametrize("exchange", [True, False])
def test_readers_see_the_old_or_the_new(
    replace: Replace, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system can exchange directories there is never none; elsewhere, never a mixture."""
    if not exchange:
        monkeypatch.setattr(files, "_rename_call", lambda: None)
    replace(tmp_path, 0)
    seen, faults, stop = set(), [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                if not (tmp_path / "result").exists():
                    faults.append("none")
                    continue
                found = settled(tmp_path / "result", numbers)
            except FileNotFoundError:
                faults.append("none")
                continue
            except BaseException as error:
                faults.append(repr(error))
                return
            if len(found) != 1:
                faults.append(str(found))
            seen.update(found)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(1, 60):
        replace(tmp_path, number)
        time.sleep(0.002)
    stop.set()
    reader.join()
    assert len(seen) > 5
    assert set(faults) <= (set() if exchange else {"none"})
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A process that only touches files: importing torch anew would take seconds."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.slow
@every_way
@pytest.mark.usefixtures("_quick_disk")
def test_killed_at_any_moment_leaves_the_old_or_the_new(replace: Replace, tmp_path: Path) -> None:
    random_ = random.Random(0)
    replace(tmp_path, 0)
    started, left = 0, 0
    for _ in range(20):

        def work(first: int = started) -> None:
            # As sudden as kill -9, and after a share of the processor, however busy the machine is.
            signal.setitimer(signal.ITIMER_PROF, random_.uniform(0.004, 0.05))
            for number in itertools.count(first):
                replace(tmp_path, number)

        random_.random()  # here, too: the child's draws are its own
        with forked(work) as child:
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        (last,) = numbers(tmp_path / "result")
        assert last >= started - 1
        started = last + 1
        left += sum(len(list(d.glob(".*"))) for d in (tmp_path, tmp_path / "result"))
        sweep(tmp_path)
        sweep(tmp_path / "result")
        assert [p.name for p in tmp_path.iterdir()] == ["result"]
        assert not list((tmp_path / "result").glob(".*"))
    assert started > 20 and left > 0  # some were killed while they wrote


def test_entries_go_up_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("old")
    (tmp_path / "stays").write_text("old")
    with pytest.raises(ValueError), atomic_entries(tmp_path) as new:
        (new / "b").write_text("half")
        raise ValueError
    assert (tmp_path / "b").read_text() == "old"
    with atomic_entries(tmp_path) as new:
        (new / "a").write_text("a file in place of a directory")
        (new / "b").mkdir()
        (new / "b" / "c").write_text("a directory in place of a file")
    assert (tmp_path / "a").is_file() and (tmp_path / "b" / "c").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "stays"}


def test_errors_name_entries_where_they_were_to_go(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, atomic_entries(tmp_path) as new, atomic_file(new / "model"):
        raise OSError(28, "No space left on device")
    assert str(caught.value).startswith(f"{tmp_path / 'model'}: found 'No space left on device'")


def test_sweep_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    for name in (".0123abcd-model", ".0123abcd-other", ".hidden", "0123abcd-model", ".0123-model"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".89abcdef-model").mkdir()
    sweep(tmp_path, {"model"})
    assert {p.name for p in tmp_path.iterdir()} == {
        ".0123abcd-other",
        ".hidden",
        "0123abcd-model",
        ".0123-model",
    }
    sweep(tmp_path / "absent")


# ---- one process at a time --------------------------------------------------------------------------------


def test_the_second_is_told_who_works_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/graphcomp", "compile", "a model"])
    out = tmp_path / "a" / "out"
    with locked(out):
        for _ in range(2):  # being refused takes nothing from the holder
            with pytest.raises(OutputError) as caught, locked(out):
                raise AssertionError
            expected = (
                f"{out}: found another run at work (process {os.getpid()} on {socket.gethostname()} since 20"
            )
            assert str(caught.value).startswith(expected)
            assert "graphcomp compile 'a model'), expected none; wait for it" in str(caught.value)
        with locked(tmp_path / "a"):  # another directory
            pass
        (out / "result").write_text("x")
    with locked(out):
        pass
    assert [p.name for p in out.iterdir()] == ["result"]


def test_a_directory_that_stayed_empty_goes(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in ("own", "a/b/c"):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / name):
            raise ZeroDivisionError
    assert [p.name for p in tmp_path.rglob("*")] == ["own"]


def test_a_dead_holder_does_not_block(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def work() -> None:
        with locked(tmp_path / "out"):
            ready.write_text("")
            time.sleep(60)

    with forked(work) as child:
        while not ready.exists():
            time.sleep(0.01)
        with pytest.raises(OutputError, match=f"process {child} on "), locked(tmp_path / "out"):
            pass
    assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == child
    with locked(tmp_path / "out"):
        pass
    (tmp_path / "out" / LOCK).write_text("no JSON")
    with locked(tmp_path / "out"):
        (tmp_path / "out" / LOCK).write_text("no JSON")
        with pytest.raises(OutputError, match="which one is not known"), locked(tmp_path / "out"):
            pass


@pytest.mark.slow
def test_only_one_of_many_at_a_time(tmp_path: Path) -> None:
    """Each that gets in writes and reads back; the lock's file comes and goes meanwhile."""
    inside, overlaps, entered = [0], [0], [0]

    def enter() -> None:
        for _ in range(200):
            try:
                with locked(tmp_path / "out"):
                    inside[0] += 1
                    entered[0] += 1
                    time.sleep(0)
                    overlaps[0] += inside[0] != 1
                    inside[0] -= 1
            except OutputError:
                pass

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [0] and entered[0] > 20


def test_a_place_that_is_a_file_or_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OutputError, match="file: found a file, expected a directory"),
        locked(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OutputError, match="found 'Not a directory'"), locked(tmp_path / "file" / "below"):
        pass


class Point(BaseModel):
    x: int
    more: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "the file: Invalid JSON"),
        (b"\xff", "the file: Invalid JSON"),
        (b'{"x": "y"}', "x: Input should be a valid integer"),
        (b'{"x": 1, "more": {"a": ' + b"[" * 100_000, "the file: Invalid JSON: recursion limit exceeded"),
        (b"[" * 100_000, "the file: Invalid JSON: recursion limit exceeded"),
    ],
    ids=range(5),
)
def test_records_that_do_not_read(content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(LoadError) as caught:
        read_record(tmp_path / "r.json", Point, "a point; delete it")
    assert str(caught.value).startswith(f"{tmp_path / 'r.json'}: {found}")
    assert str(caught.value).endswith("; expected a point; delete it") and "\n" not in str(caught.value)
    with pytest.raises(LoadError, match="No such file"):
        read_record(tmp_path / "absent", Point, "a point")
