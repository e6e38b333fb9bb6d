"""Keeping what libraries print, log and warn off the terminal, for one thread only.

`contextlib.redirect_stdout`, handlers that are taken off loggers, and `warnings.catch_warnings` change the
whole process: what other threads say meanwhile is lost with it. The hooks here ask which thread speaks. They
are in place while some thread is muted, and pass on what any other one says.
"""

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["muted"]

NOISY = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime")
"""Loggers that a muted thread does not hear from, with all below them."""

_local = threading.local()
_lock = threading.Lock()


def _sink() -> io.StringIO | None:
    """What this thread says goes there; None if it is not muted."""
    return getattr(_local, "sink", None)


class _Stream:
    """A stream that a muted thread does not reach."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        sink = _sink()
        written: int = (self._stream if sink is None else sink).write(text)
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _LogFilter(logging.Filter):
    """On handlers, not on loggers: those that are made meanwhile have the handlers of their parents."""

    def filter(self, record: logging.LogRecord) -> bool:
        sink = _sink()
        if sink is None or record.name.partition(".")[0] not in NOISY:
            return True
        sink.write(f"{record.getMessage()}\n")
        return False


class _MutedThread:
    """Stands for the pattern of a message in a filter of warnings; matches whatever a muted thread says."""

    def match(self, text: str, *_: Any) -> bool:
        return _sink() is not None


class _Hooks:
    """In place while a thread is muted."""

    def __init__(self) -> None:
        self.threads = 0
        self.logs, self.handlers = _LogFilter(), list[logging.Handler]()
        self.warnings: Any = ("ignore", _MutedThread(), Warning, None, 0)

    def install(self) -> None:
        """For every thread anew: another one may have replaced streams, handlers or filters meanwhile."""
        self.threads += 1
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, _Stream):
                setattr(sys, name, _Stream(stream))
        for handler in _handlers():
            handler.addFilter(self.logs)
            self.handlers.append(handler)
        if self.warnings not in warnings.filters:
            warnings.filters.insert(0, self.warnings)  # type: ignore[attr-defined]

    def remove(self) -> None:
        """With the last thread; what another one has put in place meanwhile stays."""
        self.threads -= 1
        if self.threads:
            return
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, _Stream):
                setattr(sys, name, stream._stream)
        for handler in self.handlers:
            handler.removeFilter(self.logs)
        self.handlers.clear()
        with contextlib.suppress(ValueError):
            warnings.filters.remove(self.warnings)  # type: ignore[attr-defined]


_hooks = _Hooks()


def _handlers() -> list[logging.Handler]:
    """All that a record of a noisy logger may reach."""
    known = logging.root.manager.loggerDict.items()
    loggers = [one for name, one in list(known) if name.partition(".")[0] in NOISY]
    found = [h for one in loggers if isinstance(one, logging.Logger) for h in one.handlers]
    last = [logging.lastResort] if logging.lastResort else []
    return list(dict.fromkeys([*logging.root.handlers, *found, *last]))


@contextlib.contextmanager
def muted() -> Iterator[io.StringIO]:
    """Nothing that this thread prints, warns, or logs under the names of `NOISY` is seen; yields its text.

    Warnings are dropped, even where they are errors. What other threads say is left alone, and so is what is
    written past `sys.stdout` and `sys.stderr`, by code in C.
    """
    outer, sink = _sink(), io.StringIO()
    with _lock:
        _hooks.install()
    _local.sink = sink
    try:
        yield sink
    finally:
        _local.sink = outer
        with _lock:
            _hooks.remove()
