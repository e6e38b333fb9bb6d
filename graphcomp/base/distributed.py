"""One run in several processes: `torchrun --nproc-per-node 2 -m graphcomp compile …`.

Every process does the same steps. What looks at data takes its share of the batches, and the sums are added
up; what was decided comes from the first process, so that the others cannot disagree; only the first one
prints, writes files and takes times, while the others wait. Without torchrun every function here is that of a
single process and costs nothing.

The functions that communicate are collective: each process has to call them, in the same order. They also
work in a group that the caller made with `torch.distributed.init_process_group`.

What two processes would not do alike (to measure a time, to look into a folder, to decide by either) is done
by the first one alone, `on_first`, and all have its result or its failure. Whatever reads a clock to decide
by calls `require_first`, so that none can forget.

torch is imported by what communicates only: a single process need not load it to know that it is alone.

On CPUs the processes talk by gloo. With a GPU for each process of a machine they calibrate on the GPUs and
talk by nccl; that path **has not yet been run**.
"""

import copy
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from graphcomp.errors import DistributedError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process of a run."""

MEETING = timedelta(minutes=10)
"""Until all processes have started."""

SAYING = timedelta(seconds=10)
"""Until the process that speaks for all has said what is wrong."""

TIMEOUT = timedelta(days=1)
"""Others wait this long while the first process exports and benchmarks; a lost process is noticed at once."""

_store: "Store | None" = None
_alone = 0
"""How many `on_first` this process is inside of."""


def launched() -> bool:
    """Whether torchrun (or something like it) started this process as one of a run."""
    return all(name in os.environ for name in VARIABLES)


@contextmanager
def session() -> Iterator[None]:
    """Join the other processes for the body, if there are any; see `join`."""
    join()
    yield
    leave()  # not after an error: the others may not be in a state to answer


def join() -> None:
    """Meet the other processes that torchrun started; nothing without torchrun or in an existing group.

    Raises:
        DistributedError: if they cannot be reached.
    """
    global _store
    if not launched() or _active():
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous  # absent from builds without torch.distributed

    try:
        _store, index, count = next(iter(rendezvous("env://", timeout=MEETING)))
        dist.init_process_group(_backend(), store=_store, rank=index, world_size=count, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        found = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
        raise DistributedError(
            f"processes: found {error} at {found}, expected all to meet there; start them with torchrun"
        ) from error


def leave() -> None:
    """End what `join` began; nothing in a group that the caller made."""
    global _store
    if _store is not None:
        import torch.distributed as dist

        _store = None
        dist.destroy_process_group()


def _backend() -> str:
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if gpus < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) or "LOCAL_RANK" not in os.environ:
        return "gloo"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "cpu:gloo,cuda:nccl"


def _active() -> bool:
    if _alone or "torch.distributed" not in sys.modules:  # who made a group has loaded it
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process; 0 is the one that prints and writes."""
    if not _active():
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def world_size() -> int:
    """How many processes there are."""
    if not _active():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def device() -> "torch.device":
    """Where this process computes: its own GPU in a group that has nccl, else the CPU."""
    import torch
    import torch.distributed as dist

    if _active() and "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def share(samples: int, batch: int) -> "NDArray[np.int64]":
    """Positions below `samples` that this process looks at: every `world_size`-th batch, none twice.

    They are cut at the same places as one process would cut them, so that each batch is the same batch.
    """
    import numpy as np

    batches = np.arange(samples) // batch
    return np.flatnonzero(batches % world_size() == rank())


def all_reduce(tensors: "Iterable[torch.Tensor]") -> None:
    """Add up each tensor over all processes, in place; collective.

    Raises:
        DistributedError: if another process failed.
    """
    if world_size() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            _collective(partial(dist.all_reduce, tensor))


def broadcast(value: T) -> T:
    """The first process's value, in all processes; collective. It has to be picklable.

    Raises:
        DistributedError: if another process failed.
    """
    if world_size() == 1:
        return value
    import torch.distributed as dist

    box = [value if is_first() else None]
    _collective(lambda: dist.broadcast_object_list(box, src=0))
    return cast(T, box[0])


@dataclass(frozen=True)
class _Failed:
    """What a call raised, for the other processes."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> "_Failed":
        try:
            pickle.dumps(error)
            copy.copy(error)  # made anew as unpickling does
        except Exception:  # whatever an exception of somebody else's does in its __reduce__ or __init__
            return cls(
                DistributedError(f"process 0: found {type(error).__name__}: {error}, expected no error")
            )
        return cls(error)


def on_first(call: Callable[[], T]) -> T:
    """Call in the first process only, for its result in all processes, or its failure; collective.

    The result has to be picklable. While it works the first process is alone: what is collective otherwise
    is that of a single process there, since the others only wait.

    Raises:
        Exception: what the call raised, in all processes.
        DistributedError: if another process failed.
    """
    if world_size() == 1:
        return call()
    if not is_first():
        answer = broadcast(None)
        if isinstance(answer, _Failed):
            raise answer.error
        return cast(T, answer)
    try:
        with _by_itself():
            result = call()
    except Exception as error:
        broadcast(_Failed.of(error))
        raise
    return broadcast(result)


@contextmanager
def _by_itself() -> Iterator[None]:
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def require_first(what: str) -> None:
    """Refuse what would be another result in every process.

    Raises:
        DistributedError: in any but the first process.
    """
    if not is_first():
        raise DistributedError(
            f"{what}: found it in process {rank()} of {world_size()}, expected the first one only, whose "
            "result all use; this is a bug: it belongs inside of `distributed.on_first`"
        )


def _collective(call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:
        raise DistributedError(
            f"process {rank()} of {world_size()}: found no answer from another process ({error}), expected "
            "all to run to the end; look for its message above"
        ) from error


def said() -> None:
    """Tell those that wait in `wait_until_said` that the user knows what is wrong."""
    if _store is not None:
        with suppress(RuntimeError):
            _store.set("graphcomp/said", "")


def wait_until_said() -> None:
    """Stay until another process has said what is wrong: the end of one is the end of all."""
    if _store is not None:
        with suppress(RuntimeError):  # it is gone, or says nothing
            _store.wait(["graphcomp/said"], SAYING)


def is_first_to_fail() -> bool:
    """Whether no other process failed before this one: then it tells the user why; the others are silent."""
    if _store is None:
        return True
    try:
        return _store.add("graphcomp/failed", 1) == 1
    except RuntimeError:  # the process that kept the store is gone, so it failed first
        return False
