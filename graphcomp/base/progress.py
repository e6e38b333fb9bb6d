"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Told what is going on and which fraction is done."""


def quiet(message: str, fraction: float) -> None:
    """A progress callback that says nothing."""


def part(progress: Progress, start: float, share: float, prefix: str = "") -> Progress:
    """A callback for some of the work: its own 0 to 1 is `share` of the whole, from `start` on."""
    return lambda message, fraction: progress(prefix + message, start + share * fraction)
