"""Tasks side by side: one after the other in this process, in processes of this machine, or on Ray.

A task that fails, or whose process dies, is a `Failure` among the results; the others go on. A process does
one task after the other on its own threads, and ends when this one ends.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from graphcomp.errors import GraphcompError, RecipeError

Engine = Literal["local", "ray"]
Result = TypeVar("Result")
Tell = Callable[[str, float], None]
"""How far a task is: a message and a fraction."""
Task = Callable[[Tell], Result]
Told = Callable[[str, str, float], None]
"""How far which task is."""

EVERY = 0.2
"""Seconds between two messages of a process."""
START = "forkserver" if sys.platform == "linux" else "spawn"
"""How processes begin. The fork server imports once for all of them; it must not have computed anything."""
PRELOADED = ["graphcomp.compiler.compiler", "graphcomp.base.workers"]
PATIENCE = 60.0
"""Seconds that a process has to save its state when it is interrupted."""


@dataclass(frozen=True)
class Failure:
    """Why a task has no result: one line, and the traceback (empty if there is none)."""

    message: str
    trace: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """What an exception says."""
        named = isinstance(error, GraphcompError) and str(error)
        message = str(error) if named else f"{type(error).__name__}: {error}".rstrip(": ")
        return cls(message, "".join(traceback.format_exception(error)))


def run_tasks(
    tasks: Mapping[str, Task[Result]], engine: Engine, workers: int, threads: int, told: Told
) -> Generator[tuple[str, Result | Failure]]:
    """Do all tasks and yield each result when it is there.

    Args:
        tasks: by name; for more than one worker, and for Ray, they have to be picklable.
        engine: `local`, or `ray`: a running cluster that `RAY_ADDRESS` names, else a local one.
        workers: tasks at a time. One on `local`: in this process. Ray counts cores instead.
        threads: of each task, at most; on Ray no more than the largest node has cores, or it would never
            begin.
        told: how far a task is; not called by Ray.

    Raises:
        RecipeError: Ray is asked for and not installed.
        KeyboardInterrupt: after all processes have ended.
    """
    if engine == "ray":
        return _on_ray(_ray(), tasks, threads)
    return _in_turn(tasks, threads, told) if workers == 1 else run_in_processes(tasks, workers, threads, told)


def _in_turn(
    tasks: Mapping[str, Task[Result]], threads: int, told: Told
) -> Generator[tuple[str, Result | Failure]]:
    import torch

    before = torch.get_num_threads()
    _limit(threads)
    try:
        for name, task in tasks.items():
            yield name, _attempt(task, partial(told, name))
    finally:
        torch.set_num_threads(before)


def _limit(threads: int) -> None:
    """No more threads for torch than these, nor than its user lets it have (`OMP_NUM_THREADS`)."""
    import torch

    torch.set_num_threads(min(threads, torch.get_num_threads()))


def _attempt(task: Task[Result], tell: Tell) -> Result | Failure:
    try:
        return task(tell)
    except Exception as error:
        return Failure.of(error)


# ---------------------------------------------------------------------- processes


class _Worker:
    """A process that does tasks, and the name of the one that it is busy with."""

    def __init__(self, threads: int) -> None:
        context: Any = multiprocessing.get_context(START)  # the method is not known to the type checker
        context.set_forkserver_preload(PRELOADED)
        self.connection, theirs = context.Pipe()
        surroundings = dict(os.environ), Path.cwd()  # the fork server's are older
        self.process = context.Process(target=_serve, args=(theirs, threads, *surroundings), daemon=True)
        self.process.start()
        theirs.close()  # so that its death ends the connection
        self.task: str | None = None

    def start(self, name: str, task: Task[Any]) -> None:
        self.task = name
        with suppress(BrokenPipeError):  # already dead: `receive` says so
            self.connection.send(task)

    def receive(self) -> tuple[str, Any]:
        """("told", (message, fraction)) or ("done", result)."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            return "died", Failure(
                f"its process ended with exit code {code}, expected a result; -9: the system killed it, "
                "perhaps for lack of memory: try fewer workers"
            )
        return kind, content

    def interrupt(self) -> None:
        """Ask for an end; a task that can be resumed saves its state.

        A busy one is asked by a signal and may go on talking until it has ended. To the others, and where
        there are no such signals, the end of the connection says it (`_Telling`).
        """
        if self.task is not None and self.process.is_alive() and self.process.pid and os.name == "posix":
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)
        else:
            self.connection.close()

    def end(self, deadline: float) -> None:
        """Wait for the end until `deadline`, then force it; what it still says goes unheard."""
        while not self.connection.closed and time.monotonic() < deadline:
            if self.process.sentinel in wait(
                [self.connection, self.process.sentinel], deadline - time.monotonic()
            ):
                break
            with suppress(EOFError, OSError):
                self.connection.recv_bytes()
                continue
            break
        self.connection.close()
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def run_in_processes(
    tasks: Mapping[str, Task[Result]], workers: int, threads: int, told: Told
) -> Generator[tuple[str, Result | Failure]]:
    """`run_tasks` on `local`, in other processes than this one even if one is enough."""
    left = deque(tasks.items())
    crew: list[_Worker] = []
    try:
        while True:
            while left and len(crew) < workers:
                crew.append(_Worker(threads))
                crew[-1].start(*left.popleft())
            if not crew:
                return
            ready = wait([worker.connection for worker in crew])
            for worker in [w for w in crew if w.connection in ready]:
                kind, content = worker.receive()
                name = worker.task
                assert name is not None
                if kind == "told":
                    told(name, *content)
                    continue
                worker.task = None
                if kind == "done" and left:
                    worker.start(*left.popleft())
                else:
                    crew.remove(worker)
                    _dismiss([worker])
                yield name, content
    finally:
        _dismiss(crew)


def _dismiss(crew: list[_Worker]) -> None:
    deadline = time.monotonic() + PATIENCE
    for worker in crew:
        worker.interrupt()
    for worker in crew:
        worker.end(deadline)


def _serve(connection: Connection, threads: int, environment: Mapping[str, str], folder: Path) -> None:
    """What a process does: tasks, until nobody gives it another one."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _limit(threads)
    with suppress(EOFError, OSError, KeyboardInterrupt), connection:
        while True:
            task = connection.recv()
            connection.send(("done", _attempt(task, _Telling(connection))))


class _Telling:
    """Sends messages, but not too many.

    Where nobody listens any more the task is asked to end, once, as by Ctrl-C: at a place where it loses
    nothing. An error here would end it in the middle of a step.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection, self.last, self.is_heard = connection, 0.0, True

    def __call__(self, message: str, fraction: float) -> None:
        if not self.is_heard or time.monotonic() - self.last < EVERY:
            return
        self.last = time.monotonic()
        try:
            self.connection.send(("told", (message, fraction)))
        except OSError:
            self.is_heard = False
            signal.raise_signal(signal.SIGINT)


# ---------------------------------------------------------------------- Ray


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise RecipeError(
            f"engine: ray: found {error}, expected Ray; pip install 'graphcomp[ray]', or use engine: local"
        ) from error
    module: ModuleType = ray  # Any where it is not installed
    return module


def _on_ray(
    ray: Any, tasks: Mapping[str, Task[Result]], threads: int
) -> Generator[tuple[str, Result | Failure]]:
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    threads = min(threads, _largest(ray) or threads)
    remote = ray.remote(num_cpus=threads, max_retries=0)(_far)
    running = {remote.remote(task, threads, Path.cwd()): name for name, task in tasks.items()}
    try:
        while running:
            (done, *_), _ = ray.wait(list(running))
            name = running.pop(done)
            try:
                yield name, ray.get(done)
            except ray.exceptions.RayError as error:
                yield name, Failure.of(error)
    finally:
        for reference in running:
            ray.cancel(reference)  # as by Ctrl-C; those that can be resumed save their state
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)


def _largest(ray: Any) -> int:
    """The cores of the node that has most; 0 while none has any (they may come on demand)."""
    return max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)


def _far(task: Task[Result], threads: int, folder: Path) -> Result | Failure:
    """A task in a process of Ray, which starts elsewhere."""
    os.chdir(folder)
    _limit(threads)
    return _attempt(task, lambda message, fraction: None)
