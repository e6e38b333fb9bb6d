"""What the command line shows: text without markup, progress, warnings, errors."""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# What is shown holds names that users chose: no text is markup, an emoji code, or highlighted as code.
out_console, err_console = (
    Console(stderr=stderr, markup=False, emoji=False, highlight=False) for stderr in (False, True)
)


def tell(kind: str, style: str, text: str) -> None:
    """`kind: text` on stderr, whole: a terminal wraps it, a file keeps it on one line."""
    err_console.print(Text.assemble((f"{kind}:", style), " ", text), soft_wrap=True)


def warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Shown as warnings are."""
    tell("warning", "yellow", str(message))


def interrupted(error: KeyboardInterrupt) -> None:
    """A pass that was stopped says itself how far it came."""
    text = str(error) or "finished passes are kept; the same command with --resume goes on"
    tell("interrupted", "", text)


_COUNTS = re.compile(r"(?<![\w\[/])\d[\d,.:%]*")
"""Numbers that change while one thing is done ("250 of 1,000"), not those of a step ("[1/2]", "l1")."""

EVERY = 30.0
"""Seconds after which what counts on is printed again, where there is no bar."""


@contextmanager
def progress_shown() -> Iterator[Any]:
    """A bar on a terminal, plain lines elsewhere."""
    if not err_console.is_terminal:
        shown: dict[str, float] = {}
        started = time.monotonic()

        def line(message: str, fraction: float) -> None:
            kind, now = _COUNTS.sub("#", message), time.monotonic()
            if now - shown.get(kind, -math.inf) >= EVERY and not message.startswith("benchmark: "):
                shown[kind] = now
                left = time_left(now - started, fraction)
                err_console.print(f"{fraction:4.0%}  {message}{left}", soft_wrap=True)

        yield line
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:", style="dim"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err_console, transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        yield lambda message, fraction: bar.update(task, description=message, completed=fraction)


def time_left(seconds: float, fraction: float) -> str:
    """How long the rest takes if it goes on as fast; nothing before that says anything."""
    if seconds < EVERY or not 0.02 <= fraction < 1:
        return ""
    left = seconds * (1 - fraction) / fraction
    return f" (about {left / 60:.0f} min left)" if left >= 90 else f" (about {left:.0f} s left)"
