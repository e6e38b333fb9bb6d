"""`graphcomp evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from graphcomp.cli.console import out_console, progress_shown
from graphcomp.cli.options import Inputs, InputShapes, Model, Weights, inputs_of, refuse_idle, shapes_of
from graphcomp.errors import RecipeError


def evaluate_command(
    context: typer.Context,
    model: Model,
    data: Annotated[
        str | None, typer.Option("--data", help="as for compile; default: what comes with the model")
    ] = None,
    weights: Weights = None,
    input_shape: InputShapes = None,
    inputs: Inputs = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="also on images that are blurred, hidden, dark or bright")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of damage and of ?limit=N")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result as JSON")] = None,
) -> None:
    """Show how good MODEL is on the evaluation data: top-1 accuracy, or the mean error of values."""
    from graphcomp.base import write_record
    from graphcomp.compiler import RobustnessOptions, evaluate_source, load_source, open_data
    from graphcomp.report import evaluation_table

    source = load_source(model, weights, shapes_of(input_shape), arguments=inputs_of(inputs))
    spec = data or source.data
    if spec is None:
        raise RecipeError("--data: found none, expected labelled data such as cifar10:DIR to evaluate on")
    if not robustness and "limit=" not in spec and not spec.startswith("random"):
        where = f"with {spec}, all of which is used,"
        refuse_idle(context, where, {"seed": "--seed"}, "add --robustness or ?limit=N, or leave it out")
    loaded = open_data(spec, source.program, seed)
    corruptions = RobustnessOptions().corruptions() if robustness else []
    with progress_shown() as progress:
        found = evaluate_source(
            source, loaded, model=model, corruptions=corruptions, seed=seed, progress=progress
        )
    out_console.print(evaluation_table(found))
    if json_file is not None:
        write_record(json_file, found)
