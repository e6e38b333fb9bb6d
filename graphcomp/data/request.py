"""What a data spec asks for: its options, read and checked."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphcomp.errors import DataError
from graphcomp.ir import Numbers


@dataclass(frozen=True)
class Request:
    """A data spec, read, and what the network takes; see `load_data`."""

    spec: str
    where: str
    shape: tuple[int, ...]
    seed: int
    limit: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: str | None = None
    labels: str | None = None
    outputs: int | None = None
    numbers: Numbers | None = None


def read_options(spec: str, query: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The options behind a spec's question mark, by name."""
    options: dict[str, Any] = {}
    for item in query.split("&"):
        name, _, text = item.partition("=")
        if name not in known:
            raise DataError.at(f"data spec {spec!r}", f"option {name!r}", either(known), "correct it")
        if name in options:
            raise DataError.at(f"data spec {spec!r}", f"option {name!r} twice", "it once", "remove one")
        options[name] = _READERS[name](spec, name, text)
    if ("mean" in options) != ("std" in options):
        raise DataError.at(f"data spec {spec!r}", "only one of mean and std", "both", "give the other too")
    return options


def read_limit(spec: str, name: str, text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise DataError.at(f"data spec {spec!r}", f"{name}={text!r}", "a whole number from 1", "correct it")
    return int(text)


def _text(spec: str, name: str, text: str) -> str:
    if not text:
        raise DataError.at(f"data spec {spec!r}", f"{name} without a value", "one", "correct it")
    return text


def _floats(spec: str, name: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(v) for v in values) or (name == "std" and min(values) <= 0):
        expected = "positive numbers" if name == "std" else "numbers"
        raise DataError.at(f"data spec {spec!r}", f"{name}={text!r}", expected, f"e.g. {name}=0.5,0.5,0.5")
    return values


_READERS: dict[str, Callable[[str, str, str], Any]] = {
    "limit": read_limit,
    "mean": _floats,
    "std": _floats,
    "classes": _text,
    "labels": _text,
}


def sizes(shape: tuple[int, ...]) -> str:
    """As in 3x224x224."""
    return "x".join(str(n) for n in shape)


def either(names: tuple[str, ...]) -> str:
    """Names that are expected."""
    return " or ".join(names)
