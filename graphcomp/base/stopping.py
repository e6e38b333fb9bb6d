"""Long work that can be stopped: a state file that is always whole, and Ctrl-C between two steps.

A state is one safetensors file: tensors by name, and JSON in its header. No pickle.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from graphcomp.base.files import atomic_file
from graphcomp.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor

KEY = "graphcomp-state"
TWICE = 1.0
"""Seconds within which a second signal is taken for an echo: torchrun passes on what the terminal sent
too."""


def save_state(path: Path, work: str, facts: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> None:
    """Write a state, whole or not at all.

    Args:
        path: of the file; folders on the way are made.
        work: identifies what the state belongs to.
        facts: JSON values.
        tensors: by name; none shares memory with another.

    Raises:
        OutputError: if the disk refuses.
    """
    from safetensors.torch import save_file

    header = {KEY: json.dumps({"work": work, "facts": facts})}
    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(content, temporary, header)


def load_state(path: Path, work: str) -> "tuple[dict[str, Any], dict[str, Tensor]] | None":
    """Facts and tensors of a state; None if there is no file.

    Raises:
        LoadError: if the file is damaged or belongs to other work than `work`.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        found, facts = header["work"], header["facts"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(
            f"{path}: found a damaged file ({error}), expected the state of a training; delete it to start "
            "this pass anew"
        ) from error
    if found != work:
        raise LoadError(
            f"{path}: found the state of another training, expected one of this program, data and options; "
            "delete it to start this pass anew"
        )
    return facts, tensors


class Stop:
    """Whether the user (or the system) asked to stop; true when it is."""

    def __init__(self) -> None:
        self.asked: float | None = None

    def __bool__(self) -> bool:
        return self.asked is not None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within the body Ctrl-C and SIGTERM only set the flag that is yielded; asked again, they end the work.

    The body looks at the flag where it may stop, saves what it needs and raises KeyboardInterrupt; if it ends
    without having looked, that is raised here. Python delivers signals to the main thread only; in another
    one this does nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if stop.asked is not None and now - stop.asked > TWICE:
            raise KeyboardInterrupt
        stop.asked = stop.asked or now

    heard = (s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in (signal.SIG_IGN, None))
    before = {s: signal.signal(s, ask) for s in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop:
        raise KeyboardInterrupt
