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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from graphcomp.compiler.classes import Head
from graphcomp.compiler.pass_lines import split_passes
from graphcomp.compiler.reading import Lines, dotted, read_yaml
from graphcomp.errors import RecipeError
from graphcomp.ir import Region, Value, plain_argument
from graphcomp.measure import Corruption, Kind
from graphcomp.onnx import Dynamic, Weights
from graphcomp.pipeline import Pass
from graphcomp.runtime import TARGETS, Precision, Provider

PassTable = Mapping[str, type[Any]]
Model = TypeVar("Model", bound=BaseModel)


def _parse_class(value: Any) -> int | str:
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_id and not (isinstance(value, str) and value):
        raise ValueError(f"found {value!r}, expected a class's id, 0 or larger, or its name")
    return cast(int | str, value)


def _split_providers(value: Any) -> Any:
    """`cpu,openvino` as a list of them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _distinct(value: tuple[Provider, ...]) -> tuple[Provider, ...]:
    if len(set(value)) < len(value):
        raise ValueError(f"found {', '.join(value)}, expected each once")
    return value


Providers = Annotated[
    tuple[Provider, ...], Field(min_length=1), BeforeValidator(_split_providers), AfterValidator(_distinct)
]
"""One runtime, or several: `cpu,openvino` or a list."""

ClassId = Annotated[int | str, PlainValidator(_parse_class, json_schema_input_type=int | str)]
"""Of one class: its number, or its name where the data has names."""


Argument = Annotated[Value, PlainValidator(plain_argument)]
"""Of forward, that is no tensor."""


class BenchOptions(BaseModel):
    """How the result is timed against the original."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: Providers | None = None  # the target's; of several the first decides
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1,)
    threads: Annotated[int, Field(ge=1)] = 1
    runs: Annotated[int, Field(ge=1)] = 200
    seconds: Annotated[float, Field(gt=0)] = 10.0
    cuda_graphs: bool = False  # not yet run on a GPU
    precision: Precision | None = None  # of GPUs, not yet run on one; the target's on its runtime, else fp32


class ExportOptions(BaseModel):
    """How the result is written as ONNX."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    opset: Annotated[int, Field(ge=18)] | None = None  # the file's where it is 18 or more, else 18
    dynamic: tuple[Dynamic, ...] | None = None  # what the file that is read leaves open, else the batch
    tolerance: Annotated[float, Field(gt=0)] | None = None  # by the network's type
    dct: Literal["coefficients", "dense", "both"] = "both"
    """How weights are stored that `dct` made: as coefficients, dense, or both, timed against each other."""
    class_names: str | None = None  # a file with a name a line, written into the metadata
    weights: Weights = "fp32"
    """What the result's weights are stored as; fp16: half the file, cast back when it is loaded."""


class RobustnessOptions(BaseModel):
    """How images are damaged to see what accuracy is left; an empty list leaves a kind out.

    See `measure.damage` for what the numbers say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    motion_blur: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.15, 0.3)
    occlusion: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.25)
    brightness: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.5)

    def corruptions(self) -> list[Corruption]:
        """One for each number."""
        every: dict[Kind, tuple[float, ...]] = {
            "motion-blur": self.motion_blur,
            "occlusion": self.occlusion,
            "brightness": self.brightness,
        }
        return [Corruption(kind, amount) for kind, amounts in every.items() for amount in amounts]


class Recipe(BaseModel):
    """A whole run. `passes` are names with options; `parse_passes` makes them.

    `classes`, by id or name, restricts data and network to some before the first pass; `head`: with which
    weights.
    `allow_nothing`: a run in which no pass changes anything is no error. `memory`: GiB of activations and
    statistics that passes hold at once, by default a quarter of the machine's; what is found does not depend
    on it. `start`, `until`: modules between which the network is compressed, see `ir.trace`.
    `arguments`: what forward is called with beside tensors, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: Annotated[list[str | dict[str, dict[str, Any] | None]], Field(min_length=1)]
    model: str | None = None
    weights: str | None = None
    start: str | None = None
    until: str | None = None
    arguments: dict[str, Argument] = {}
    data: str | None = None
    classes: Annotated[tuple[ClassId, ...], Field(min_length=2)] | None = None
    head: Head = "slice"
    target: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    allow_nothing: bool = False
    memory: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    export: ExportOptions = ExportOptions()
    bench: BenchOptions | Literal[False] = BenchOptions()
    robustness: Annotated[
        RobustnessOptions | Literal[False], BeforeValidator(lambda value: {} if value is True else value)
    ] = False

    @property
    def region(self) -> Region:
        """`start` and `until`."""
        return Region(self.start or "", self.until or "")

    @property
    def budget(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else int(self.memory * 2**30)

    @property
    def allows_nothing(self) -> bool:
        """`allow_nothing`, or one of the passes says so, of which it was an option."""
        return self.allow_nothing or allows_nothing(self.passes)

    def require_consistent(self) -> None:
        """RecipeError if one option contradicts another, or would not change anything beside it."""
        if self.head != "slice" and self.classes is None:
            raise RecipeError(
                f"head: found {self.head} without classes, where it has no effect, expected both or neither; "
                "add --classes (`classes:` in a recipe), or leave head out"
            )
        batches = self.bench.batches if self.bench is not False else ()
        fixed = self.export.dynamic is not None and "batch" not in self.export.dynamic
        if fixed and set(batches) - {1}:
            raise RecipeError(
                f"export.dynamic: found no batch with bench.batches {list(batches)}, expected 1, the only "
                "batch that such a file takes; leave one of them out"
            )


ALLOW_NOTHING = "allow_nothing"
"""Once an option of passes, now of the run."""

SECTIONS: dict[str, type[BaseModel]] = {
    "export": ExportOptions,
    "bench": BenchOptions,
    "robustness": RobustnessOptions,
}
UNION_TAGS = ("str", "int", "float", "bool", "BenchOptions", "RobustnessOptions")
"""What pydantic puts into the place of an error to tell the members of a union apart."""


@dataclass(frozen=True)
class _Item:
    """One pass before it is made: where it stands, for messages."""

    name: str
    options: Mapping[str, Any]
    place: str
    lines: Lines


def load_recipe(path: Path, table: PassTable) -> Recipe:
    """Read and check a recipe file, its passes and their options included.

    Raises:
        RecipeError: naming file, line and field.
    """
    data, lines = read_yaml(path)
    recipe = validated(Recipe, data, str(path), lines)
    if recipe.target != "auto" and recipe.target not in TARGETS:
        line = lines.get(("target",), 1)
        raise RecipeError(
            f"{path}:{line}: target: found {recipe.target!r}, expected auto, {', '.join(TARGETS)}"
        )
    _make(_items(recipe.passes, str(path), lines), table)
    return recipe


def validated(kind: type[Model], data: Mapping[str, Any], place: str, lines: Lines) -> Model:
    """The fields as a model; RecipeError naming `place`, line and field of the first that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, place, lines, list(kind.model_fields))) from error


def _items(passes: Sequence[str | dict[str, dict[str, Any] | None]], path: str, lines: Lines) -> list[_Item]:
    items = []
    for index, entry in enumerate(passes):
        line = lines.get(("passes", index), 1)
        if isinstance(entry, str):
            items += [_Item(name, options, path, {(): line}) for name, options in split_passes(entry)]
            continue
        if len(entry) != 1:
            raise RecipeError(
                f"{path}:{line}: passes.{index}: found {len(entry)} names in one entry, expected one"
            )
        ((name, options),) = entry.items()
        at = {k[3:]: n for k, n in lines.items() if k[:3] == ("passes", index, name)}
        items.append(_Item(name, options or {}, path, at))
    return items


def allows_nothing(passes: Sequence[str | dict[str, dict[str, Any] | None]]) -> bool:
    """Whether a recipe from before `allow_nothing` was the run's says so for one of its passes."""
    return any(item.options.get(ALLOW_NOTHING) is True for item in _items(passes, "recipe", {}))


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
        at = _at(item.place, item.lines, ())
        raise RecipeError(f"{at}: found no pass {item.name!r}, expected one of {', '.join(table)}{hint}")
    kind = table[item.name]
    try:
        options = dict(item.options)
        if isinstance(options.get(ALLOW_NOTHING), bool):
            del options[ALLOW_NOTHING]
        return TypeAdapter(kind).validate_python(options)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise RecipeError(_explain(error, item.place, item.lines, _known(kind, error), item.name)) from error


def _known(kind: type[Any], error: ValidationError) -> list[str]:
    """The options beside the first that is wrong: those of the pass, or of a group of its options."""
    for name in error.errors()[0]["loc"][:-1]:
        hint = get_type_hints(kind).get(str(name))
        nested = [t for t in (hint, *get_args(hint)) if isinstance(t, type) and is_dataclass(t)]
        if nested:
            kind = nested[0]
    return [f.name for f in fields(kind)]


def _explain(
    error: ValidationError,
    place: str,
    lines: Lines,
    known: Sequence[str],
    owner: str = "",
) -> str:
    """The first problem in one line: place, field, what was found and expected."""
    problem = error.errors()[0]
    unknown = problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    last = len(problem["loc"]) - 1
    loc = tuple(p for i, p in enumerate(problem["loc"]) if unknown and i == last or not _is_tag(p))
    at, field = _at(place, lines, loc), dotted((owner, *loc) if owner else loc)
    if unknown:
        if not owner and loc[0] in SECTIONS:
            known = list(SECTIONS[str(loc[0])].model_fields)
        close = difflib.get_close_matches(str(loc[-1]), known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{at}: {field}: found an unknown option, expected one of {', '.join(known)}{hint}"
    found = "" if problem["type"] in ("missing", "value_error") else f"found {problem['input']!r}, "
    said = problem["msg"].removeprefix("Value error, ")
    if not owner and loc[0] == "passes" and len(loc) == 2:
        said = "expected the name of a pass, alone or with its options as in `l1: {ratio: 0.5}`"
    return f"{at}: {field}: {found}{said}"


def _is_tag(part: str | int) -> bool:
    """Whether a part of a place is no field, but one of several types, as pydantic calls them."""
    said = str(part)
    return said in UNION_TAGS or said.startswith("constrained-") or re.match(r"[a-z-]+\[", said) is not None


def _at(place: str, lines: Lines, loc: tuple[Any, ...]) -> str:
    """`file:line` of a field, or of what is around it if the field itself is not there."""
    line = next((lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines), None)
    return f"{place}:{line}" if line is not None else place
