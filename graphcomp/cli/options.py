"""Arguments that several commands have, and what is read from them."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

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
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="value of an argument that is no tensor, e.g. mask=none, or of an ONNX file's input that has no "
        "samples; once for each",
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        help="with the batch, e.g. 1,3,224,224; by input where there are several: NAME=1,3,224,224; of ONNX "
        "files for sizes that they leave open",
    ),
]


def _shape_of(text: str) -> tuple[int, ...]:
    """RecipeError if the text is no shape."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise RecipeError(
            f"--input-shape: found {text!r}, expected positive sizes with the batch, e.g. 1,3,224,224"
        )
    return shape


def shapes_of(texts: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes by input, "" for one that was not named; RecipeError if a text is no shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts or ():
        name, _, sizes = text.rpartition("=")  # names of inputs may have a `=` themselves
        shape = _shape_of(sizes)
        if name in shapes or (shapes and "" in (name, *shapes)):
            raise RecipeError(
                f"--input-shape: found {text!r} beside others, expected one for each input, by name; e.g. "
                "--input-shape left=1,3,64,64 --input-shape right=1,3,64,64"
            )
        shapes[name] = shape
    return shapes or None


def inputs_of(texts: list[str] | None) -> dict[str, Any]:
    """Values by argument; RecipeError if a text is no NAME=VALUE."""
    told = _once("--input", texts, "flag=true", any_name=True)
    return {name: _value(name, value) for name, value in told.items()}


def settings_of(texts: list[str] | None) -> dict[str, Any]:
    """Values by setting of a study; RecipeError if a text is no NAME=VALUE, or a value is no YAML."""
    from graphcomp.compiler import read_value

    found = _once("--set", texts, "samples=5000")
    return {name: read_value(value, f"--set: {name}") for name, value in found.items()}


def labels_of(texts: list[str] | None) -> dict[str, set[str]]:
    """Labels by axis of a study; RecipeError if a text is no AXIS=LABEL."""
    found: dict[str, set[str]] = {}
    for axis, label in _pairs("--only", texts, "rate=0.5"):
        found.setdefault(axis, set()).add(label)
    return found


def _once(option: str, texts: list[str] | None, example: str, *, any_name: bool = False) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in _pairs(option, texts, example, any_name=any_name):
        if name in found:
            text = f"{name}={value}"
            raise RecipeError(f"{option}: found {text!r:.100} beside another {name}, expected each name once")
        found[name] = value
    return found


def _pairs(
    option: str, texts: list[str] | None, example: str, *, any_name: bool = False
) -> Iterator[tuple[str, str]]:
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (equals and (bool(name) if any_name else name.isidentifier())):
            raise RecipeError(f"{option}: found {text!r:.100}, expected NAME=VALUE, e.g. {example}")
        yield name, value


_WORDS = {"true": True, "false": False, "none": None, "null": None}


def _value(name: str, text: str) -> Any:
    """As Python writes numbers, texts in quotes and lists of these; else one of our words, or a text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    # Whatever it raises: of what is no literal, too deep, or too long.
    except Exception as error:
        if text.isprintable() and (text[:1].isalpha() or text[:1] == "_"):
            return text
        raise RecipeError(
            f"--input: {name}: found {text!r:.100}, expected true, false, none, a number, a list or a text, "
            "in quotes where it begins with anything but a letter"
        ) from error


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, whatever its value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_idle(context: typer.Context, where: str, options: dict[str, str], advice: str) -> None:
    """RecipeError if an option stands there that changes nothing; `options`: parameter -> option."""
    for name, option in options.items():
        if _given(context, name):
            raise RecipeError(f"{option}: found it {where}, where it has no effect, expected one; {advice}")
