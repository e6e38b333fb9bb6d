"""Studies: one recipe, many variants of it. A YAML file becomes cells, each of them one run.

    recipe:                                     # `$name` stands for a value of the grid
      model: models:resnet56
      data: cifar10:DIR
      passes: [{cc: {rate: $rate, only: $region, allow_nothing: true}}, $recovery]
    grid:                                       # a table of axes, or a list of tables: their cells together
      rate: {from: 0, to: 0.95, step: 0.05}     # an arithmetic progression
      region: {strides: [3, 9]}                 # parts of the network; `all` and `none` too
      recovery: {raw: [], tuned: [finetune]}    # values with names of their own; or a list of plain values

An item that is only a placeholder and stands for a list is replaced by the list's items, so a pass can be
there or not. A region's value is a list of globs on layers. Its blocks are the children of numbered lists of
the network (`layer1.0`, `features.7`), or what `blocks` names: globs on module paths, in the network's order.

What is the same in all cells is computed in one: passes that keep what they computed (`base.cache`) find
it there. For that the cells with the largest numbers run first, one for each model and data.
"""

import hashlib
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from graphcomp.compiler import (
    Job,
    PassTable,
    Recipe,
    data_of,
    digests,
    load_source,
    make_passes,
    read_yaml,
    validated,
)
from graphcomp.errors import GraphcompError, GraphcompWarning, RecipeError
from graphcomp.factors import candidates
from graphcomp.version import __version__

LONGEST_NAME = 100
"""Of a cell's directory, without its key."""


class Progression(BaseModel):
    """The numbers from, from + step, … up to `to`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: Annotated[float, Field(alias="from")]
    to: float
    step: Annotated[float, Field(gt=0)]


class Regions(BaseModel):
    """Parts of the network: every `stride` blocks, for each of some strides.

    `all` adds the region of all layers (also those outside of every block), `none` the empty one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strides: tuple[Annotated[int, Field(ge=1)], ...]
    blocks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    all: bool = True
    none: bool = True


def _kind_of(axis: Any) -> str:
    if isinstance(axis, Regions) or (isinstance(axis, dict) and "strides" in axis):
        return "regions"
    if isinstance(axis, Progression) or (isinstance(axis, dict) and {"from", "to", "step"} & set(axis)):
        return "progression"
    return "named" if isinstance(axis, dict) else "values"


Axis = Annotated[
    Annotated[Regions, Tag("regions")]
    | Annotated[Progression, Tag("progression")]
    | Annotated[dict[str, Any], Field(min_length=1), Tag("named")]
    | Annotated[list[bool | int | float | str | None], Field(min_length=1), Tag("values")],
    Discriminator(_kind_of),
]
Grid = Annotated[dict[str, Axis], Field(min_length=1)]


class Study(BaseModel):
    """A study file. `class_names` are for the tables; `workers` cells run at a time, on `engine`.

    `input_shape` is (1, C, H, W); a model that says so itself needs none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any]
    grid: Annotated[
        list[Grid],
        Field(min_length=1),
        BeforeValidator(lambda value: [value] if isinstance(value, dict) else value),
    ]
    input_shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)] | None = None
    class_names: tuple[str, ...] | None = None
    engine: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: of its directory.
        labels: what it is on every axis, as text.
        key: hash of everything that decides its result: recipe, weights, model and samples.
        job: the run.
    """

    name: str
    labels: Mapping[str, str]
    key: str
    job: Job

    @property
    def source(self) -> tuple[str | None, ...]:
        """Cells with the same model, weights and data may share what they compute."""
        recipe = self.job.recipe
        return self.job.model, str(self.job.weights), recipe.data, str(recipe.classes)


def load_study(path: Path, input_shape: tuple[int, ...] | None = None, **changes: Any) -> Study:
    """Read and check a study file.

    Args:
        path: of the file.
        input_shape: instead of the study's, unless it is None.
        changes: fields of the recipe to replace, unless they are None.

    Raises:
        RecipeError: naming file, line and field.
    """
    fields, lines = read_yaml(path)
    study = validated(Study, fields, str(path), lines)
    given = {name: value for name, value in changes.items() if value is not None}
    shape = input_shape or study.input_shape
    return study.model_copy(update={"recipe": {**study.recipe, **given}, "input_shape": shape})


# ---------------------------------------------------------------------- from a study to its cells


def expand(study: Study, table: PassTable, place: str = "study") -> list[Cell]:
    """All cells in the order of the grid, checked; equal ones of several tables once.

    Args:
        study: what to expand.
        table: passes by name.
        place: of the study, for messages.

    Raises:
        RecipeError: naming the cell and what is wrong with its recipe or with an axis.
        LoadError, TraceError: a network whose blocks were to be found.
    """
    shape = study.input_shape
    layers = _remembered(lambda model: list(candidates(load_source(model, input_shape=shape).program)))
    digest, samples = _remembered(_digest), _remembered(_samples, _what_chooses_samples)
    cells: dict[str, Cell] = {}
    for grid in study.grid:
        for labels, recipe in _combinations(study.recipe, grid, layers, place):
            job = _job(labels, recipe, table, shape, place)
            cell = _cell(labels, job, digest, samples)
            cells.pop(cell.name, None)  # stands where the last table has it
            cells[cell.name] = cell
    return list(cells.values())


def _remembered(
    function: Callable[[Any], Any], by: Callable[[Any], Any] = lambda argument: argument
) -> Callable[[Any], Any]:
    known: dict[Any, Any] = {}

    def remembered(argument: Any) -> Any:
        key = by(argument)
        if key not in known:
            known[key] = function(argument)
        return known[key]

    return remembered


def _combinations(
    template: dict[str, Any], grid: Mapping[str, Any], layers: Callable[[str], list[str]], place: str
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Labels and recipe of every cell. Regions come last, for they depend on the model."""
    used = placeholders(template)
    for name in sorted(used ^ set(grid)):
        found = f"${name} without an axis" if name in used else f"an axis {name} that no ${name} stands for"
        raise RecipeError(
            f"{place}: found {found}, expected one placeholder at least for every axis of every grid; "
            "correct the recipe or the grid ($$ is a dollar sign)"
        )
    plain = {name: values_of(axis) for name, axis in grid.items() if not isinstance(axis, Regions)}
    for chosen in _product(plain):
        regions = {
            name: _regions(template, axis, chosen, layers, f"{place}: grid.{name}")
            for name, axis in grid.items()
            if isinstance(axis, Regions)
        }
        for parts in _product(regions):
            picked = {**chosen, **parts}
            labels = {name: picked[name][0] for name in grid}
            yield labels, fill(template, {name: value for name, (_, value) in picked.items()})


def _product(axes: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, tuple[str, Any]]]:
    """Every combination: axis -> (label, value)."""
    for items in itertools.product(*(axis.items() for axis in axes.values())):
        yield dict(zip(axes, items, strict=True))


def values_of(axis: Any) -> dict[str, Any]:
    """Label -> value for an axis that does not depend on the network."""
    if isinstance(axis, Progression):
        count = math.floor((axis.to - axis.start) / axis.step + 1e-9) + 1
        axis = [round(axis.start + i * axis.step, 10) for i in range(count)]
    if isinstance(axis, dict):
        return axis
    return {_text(value): value for value in axis}


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _regions(
    template: dict[str, Any],
    axis: Regions,
    chosen: Mapping[str, tuple[str, Any]],
    layers: Callable[[str], list[str]],
    place: str,
) -> dict[str, list[str]]:
    model = template.get("model")
    model = fill(model, {name: value for name, (_, value) in chosen.items()})
    if not isinstance(model, str):
        raise RecipeError(f"{place}: found no model, expected one to take blocks from; add `model:`")
    return regions(blocks_of(layers(model), axis.blocks, place), axis)


def blocks_of(layers: Sequence[str], globs: Sequence[str] | None, place: str) -> list[str]:
    """One glob on layers for each block, in the network's order.

    Args:
        layers: module paths.
        globs: on module paths; the outermost path that one matches is a block. None: the outermost path
            that ends with a number.
        place: for messages.

    Raises:
        RecipeError: no block, or a glob that matches nothing.
    """
    found: dict[str, None] = {}
    unused = dict.fromkeys(globs or ())
    for layer in layers:
        for path in _paths(layer):
            matching = [g for g in globs or () if fnmatch(path, g)]
            if matching or (globs is None and path.rpartition(".")[2].isdecimal()):
                found[path if path == layer else f"{path}.*"] = None
                unused = {g: None for g in unused if g not in matching}
                break
    if unused or not found:
        what = f"no layer below {next(iter(unused))!r}" if unused else "no numbered list of modules"
        raise RecipeError(
            f"{place}: found {what}, expected one to make blocks of; the layers are "
            f"{', '.join(layers[:8])}{', …' if len(layers) > 8 else ''}; give `blocks`, globs on module paths"
        )
    return list(found)


def _paths(layer: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    return list(itertools.accumulate(layer.split("."), lambda path, name: f"{path}.{name}"))


def regions(blocks: Sequence[str], axis: Regions) -> dict[str, list[str]]:
    """Label -> globs: `none`, blocks `1-3`, `4-6`, … for every stride, `all`."""
    found: dict[str, list[str]] = {"none": []} if axis.none else {}
    for stride in axis.strides:
        for start in range(0, len(blocks), stride):
            part = list(blocks[start : start + stride])
            last = start + len(part)
            found[f"{start + 1}-{last}" if last > start + 1 else f"{last}"] = part
    return found | ({"all": ["*"]} if axis.all else {})


# ---------------------------------------------------------------------- placeholders

TOKEN = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def placeholders(template: Any) -> set[str]:
    """Names that `$name` or `${name}` stands for anywhere in a template."""
    if isinstance(template, dict):
        return set().union(*(placeholders(part) for pair in template.items() for part in pair))
    if isinstance(template, list):
        return set().union(*map(placeholders, template))
    found = TOKEN.finditer(template) if isinstance(template, str) else ()
    return {name for match in found if (name := match[1] or match[2])}


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """The template with values in place of its placeholders.

    Text that is only a placeholder becomes the value itself; within text values stand as JSON, strings as
    they are.
    """
    if isinstance(template, dict):
        return {fill(key, values): fill(value, values) for key, value in template.items()}
    if isinstance(template, list):
        return list(itertools.chain.from_iterable(_items(item, values) for item in template))
    if not isinstance(template, str):
        return template
    whole = TOKEN.fullmatch(template)
    if whole and whole[0] != "$$":
        return values[whole[1] or whole[2]]
    return TOKEN.sub(lambda m: "$" if m[0] == "$$" else _text(values[m[1] or m[2]]), template)


def _items(item: Any, values: Mapping[str, Any]) -> Iterable[Any]:
    value = fill(item, values)
    return value if isinstance(item, str) and isinstance(value, list) else [value]


# ---------------------------------------------------------------------- one cell


def _job(
    labels: Mapping[str, str],
    fields: dict[str, Any],
    table: PassTable,
    shape: tuple[int, ...] | None,
    place: str,
) -> Job:
    title = ", ".join(f"{axis} {label}" for axis, label in labels.items())
    try:
        # Cells that run side by side would time each other: no timing, unless it is asked for.
        recipe = validated(Recipe, {"bench": False, **fields}, "recipe", {})
        recipe.require_consistent()
        passes = make_passes(recipe, table)
    except GraphcompError as error:
        raise RecipeError(f"{place}: cell {title}: {error}") from error
    if recipe.model is None:
        raise RecipeError(f"{place}: recipe: found no model, expected one; add `model:`")
    return Job(recipe.model, recipe, passes, Path(recipe.weights) if recipe.weights else None, shape)


def _cell(
    labels: Mapping[str, str],
    job: Job,
    digest: Callable[[str], str],
    samples: Callable[[Job], dict[str, str]],
) -> Cell:
    model = job.model.rpartition(":")[0] if ".py:" in job.model else job.model
    files = [digest(str(job.weights or "")), digest(model)]
    content = [job.recipe.model_dump(mode="json"), job.input_shape, files, samples(job), __version__]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    text = "_".join(f"{axis}={label}" for axis, label in labels.items())
    name = re.sub(r"[^\w.=,+-]+", "-", text)[:LONGEST_NAME]
    return Cell(f"{name}-{key[:8]}", labels, key, job)


def _digest(path: str) -> str:
    """Hash of a file, or of all files of a folder; "" if there is neither (an error of the run, if one)."""
    place = Path(path)
    if not path or not place.exists():
        return ""
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(place)}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _samples(job: Job) -> dict[str, str]:
    """Hashes of a job's samples; none if its network or its data cannot be loaded (an error of the run)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphcompWarning)  # the run says it again
        try:
            return digests(data_of(job, load_source(job.model, job.weights, job.input_shape))[1])
        except GraphcompError:
            return {}


def _what_chooses_samples(job: Job) -> tuple[Any, ...]:
    """Jobs that differ in nothing else have the same samples."""
    recipe = job.recipe
    return job.model, job.weights, job.input_shape, recipe.data, recipe.seed, recipe.classes


def waves(cells: Sequence[Cell]) -> list[list[Cell]]:
    """What may run side by side: first one cell of every source, then all others.

    The first ones are those with the largest numbers (the rate, say), of these the ones with the fewest
    passes: what can be shared is computed for them as far as any other cell needs it.
    """
    axes = numeric_axes(cell.labels for cell in cells)

    def lead(cell: Cell) -> tuple[float, int]:
        return sum(float(cell.labels.get(axis, 0)) for axis in axes), -len(cell.job.passes)

    first: dict[tuple[str | None, ...], Cell] = {}
    for cell in cells:
        known = first.get(cell.source)
        if known is None or lead(cell) > lead(known):
            first[cell.source] = cell
    leaders = [cell for cell in cells if first[cell.source] is cell]
    others = [cell for cell in cells if first[cell.source] is not cell]
    return [wave for wave in (leaders, others) if wave]


def numeric_axes(labels: Iterable[Mapping[str, str]]) -> list[str]:
    """The axes whose labels are all numbers."""
    seen: dict[str, list[str]] = {}
    for point in labels:
        for axis, label in point.items():
            seen.setdefault(axis, []).append(label)
    return [axis for axis, found in seen.items() if all(number(label) is not None for label in found)]


def number(label: str) -> float | None:
    """A label as a number, if it is one."""
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
