"""From a template and axes to the recipe of every cell, and to the cells with some labels."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from graphcomp.compiler import InputShape, load_source
from graphcomp.errors import RecipeError
from graphcomp.factors import candidates
from graphcomp.ir import Region
from graphcomp.study.axes import Regions, blocks_of, fill, placeholders, regions, used_in, values_of

Combination = tuple[dict[str, str], dict[str, Any]]
"""Labels and recipe of a cell."""


def picked(
    every: list[Combination], only: Mapping[str, Set[str]], axes: Sequence[str], place: str
) -> list[Combination]:
    """Those that have one of the labels of `only` on each of its axes; RecipeError for what none has."""
    for axis, wanted in only.items():
        if axis not in axes:
            raise RecipeError(f"{place}: found no axis {axis}, expected one of {', '.join(axes)}; correct it")
        known = list(dict.fromkeys(labels[axis] for labels, _ in every if axis in labels))
        if unknown := sorted(wanted - set(known)):
            raise RecipeError(
                f"{place}: found no cell with {axis} {unknown[0]:.100}, expected one of "
                f"{', '.join(known[:20])}{', …' if len(known) > 20 else ''}; correct it"
            )
    found = [pair for pair in every if all(pair[0].get(axis) in some for axis, some in only.items())]
    if every and not found:
        raise RecipeError(f"{place}: found no cell with all of these labels, expected one; leave some out")
    return found


def combinations(
    template: dict[str, Any],
    settings: dict[str, Any],
    grid: Mapping[str, Any],
    layers: Callable[[dict[str, Any]], list[str]],
    place: str,
) -> Iterator[Combination]:
    """Of every cell of a grid. Regions come last, for they depend on the model.

    Args:
        template: a recipe with placeholders.
        settings: values of those that are the same in all cells.
        grid: axes of the others.
        layers: see `layers_of`.
        place: of the study, for messages.

    Raises:
        RecipeError: a placeholder without a value, or a value without a placeholder.
    """
    used, within = placeholders(template), used_in(grid)
    for name in sorted(within - settings.keys()):
        raise RecipeError(
            f"{place}: found ${name} in the value of an axis, where no setting has that name, expected one; "
            "add it to the settings ($$ is a dollar sign)"
        )
    for name in sorted(used - {*grid, *settings} | set(grid) - used):
        found = f"${name} without an axis" if name in used else f"an axis {name} that no ${name} stands for"
        raise RecipeError(
            f"{place}: found {found}, expected one placeholder at least for every axis of every grid; "
            "correct the recipe or the grid ($$ is a dollar sign)"
        )
    for name in sorted(set(grid) & set(settings)):
        raise RecipeError(f"{place}: found {name} as axis and as setting, expected one of them; rename one")
    plain = {
        name: {label: fill(value, settings) for label, value in values_of(axis).items()}
        for name, axis in grid.items()
        if not isinstance(axis, Regions)
    }
    for chosen in _product(plain):
        regions = {
            name: _regions(template, axis, settings | _values(chosen), layers, f"{place}: grid.{name}")
            for name, axis in grid.items()
            if isinstance(axis, Regions)
        }
        for parts in _product(regions):
            cell = {**chosen, **parts}
            labels = {name: cell[name][0] for name in grid}
            yield labels, fill(template, settings | _values(cell))


def _values(picked: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Axis -> value, without the labels."""
    return {name: value for name, (_, value) in picked.items()}


def _product(axes: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, tuple[str, Any]]]:
    """Every combination: axis -> (label, value)."""
    for items in itertools.product(*(axis.items() for axis in axes.values())):
        yield dict(zip(axes, items, strict=True))


def _regions(
    template: dict[str, Any],
    axis: Regions,
    values: Mapping[str, Any],
    layers: Callable[[dict[str, Any]], list[str]],
    place: str,
) -> dict[str, list[str]]:
    network = {name: fill(template.get(name), values) for name in ("model", "start", "until", "arguments")}
    if not isinstance(network["model"], str):
        raise RecipeError(f"{place}: found no model, expected one to take blocks from; add `model:`")
    return regions(blocks_of(layers(network), axis.blocks, place), axis)


def layers_of(network: dict[str, Any], shape: InputShape) -> list[str]:
    """Of what a recipe's fields say is to be compressed; those of another type every cell's recipe says.

    Raises:
        LoadError, TraceError: of the network.
    """
    part = Region(*(str(network[end] or "") for end in ("start", "until")))
    given = network["arguments"]
    told = given if isinstance(given, dict) else {}
    return list(candidates(load_source(network["model"], None, shape, part, told).program))
