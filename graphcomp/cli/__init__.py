"""The command line."""

from graphcomp.cli.app import main

__all__ = ["main"]
