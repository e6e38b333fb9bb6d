"""YAML files as plain values, in bounds, and where in the file each one is."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from graphcomp.errors import RecipeError

Lines = Mapping[tuple[Any, ...], int]
"""Where a field is -> its line."""


LARGEST, MOST, DEEPEST = 1 << 18, 20_000, 32
"""Bytes of a recipe, values in it with aliases written out, and levels: far above what anybody writes."""


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The fields of a YAML file, and where each one is.

    Raises:
        RecipeError: naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: {reason}; expected a readable YAML file") from error
    if text is None:
        raise RecipeError(f"{path}: found more than {LARGEST} bytes, expected a recipe")
    try:
        lines, data = parsed(text, str(path))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: found {error.problem}, expected YAML") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{path}:{line}: found a character that is not text, expected YAML") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: found {type(data).__name__}, expected fields such as `passes:`")
    return data, lines


class _Loader(yaml.SafeLoader):
    """Plain values only, in bounds: with aliases a few bytes stand for billions of values."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > DEEPEST:
            raise ComposerError(problem=f"more than {DEEPEST} levels", problem_mark=self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # dates that do not exist, endless integers
            raise ConstructorError(problem=str(error), problem_mark=node.start_mark) from error


def parsed(text: str, path: str | None = None) -> tuple[Lines, Any]:
    """Where fields are, if a path is given, and plain values; YAMLError, also if it is out of bounds."""
    loader = _Loader(text)
    try:
        tree = loader.get_single_node()
        if tree is None:
            return {}, None
        _check_size(tree, {}, frozenset())
        lines = {} if path is None else _lines(tree, path)  # first: constructing writes merged keys out
        return lines, loader.construct_document(tree)
    finally:
        loader.dispose()


def read_value(text: str, place: str) -> Any:
    """One value as YAML writes it, e.g. `{epochs: 2}`.

    Raises:
        RecipeError: naming its `place`.
    """
    try:
        return parsed(text)[1]
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{place}: found {text!r:.100}, expected a value as YAML writes it; put quotes around text that "
            "begins with a special character"
        ) from error


def _check_size(node: Any, known: dict[int, tuple[int, int]], above: frozenset[int]) -> tuple[int, int]:
    """Values and levels of a node with aliases written out; ComposerError if there are too many."""
    at = id(node)
    if at in above:
        raise ComposerError(problem="an alias within what it stands for", problem_mark=node.start_mark)
    if at not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = chain.from_iterable(children) if isinstance(node, yaml.MappingNode) else children
        sizes = [_check_size(part, known, above | {at}) for part in parts]
        total, levels = 1 + sum(size for size, _ in sizes), 1 + max((n for _, n in sizes), default=0)
        if total > MOST or levels > DEEPEST:
            many = f"{MOST} values" if total > MOST else f"{DEEPEST} levels"
            raise ComposerError(problem=f"more than {many}", problem_mark=node.start_mark)
        known[at] = total, levels
    return known[at]


def _lines(tree: Any, path: str, place: tuple[Any, ...] = ()) -> Lines:
    found = {place: tree.start_mark.line + 1}
    if isinstance(tree, yaml.MappingNode):
        for key, value in tree.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ComposerError(problem="a key that is not plain", problem_mark=key.start_mark)
            field, line = (*place, key.value), key.start_mark.line + 1
            if field in found:
                raise RecipeError(f"{path}:{line}: {dotted(field)}: found it twice, expected it once")
            found |= _lines(value, path, field)
            found[field] = line
    elif isinstance(tree, yaml.SequenceNode):
        for index, value in enumerate(tree.value):
            found |= _lines(value, path, (*place, index))
    return found


def dotted(loc: Sequence[Any]) -> str:
    """A place as it is written: `bench.batches.0`."""
    return ".".join(str(part) for part in loc)
