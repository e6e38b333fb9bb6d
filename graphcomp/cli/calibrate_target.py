"""`graphcomp calibrate-target`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from graphcomp.cli.console import out_console, progress_shown


def calibrate_target_command(
    target: Annotated[str, typer.Option("--target", help="auto or a target's name")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    networks: Annotated[
        str, typer.Option("--networks", help="of torchvision, to compare predictions with; empty: none")
    ] = "resnet18,mobilenet_v2",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result as JSON")] = None,
) -> None:
    """Measure how widths become time on this machine, and how well times are predicted."""
    from graphcomp.base import write_text
    from graphcomp.budget import calibrate, tables
    from graphcomp.runtime import find_target

    names = [name.strip() for name in networks.split(",") if name.strip()]
    with progress_shown() as progress:
        found = calibrate(find_target(target), threads, names, progress)
    for table in tables(found):
        out_console.print(table)
    if json_file is not None:
        write_text(json_file, json.dumps(found.as_json(), indent=2))
