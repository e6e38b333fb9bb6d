"""Arguments that several commands have, and what is read from them."""

from pathlib import Path
from typing import Annotated

import typer

from graphcomp.errors import RecipeError

Model = Annotated[
    str, typer.Argument(help="torchvision:NAME, models:NAME, file.py:factory, file.onnx or a saved program")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="safetensors, or a state dict saved by torch.save")
]
Start = Annotated[
    str | None,
    typer.Option("--start", help="module whose call begins the part to compress, e.g. backbone (the inputs)"),
]
Until = Annotated[
    str | None, typer.Option("--until", help="module whose return ends it, e.g. head (the outputs)")
]
InputShape = Annotated[str | None, typer.Option("--input-shape", help="with the batch, e.g. 1,3,224,224")]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        help="with the batch, e.g. 1,3,224,224; for ONNX files that leave sizes open, and by input where "
        "there are several: NAME=1,3,224,224",
    ),
]


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


def shapes_of(texts: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes by input, "" for one that was not named; RecipeError if a text is no shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts or ():
        name, _, sizes = text.rpartition("=")  # names of inputs may have a `=` themselves
        shape = shape_of(sizes)
        assert shape is not None
        if name in shapes or (shapes and "" in (name, *shapes)):
            raise RecipeError(
                f"--input-shape: found {text!r} beside others, expected one for each input, by name; e.g. "
                "--input-shape left=1,3,64,64 --input-shape right=1,3,64,64"
            )
        shapes[name] = shape
    return shapes or None


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, whatever its value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_idle(context: typer.Context, where: str, options: dict[str, str], advice: str) -> None:
    """RecipeError if an option stands there that changes nothing; `options`: parameter -> option."""
    for name, option in options.items():
        if _given(context, name):
            raise RecipeError(f"{option}: found it {where}, where it has no effect, expected one; {advice}")
