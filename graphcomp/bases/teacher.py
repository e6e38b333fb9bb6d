"""Whom a pass learns from: an earlier program of the run, or a saved one."""

from collections.abc import Sequence
from pathlib import Path

from graphcomp.errors import PassError
from graphcomp.ir import Program, load
from graphcomp.pipeline import Context


def find_step(asked: str | int, names: Sequence[str]) -> int | None:
    """The number of a step by its number or its name (the last one of that name); None if it is none."""
    if isinstance(asked, int):
        return asked if 0 <= asked < len(names) else None
    found = [i for i, known in enumerate(names) if known == asked]
    return found[-1] if found else None


def load_step(context: Context, index: int) -> tuple[str, Program]:
    """Who it is, for people, and the program."""
    label = f"step {index} ({context.earlier[index].name})" if index else "the run's input"
    return label, context.earlier[index].load()


def no_such_step(what: str, names: Sequence[str], advice: str = "") -> PassError:
    """The error where an earlier program is asked for that there is not."""
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names)) or "none"
    return PassError(
        f"teacher: did not find {what}, expected a step of this run before this pass (known: {known}) or the "
        f"directory of a saved program{advice}"
    )


def load_saved(place: str) -> Program:
    """The program that was saved in a directory."""
    return load(Path(place))
