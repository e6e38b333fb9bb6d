"""The axes of a study: the values that they stand for, and placeholders that take them."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from graphcomp.errors import RecipeError


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


def values_of(axis: Any) -> dict[str, Any]:
    """Label -> value for an axis that does not depend on the network."""
    if isinstance(axis, Progression):
        count = math.floor((axis.to - axis.start) / axis.step + 1e-9) + 1
        axis = [round(axis.start + i * axis.step, 10) for i in range(count)]
    if isinstance(axis, dict):
        return axis
    return {as_text(value): value for value in axis}


def as_text(value: Any) -> str:
    """A value as labels and text show it."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


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


TOKEN = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def placeholders(template: Any) -> set[str]:
    """Names that `$name` or `${name}` stands for anywhere in a template."""
    if isinstance(template, dict):
        return set().union(*(placeholders(part) for pair in template.items() for part in pair))
    if isinstance(template, list):
        return set().union(*map(placeholders, template))
    found = TOKEN.finditer(template) if isinstance(template, str) else ()
    return {name for match in found if (name := match[1] or match[2])}


def used_in(grid: Mapping[str, Any]) -> set[str]:
    """The placeholders in the values of a grid's axes: they stand for settings."""
    plain = [values_of(axis).values() for axis in grid.values() if not isinstance(axis, Regions)]
    return placeholders(list(itertools.chain.from_iterable(plain)))


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
    return TOKEN.sub(lambda m: "$" if m[0] == "$$" else as_text(values[m[1] or m[2]]), template)


def _items(item: Any, values: Mapping[str, Any]) -> Iterable[Any]:
    value = fill(item, values)
    return value if isinstance(item, str) and isinstance(value, list) else [value]


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
