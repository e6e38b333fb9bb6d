"""Recipes as the command line names them."""

from importlib import import_module
from pathlib import Path
from typing import Any

from graphcomp.base import is_file
from graphcomp.errors import RecipeError


def recipe_of(path: Path | None, passes: str | None) -> tuple[Any, list[Any]]:
    """The recipe of --recipe or of --passes, and its passes; RecipeError unless one of them is given."""
    from graphcomp.compiler import Recipe, load_recipe, make_passes, parse_passes
    from graphcomp.passes import PASSES

    if passes is not None and path is not None:
        raise RecipeError(
            f"--passes: found --recipe {path} as well, which has passes of its own, expected one of them; "
            "leave --passes out, or write them into the recipe"
        )
    if passes is not None:
        return Recipe(passes=[passes]), parse_passes(passes, PASSES)
    if path is None:
        raise RecipeError(
            'found neither --recipe nor --passes, expected one, e.g. --passes "fold-bn, l1{ratio=0.5}"'
        )
    recipe = load_recipe(or_bundled(path), PASSES)
    return recipe, make_passes(recipe, PASSES)


BUNDLED = ("models", "recipes")
"""Rooms with recipes and studies; `recipes/pfa-table1.yaml` is there in every folder."""


def or_bundled(path: Path) -> Path:
    """The file itself, or that of the package where there is none."""
    room = path.parts[0] if path.parts else ""
    if is_file(path) or room not in BUNDLED:
        return path
    package = import_module(f"graphcomp.{room}")
    return Path(str(package.__file__)).parent / path.relative_to(room)
