"""`graphcomp explain`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from graphcomp.cli.console import out_console, progress_shown
from graphcomp.cli.options import InputShapes, shapes_of


def explain_command(
    base: Annotated[Path, typer.Argument(help="ONNX file of the original")],
    new: Annotated[Path, typer.Argument(help="ONNX file of the compressed network")],
    provider: Annotated[Literal["cpu", "cuda", "tensorrt"], typer.Option("--provider")] = "cpu",
    batch: Annotated[int, typer.Option("--batch", min=1, help="samples a run")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    runs: Annotated[int, typer.Option("--runs", min=1, help="timed runs of each model at most")] = 200,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="seconds of timing at most")] = 10.0,
    input_shape: InputShapes = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result as JSON")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw the waterfall")] = None,
) -> None:
    """Say why NEW is not as much faster than BASE as it is smaller: by reason, by layer and by pass."""
    from graphcomp.base import write_text
    from graphcomp.explanation import explain
    from graphcomp.report import describe, layer_table, part_table, waterfall_file

    with progress_shown() as progress:
        found = explain(
            base, new, provider=provider, batch=batch, threads=threads, runs=runs, seconds=seconds,
            input_shapes=shapes_of(input_shape), progress=progress,
        )  # fmt: skip
    for line in describe(found):
        out_console.print(line)
    out_console.print(part_table(found))
    out_console.print(layer_table(found))
    for file, text in ((json_file, found.model_dump_json(indent=2)), (svg_file, waterfall_file(found))):
        if file is not None:
            write_text(file, text)
