"""The command line, run in this process."""

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graphcomp.cli import main as command_line


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Cli]:
    """Run `graphcomp ARGS…` in an empty directory."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["graphcomp", *map(str, args)])
        capsys.readouterr()
        code: Any = 0
        try:
            command_line.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with warnings.catch_warnings():  # the command switches them off
        yield run
