"""Recipes: which passes run, with which options, on what. YAML files and one-line strings.

    fold-bn, l1{ratio=0.5, join=pad}                                        on the command line

    passes:                                                                 in a file
      - fold-bn
      - l1: {target: {macs: 0.5}, exclude: [conv1]}
    data: cifar10:DIR
    bench: {batches: [1, 8]}

A bad recipe fails before any work, naming the field and, in a file, the line.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from graphcomp.errors import RecipeError
from graphcomp.pipeline import Pass
from graphcomp.targets import TARGETS

PassTable = Mapping[str, type[Any]]
Lines = dict[tuple[Any, ...], int]


class BenchOptions(BaseModel):
    """How the result is timed against the original."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: Literal["cpu", "cuda", "tensorrt"] | None = None  # the target's
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1,)
    threads: Annotated[int, Field(ge=1)] = 1
    runs: Annotated[int, Field(ge=1)] = 200
    seconds: Annotated[float, Field(gt=0)] = 10.0


class ExportOptions(BaseModel):
    """How the result is written as ONNX."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    opset: Annotated[int, Field(ge=18)] = 18
    dynamic_batch: bool = True
    tolerance: Annotated[float, Field(gt=0)] = 1e-4


class Recipe(BaseModel):
    """A whole run. `passes` are names with options; `parse_passes` makes them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: Annotated[list[str | dict[str, dict[str, Any] | None]], Field(min_length=1)]
    model: str | None = None
    weights: str | None = None
    data: str | None = None
    target: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    export: ExportOptions = ExportOptions()
    bench: BenchOptions | Literal[False] = BenchOptions()


@dataclass(frozen=True)
class _Item:
    """One pass before it is made: where it stands, for messages."""

    name: str
    options: Mapping[str, Any]
    place: str
    lines: Mapping[str, int]


def load_recipe(path: Path, table: PassTable) -> Recipe:
    """Read and check a recipe file, its passes and their options included.

    Raises:
        RecipeError: naming file, line and field.
    """
    try:
        text = path.read_text()
        tree = yaml.compose(text)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}; expected a readable YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: found {error.problem}, expected YAML") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: found {error}, expected YAML") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: found {type(data).__name__}, expected fields such as `passes:`")
    lines = _lines(tree)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, str(path), lines, list(Recipe.model_fields))) from error
    if recipe.target != "auto" and recipe.target not in TARGETS:
        line = lines.get(("target",), 1)
        raise RecipeError(
            f"{path}:{line}: target: found {recipe.target!r}, expected auto, {', '.join(TARGETS)}"
        )
    _make(_items(recipe.passes, str(path), lines), table)
    return recipe


def _lines(tree: Any, place: tuple[Any, ...] = ()) -> Lines:
    """Path of every field -> its line."""
    found: Lines = {place: tree.start_mark.line + 1} if tree is not None else {}
    if isinstance(tree, yaml.MappingNode):
        for key, value in tree.value:
            found |= _lines(value, (*place, key.value))
            found[(*place, key.value)] = key.start_mark.line + 1
    elif isinstance(tree, yaml.SequenceNode):
        for index, value in enumerate(tree.value):
            found |= _lines(value, (*place, index))
    return found


def _items(passes: Sequence[str | dict[str, dict[str, Any] | None]], path: str, lines: Lines) -> list[_Item]:
    items = []
    for index, entry in enumerate(passes):
        line = lines.get(("passes", index), 1)
        if isinstance(entry, str):
            items += [_Item(name, options, f"{path}:{line}", {}) for name, options in split_passes(entry)]
            continue
        if len(entry) != 1:
            raise RecipeError(
                f"{path}:{line}: passes.{index}: found {len(entry)} names in one entry, expected one pass an entry"
            )
        ((name, options),) = entry.items()
        at = {k[3]: n for k, n in lines.items() if len(k) == 4 and k[:3] == ("passes", index, name)}
        items.append(_Item(name, options or {}, f"{path}:{line}", at))
    return items


def make_passes(recipe: Recipe, table: PassTable) -> list[Pass]:
    """The passes of a recipe."""
    return _make(_items(recipe.passes, "recipe", {}), table)


def parse_passes(text: str, table: PassTable) -> list[Pass]:
    """The passes of a one-line string such as `fold-bn, l1{ratio=0.5}`; RecipeError naming the column."""
    return _make([_Item(name, options, "passes", {}) for name, options in split_passes(text)], table)


def _make(items: Sequence[_Item], table: PassTable) -> list[Pass]:
    return [_make_one(item, table) for item in items]


def _make_one(item: _Item, table: PassTable) -> Pass:
    if item.name not in table:
        close = difflib.get_close_matches(item.name, table, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"{item.place}: found no pass {item.name!r}, expected one of {', '.join(table)}{hint}"
        )
    kind = table[item.name]
    try:
        return TypeAdapter(kind).validate_python(dict(item.options))  # type: ignore[no-any-return]
    except ValidationError as error:
        lines = {(name,): line for name, line in item.lines.items()}
        place = item.place.rpartition(":")[0] if lines else item.place
        raise RecipeError(_explain(error, place, lines, [f.name for f in fields(kind)], item.name)) from error


def _explain(
    error: ValidationError,
    place: str,
    lines: Mapping[tuple[Any, ...], int],
    known: Sequence[str],
    owner: str = "",
) -> str:
    """The first problem in one line: place, field, what was found and expected."""
    problem = error.errors()[0]
    loc = tuple(problem["loc"])
    where = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    at = f"{place}:{where}" if where is not None else place
    field = ".".join(str(part) for part in ((owner, *loc) if owner else loc) if part != "")
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(str(loc[-1]), known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{at}: {field}: found an unknown option, expected one of {', '.join(known)}{hint}"
    found = "" if problem["type"] in ("missing", "value_error") else f"found {problem['input']!r}, "
    return f"{at}: {field}: {found}{problem['msg'].removeprefix('Value error, ')}"


def split_passes(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`a, b{x=1, y=[2, 3]}` -> [("a", {}), ("b", {"x": 1, "y": [2, 3]})]; RecipeError naming the column."""
    found = []
    for start, part in _split(text, 0):
        name, brace, rest = part.partition("{")
        if not name.strip():
            raise RecipeError(f"passes, column {start + 1}: found {part!r}, expected the name of a pass")
        if brace and not rest.rstrip().endswith("}"):
            raise RecipeError(f"passes, column {start + 1}: found {part!r}, expected a closing brace")
        inside = rest.rstrip()[:-1] if brace else ""
        options = dict(_option(p, start + len(name) + 1 + at) for at, p in _split(inside, 0) if p.strip())
        found.append((name.strip(), options))
    return found


def _option(text: str, column: int) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"passes, column {column + 1}: found {text.strip()!r}, expected option=value")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"passes, column {column + 1}: {name.strip()}: found {value!r}, expected a value"
        ) from error


def _split(text: str, depth: int) -> list[tuple[int, str]]:
    """Split at commas outside brackets: (column, part)."""
    parts, start = [], 0
    for column, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if depth < 0:
            raise RecipeError(f"passes, column {column + 1}: found {char!r}, expected it to be opened before")
        if char == "," and depth == 0:
            parts.append((start, text[start:column]))
            start = column + 1
    if depth:
        raise RecipeError(f"passes, column {len(text)}: found the end, expected a closing bracket")
    return [*parts, (start, text[start:])]
