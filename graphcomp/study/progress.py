"""How far a study is: bars with the time that is left on a terminal, a line a cell elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from graphcomp.base import Failure


class CellProgress:
    """Shows cells; `told` and `ended` are what `run_study` calls.

    Args:
        console: to print on.
        total: cells to run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.started = time.monotonic()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # A cell may take an hour: the speed is that of all cells so far.
        self.bars = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=1e9,
        )
        self.cells: dict[str, TaskID] = {}
        self.all = self.bars.add_task("cells", total=total)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def told(self, name: str, message: str, fraction: float) -> None:
        """A cell is at a fraction of its run."""
        if name not in self.cells:
            self.cells[name] = self.bars.add_task(name, total=100)
        self.bars.update(self.cells[name], description=f"{name}: {message}", completed=int(100 * fraction))

    def ended(self, name: str, failure: Failure | None) -> None:
        """A cell has ended."""
        self.done += 1
        if name in self.cells:
            self.bars.remove_task(self.cells.pop(name))
        self.bars.update(self.all, completed=self.done)
        state = f"failed: {failure.message}" if failure else "done"
        self.console.print(Text(f"{self.done}/{self.total} {name}: {state}{self._left()}"), soft_wrap=True)

    def _left(self) -> str:
        """An estimate from the cells that have ended; the bar has its own."""
        if self.console.is_terminal or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return f" (about {seconds / 60:.0f} min left)" if seconds >= 60 else f" (about {seconds:.0f} s left)"
