"""The command line: `main.main()` runs it."""

from graphcomp.cli import main

__all__ = ["main"]
