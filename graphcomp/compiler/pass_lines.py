"""Passes in one line: `fold-bn, l1{ratio=0.5, join=pad}`."""

from typing import Any

import yaml

from graphcomp.compiler.reading import DEEPEST, LARGEST, parsed
from graphcomp.errors import RecipeError


def split_passes(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`a, b{x=1, y=[2, 3]}` -> [("a", {}), ("b", {"x": 1, "y": [2, 3]})]; RecipeError naming the column."""
    if len(text) > LARGEST:
        raise RecipeError(f"passes: found {len(text)} characters, expected at most {LARGEST}")
    found = []
    for start, part in _split(text):
        name, brace, rest = part.partition("{")
        if not name.strip():
            raise RecipeError(f"passes, column {start + 1}: found {part!r}, expected the name of a pass")
        if brace and not rest.rstrip().endswith("}"):
            raise RecipeError(f"passes, column {start + 1}: found {part!r}, expected a closing brace")
        inside = rest.rstrip()[:-1] if brace else ""
        options: dict[str, Any] = {}
        for column, option in _split(inside, start + len(name) + 1):
            if option.strip():
                _add_option(options, option, column)
        found.append((name.strip(), options))
    return found


def _add_option(options: dict[str, Any], text: str, column: int) -> None:
    column += len(text) - len(text.lstrip())
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise RecipeError(f"passes, column {column + 1}: found {text.strip()!r}, expected option=value")
    if name in options:
        raise RecipeError(f"passes, column {column + 1}: {name}: found it twice, expected it once")
    if _is_nested(value):
        inside, options[name] = value.strip()[1:-1], {}
        for at, option in _split(inside, column + len(text.lstrip()) - len(value.lstrip()) + 1):
            _add_option(options[name], option, at)
        return
    try:
        options[name] = parsed(value)[1]
    except yaml.YAMLError as error:
        raise RecipeError(
            f"passes, column {column + 1}: {name}: found {value!r}, expected a value; put quotes around text "
            'that begins with a special character, e.g. include="*.conv1"'
        ) from error


def _is_nested(value: str) -> bool:
    """`{epochs=2, lr=0.01}`, as the options of a pass are written, and not YAML's `{epochs: 2}`."""
    text = value.strip()
    first = _split(text[1:-1])[0][1] if text.startswith("{") and text.endswith("}") else ""
    return "=" in first and ":" not in first.partition("=")[0]


def _split(text: str, offset: int = 0) -> list[tuple[int, str]]:
    """Split at commas outside brackets and quotes: (column from `offset`, part)."""
    parts, start, depth, quote = [], 0, 0, ""
    for column, char in enumerate(text):
        if quote or char in "\"'":
            quote = "" if char == quote else quote or char
            continue
        depth += (char in "{[") - (char in "}]")
        if depth > DEEPEST:
            raise RecipeError(
                f"passes, column {offset + column + 1}: found more than {DEEPEST} brackets in each other, "
                "expected passes such as l1{ratio=0.5}"
            )
        if depth < 0:
            raise RecipeError(
                f"passes, column {offset + column + 1}: found {char!r}, expected it to be opened before"
            )
        if char == "," and depth == 0:
            parts.append((offset + start, text[start:column]))
            start = column + 1
    if depth or quote:
        missing = "quote" if quote else "bracket"
        raise RecipeError(f"passes, column {offset + len(text)}: found the end, expected a closing {missing}")
    return [*parts, (offset + start, text[start:])]
