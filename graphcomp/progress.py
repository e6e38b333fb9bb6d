"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Told what is going on and which fraction is done."""


def quiet(message: str, fraction: float) -> None:
    """A progress callback that says nothing."""
