"""Tasks in this process, in several, and on Ray."""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from graphcomp.base import stopping, workers
from graphcomp.base.stopping import stoppable
from graphcomp.base.workers import EVERY, Engine, Tell, run_tasks
from graphcomp.errors import DataError, RecipeError

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------- tasks


def double(value: int, tell: Tell) -> tuple[int, int, int]:
    tell("half way", 0.5)
    return 2 * value, torch.get_num_threads(), os.getpid()


def fail(tell: Tell) -> int:
    raise DataError("data: found none, expected some")


def divide(tell: Tell) -> float:
    return 1 / 0


def die(tell: Tell) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_long(folder: Path, tell: Tell) -> None:
    """Until somebody interrupts; says that it was."""
    try:
        (folder / "started").touch()
        time.sleep(120)
    except KeyboardInterrupt:
        (folder / "interrupted").touch()
        raise


def train(folder: Path, tell: Tell) -> None:
    """Steps that tell how far they are and take a while; looks whether to stop after each, and saves."""
    with stoppable() as stop:
        while True:
            (folder / "started").touch()
            for part in range(4):
                time.sleep(1.5 * EVERY)
                tell(f"part {part}", part / 4)
            if stop:
                (folder / "saved").touch()
                raise KeyboardInterrupt


def done(
    tasks: dict[str, Callable[[Tell], Any]], engine: Engine = "local", workers: int = 1, threads: int = 1
) -> tuple[dict[str, Any], list[Any]]:
    told: list[Any] = []
    results = dict(run_tasks(tasks, engine, workers, threads, lambda *args: told.append(args)))
    assert set(results) == set(tasks)
    return results, told


def check_failures(results: dict[str, Any]) -> None:
    """Messages of ours as they are, those of others with their type; and where they come from."""
    assert results["fails"].message == "data: found none, expected some"
    assert results["divides"].message == "ZeroDivisionError: division by zero"
    assert "in divide" in results["divides"].trace


# ---------------------------------------------------------------------- here


def test_in_turn() -> None:
    before = torch.get_num_threads()
    results, told = done({"a": partial(double, 1), "fails": fail, "divides": divide, "b": partial(double, 2)})
    assert (results["a"], results["b"]) == ((2, 1, os.getpid()), (4, 1, os.getpid()))
    check_failures(results)
    assert told == [("a", "half way", 0.5), ("b", "half way", 0.5)]
    assert torch.get_num_threads() == before


def test_threads_of_a_task() -> None:
    """Its share, and no more than torch may have: a user says so by OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [done({"a": partial(double, 1)}, threads=n)[0]["a"][1] for n in (2, 8)] == [2, 3]
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------- processes


def test_processes() -> None:
    """A failure, even a death, ends its own task only; processes are used again."""
    tasks: dict[str, Callable[[Tell], Any]] = {
        "fails": fail, "dies": die, "divides": divide, **{str(i): partial(double, i) for i in range(5)},
    }  # fmt: skip
    results, told = done(tasks, workers=2)
    check_failures(results)
    assert "its process ended with exit code -9" in results["dies"].message
    assert [results[str(i)][0] for i in range(5)] == [0, 2, 4, 6, 8]
    processes = {results[str(i)][2] for i in range(5)}
    assert os.getpid() not in processes and len(processes) <= 2
    assert ("0", "half way", 0.5) in told


def test_interrupted(tmp_path: Path) -> None:
    """Nobody waits for the results any more: the processes are interrupted, and have ended."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    tasks = {"dies": die} | {f.name: partial(wait_long, f) for f in folders}
    results = run_tasks(tasks, "local", 3, 1, lambda *_: None)
    assert next(results)[0] == "dies"
    while not all((f / "started").exists() for f in folders):
        time.sleep(0.02)
    results.close()
    assert all((f / "interrupted").exists() for f in folders)


def test_a_task_that_is_stopped_may_talk_until_it_has_saved(tmp_path: Path) -> None:
    """The end comes in the middle of a step: what it still tells is no reason to lose what it trained."""
    results = run_tasks({"dies": die, "trains": partial(train, tmp_path)}, "local", 2, 1, lambda *_: None)
    assert next(results)[0] == "dies"
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    results.close()
    assert (tmp_path / "saved").exists()


def test_a_task_has_a_minute_to_save() -> None:
    """Steps of large networks take seconds, and who pressed Ctrl-C does not wait for minutes."""
    given: list[float] = []

    class Busy:
        def interrupt(self) -> None: ...

        def end(self, deadline: float) -> None:
            given.append(deadline - time.monotonic())

    workers._dismiss([Busy(), Busy()])  # type: ignore[list-item]
    assert len(given) == 2 and all(20 < seconds < 200 for seconds in given)


def test_a_task_that_nobody_listens_to_is_asked_to_stop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C, which it may hear at the end of its step; asked again it would end at once."""
    monkeypatch.setattr(workers, "EVERY", 0.0)
    monkeypatch.setattr(stopping, "TWICE", -1.0)  # no signal is taken for an echo
    ours, theirs = Pipe()
    tell, heard = workers._Telling(theirs), list[bool]()
    tell("heard", 0.0)
    assert ours.recv() == ("told", ("heard", 0.0))
    ours.close()
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:
        for _ in range(3):
            tell("unheard", 0.5)
            heard.append(bool(stop))
        raise KeyboardInterrupt
    assert heard == [True] * 3
    theirs.close()


# ---------------------------------------------------------------------- Ray


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"engine: ray: found .*; pip install 'graphcomp\[ray\]', or use"):
        done({"a": partial(double, 1)}, "ray")
