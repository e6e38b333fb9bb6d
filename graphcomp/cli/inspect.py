"""`graphcomp inspect`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from graphcomp.cli.console import out_console, warn
from graphcomp.cli.options import Inputs, InputShapes, Model, Start, Until, Weights, inputs_of, shapes_of


def inspect_command(
    model: Model,
    weights: Weights = None,
    input_shape: InputShapes = None,
    start: Start = None,
    until: Until = None,
    inputs: Inputs = None,
    join: Annotated[Literal["couple", "pad"], typer.Option("--join", help="policy at additions")] = "couple",
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything as JSON")] = None,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="draw the groups on the network")] = None,
    graphml_file: Annotated[
        Path | None, typer.Option("--graphml", help="write the graph with its groups and costs as GraphML")
    ] = None,
    dot_file: Annotated[Path | None, typer.Option("--dot", help="write it for Graphviz")] = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="also print the program, one node a line")] = False,
) -> None:
    """Show MODEL's nodes, coupled channel groups and why, what is pinned and why, params and MACs."""
    from graphcomp.compiler import load_source
    from graphcomp.inspection import grouped, inspect, render, write_dot, write_graphml, write_json, write_svg
    from graphcomp.ir import Region

    region = Region(start or "", until or "")
    program = load_source(
        model, weights, shapes_of(input_shape), region, inputs_of(inputs), rounding=False
    ).program
    for remark in program.interface.remarks:
        warn(f"{remark[0].upper()}{remark[1:]}.")
    inspection = inspect(program, join)
    if nodes:
        print(program)
    render(inspection, out_console)
    if json_file is not None:
        write_json(inspection, json_file)
    if svg_file is not None:
        write_svg(inspection, svg_file)
    if graphml_file is not None:
        write_graphml(grouped(program, inspection), graphml_file)
    if dot_file is not None:
        write_dot(grouped(program, inspection), dot_file)
