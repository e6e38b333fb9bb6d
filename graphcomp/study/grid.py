"""Studies: one recipe, many variants of it. A YAML file becomes cells, each of them one run.

    recipe:                                     # `$name` stands for a value of the grid
      model: models:resnet56
      data: cifar10:DIR
      passes: [{cc: {rate: $rate, only: $region}}, $recovery]
      allow_nothing: true
    grid:                                       # a table of axes, or a list of tables: their cells together
      rate: {from: 0, to: 0.95, step: 0.05}     # an arithmetic progression
      region: {strides: [3, 9]}                 # parts of the network; `all` and `none` too
      recovery: {raw: [], tuned: [finetune]}    # values with names of their own; or a list of plain values

`settings` are values that are the same in all cells; values of axes may name them too. `quick` replaces some
of them, fields of the recipe and the grid, for a run in seconds. `repeats` names axes along which nothing
differs but chance (seeds), and `paper` what the source of the experiment says of its cells.

An item that is only a placeholder and stands for a list is replaced by the list's items, so a pass can be
there or not. A region's value is a list of globs on layers. Its blocks are the children of numbered lists of
the network (`layer1.0`, `features.7`), or what `blocks` names: globs on module paths, in the network's order.

What is the same in all cells is computed in one: passes that keep what they computed (`base.cache`) find
it there. For that the cells with the largest numbers run first, one for each model and data.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from graphcomp.base import json_sha256, sha256
from graphcomp.compiler import (
    InputShape,
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
from graphcomp.study.axes import Grid, numeric_axes, placeholders, used_in
from graphcomp.study.combinations import combinations, layers_of, picked
from graphcomp.study.reading import Paper, Reading, expected
from graphcomp.version import __version__

LONGEST_NAME = 100
"""Of a cell's directory, without its key."""


Grids = Annotated[
    list[Grid],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, dict) else value),
]


class Quick(BaseModel):
    """What is different in a run in seconds: settings, fields of the recipe, the grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    grid: Grids | None = None


Shape = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)]
"""Of an input, with the batch."""


class Study(BaseModel):
    """A study file. `class_names` are for the tables; `workers` cells run at a time, on `engine`.

    `input_shape` is (1, C, H, W), or such shapes by input; a model that says so itself needs none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any]
    grid: Grids
    settings: dict[str, Any] = {}
    repeats: tuple[str, ...] = ()
    paper: Paper | None = None
    quick: Quick | None = None
    input_shape: Shape | Annotated[dict[str, Shape], Field(min_length=1)] | None = None
    class_names: tuple[str, ...] | None = None
    engine: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(ge=1)] | None = None

    @property
    def placeholders(self) -> set[str]:
        """That the recipe and the values of axes have."""
        return placeholders(self.recipe).union(*map(used_in, self.grid))

    @property
    def axes(self) -> list[str]:
        """Of all grids."""
        return list(dict.fromkeys(axis for grid in self.grid for axis in grid))


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


def load_study(
    path: Path,
    input_shape: InputShape = None,
    *,
    quick: bool = False,
    settings: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Study:
    """Read and check a study file.

    Args:
        path: of the file.
        input_shape: instead of the study's, unless it is None.
        quick: with what its `quick` changes.
        settings: instead of the study's, and of what `quick` makes of them.
        changes: fields of the recipe to replace, unless they are None.

    Raises:
        RecipeError: naming file, line and field.
    """
    fields, lines = read_yaml(path)
    study = validated(Study, fields, str(path), lines)
    for name in sorted(study.settings.keys() - study.placeholders):  # `changes` may replace its only use
        raise RecipeError(
            f"{path}: found a setting {name} that no ${name} stands for, expected one placeholder at least; "
            "correct the recipe or remove it"
        )
    if quick:
        study = _quick(study, path)
    study = _with_settings(study, settings or {}, f"{path}: settings")
    given = {name: value for name, value in changes.items() if value is not None}
    shape = input_shape or study.input_shape
    made = study.model_copy(update={"recipe": {**study.recipe, **given}, "input_shape": shape})
    for name in sorted((settings or {}).keys() - made.placeholders):
        raise RecipeError(
            f"{path}: settings: found {name}, whose placeholder is replaced ({', '.join(given) or 'quick'}), "
            "expected one that has an effect; leave one of them out"
        )
    return made


def _quick(study: Study, path: Path) -> Study:
    changes = study.quick
    if changes is None:
        raise RecipeError(f"{path}: found no `quick`, expected one for --quick; leave --quick out")
    study = _with_settings(study, changes.settings, f"{path}: quick.settings")
    return study.model_copy(
        update={"recipe": {**study.recipe, **changes.recipe}, "grid": changes.grid or study.grid}
    )


def _with_settings(study: Study, changes: Mapping[str, Any], place: str) -> Study:
    unknown = sorted(changes.keys() - study.settings.keys())
    if unknown:
        raise RecipeError(
            f"{place}: found {unknown[0]}, expected one of those of the study "
            f"({', '.join(study.settings) or 'none'})"
        )
    return study.model_copy(update={"settings": {**study.settings, **changes}})


def reading_of(study: Study, cells: Sequence["Cell"], place: str = "study", *, whole: bool = True) -> Reading:
    """How the results of a study are read; one not `whole` may lack cells that the source speaks of.

    Raises:
        RecipeError: repetitions along what is no axis; what the source says of no cell, or of no column.
    """
    for axis in study.repeats:
        if axis not in study.axes:
            raise RecipeError(
                f"{place}: repeats: found {axis}, expected an axis ({', '.join(study.axes)}); correct it"
            )
    labels = {cell.name: cell.labels for cell in cells}
    said = expected(study.paper, study.axes, labels, place, whole)
    source = study.paper.source if study.paper else None
    return Reading(study.class_names, study.repeats, source, said)


def expand(
    study: Study, table: PassTable, place: str = "study", only: Mapping[str, Set[str]] | None = None
) -> list[Cell]:
    """All cells in the order of the grid, checked; equal ones of several tables once.

    Args:
        study: what to expand.
        table: passes by name.
        place: of the study, for messages.
        only: the cells that have one of these labels on each of these axes; None for all.

    Raises:
        RecipeError: naming the cell and what is wrong with its recipe or with an axis; a label that none has.
        LoadError, TraceError: a network whose blocks were to be found.
    """
    shape = study.input_shape
    layers = _remembered(lambda network: layers_of(network, shape), repr)
    digest, samples = _remembered(_digest), _remembered(_samples, _what_chooses_samples)
    every = [
        pair
        for grid in study.grid
        for pair in combinations(study.recipe, study.settings, grid, layers, place)
    ]
    cells: dict[str, Cell] = {}
    for labels, recipe in picked(every, only or {}, study.axes, place):
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


def _job(
    labels: Mapping[str, str],
    fields: dict[str, Any],
    table: PassTable,
    shape: InputShape,
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
    key = json_sha256(content)
    text = "_".join(f"{axis}={label}" for axis, label in labels.items())
    name = re.sub(r"[^\w.=,+-]+", "-", text)[:LONGEST_NAME]
    return Cell(f"{name}-{key[:8]}", labels, key, job)


def _digest(path: str) -> str:
    """Hash of a file, or of all files of a folder; "" if there is neither (an error of the run, if one)."""
    place = Path(path)
    if not path or not place.exists():
        return ""
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    contents = ((f.relative_to(place), sha256([f.read_bytes()])) for f in files)
    return sha256(f"{name}\n".encode() + bytes.fromhex(content) for name, content in contents)


def _samples(job: Job) -> dict[str, str]:
    """Hashes of a job's samples; none if its network or its data cannot be loaded (an error of the run)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphcompWarning)  # the run says it again
        try:
            source = load_source(
                job.model, job.weights, job.input_shape, job.recipe.region, job.recipe.arguments
            )
            return digests(data_of(job, source)[1])
        except GraphcompError:
            return {}


def _what_chooses_samples(job: Job) -> tuple[Any, ...]:
    """Jobs that differ in nothing else have the same samples; the seed counts where it draws some."""
    recipe = job.recipe
    whole = recipe.data is not None and "limit=" not in recipe.data and not recipe.data.startswith("random")
    seed = None if whole else recipe.seed
    network = job.model, job.weights, repr(job.input_shape), recipe.region, repr(recipe.arguments)
    return *network, recipe.data, seed, recipe.classes


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
