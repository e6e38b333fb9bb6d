"""Arguments that several commands have, and what is read from them."""

from pathlib import Path
from typing import Annotated

import typer

from graphcomp.errors import RecipeError

Model = Annotated[
    str, typer.Argument(help="torchvision:NAME, models:NAME, path/to/file.py:factory or a saved program")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="safetensors, or a state dict saved by torch.save")
]
InputShape = Annotated[str | None, typer.Option("--input-shape", help="with the batch, e.g. 1,3,224,224")]


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Of one sample; RecipeError if the text is no shape."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise RecipeError(
            f"--input-shape: found {text!r}, expected positive sizes with the batch, e.g. 1,3,224,224"
        )
    return (1, *shape[1:])


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, whatever its value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_idle(context: typer.Context, where: str, options: dict[str, str], advice: str) -> None:
    """RecipeError if an option stands there that changes nothing; `options`: parameter -> option."""
    for name, option in options.items():
        if _given(context, name):
            raise RecipeError(f"{option}: found it {where}, where it has no effect, expected one; {advice}")
