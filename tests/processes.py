"""Run a function of a test in several processes of one group, on this machine's CPU."""

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

T = TypeVar("T")


def in_processes(count: int, function: Callable[..., T], *args: Any) -> list[T]:
    """What `function(*args)` returns in each of `count` processes; it has to be at the top of a module."""
    with tempfile.TemporaryDirectory() as folder:
        # forked from a server that has imported everything once, and not from a process that runs tests
        multiprocessing.set_forkserver_preload([function.__module__])
        mp.start_processes(  # type: ignore[no-untyped-call]
            _run, (count, folder, function, args), nprocs=count, start_method="forkserver"
        )
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(count)]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=count, timeout=timedelta(minutes=2)
    )
    torch.save(function(*args), Path(folder) / str(rank))
    dist.destroy_process_group()
