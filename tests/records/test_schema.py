"""The tables of `docs/report-schema.md` are made of the records: docstrings, types, descriptions of fields.

`GRAPHCOMP_UPDATE_GOLDEN=1` writes them anew, below what stands above the first: read the difference.
"""

import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from graphcomp import records

DOCUMENT = Path(__file__).parents[2] / "docs" / "report-schema.md"

FIRST = (records.Report, records.Evaluation, records.Width, records.Spectrum)
"""What nothing else holds: of two commands, and what methods put into `evidence`."""

WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", Any: "anything"}


def parts(kind: Any) -> Iterator[type[BaseModel]]:
    """The records that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from parts(inner)


def in_order() -> list[type[BaseModel]]:
    """Every record, each behind the first one that holds it."""
    todo, found = list(FIRST[::-1]), list[type[BaseModel]]()
    while todo:
        record = todo.pop()
        if record not in found:
            found.append(record)
            held = [r for field in record.model_fields.values() for r in parts(field.annotation)]
            todo += held[::-1]
    return found


def words(kind: Any) -> str:
    """A type as the document names it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(words, inner))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (list, tuple):
        return f"list of {words(inner[0])}"
    if origin is dict:
        return "object" if inner[1] is Any else f"object of {words(inner[1])}"
    return WORDS[kind] if kind in WORDS else f"[{kind.__name__}](#{kind.__name__.lower()})"


def section(record: type[BaseModel]) -> str:
    rows = [
        f"| `{name}` | {words(field.annotation)} | {(field.description or '').replace('|', chr(92) + '|')} |"
        for name, field in record.model_fields.items()
    ]
    said = " ".join((record.__doc__ or "").split())
    return "\n".join(
        [f"## {record.__name__}", "", said, "", "| field | type | meaning |", "| --- | --- | --- |", *rows]
    )


def test_the_documented_schema_is_the_schema() -> None:
    found = DOCUMENT.read_text(encoding="utf-8")
    head = found.partition("\n## ")[0]
    text = "\n\n".join([head.rstrip(), *map(section, in_order())]) + "\n"
    if os.environ.get("GRAPHCOMP_UPDATE_GOLDEN"):
        DOCUMENT.write_text(text, encoding="utf-8")
        return
    assert found == text, "write it anew with GRAPHCOMP_UPDATE_GOLDEN=1 and read the difference"


EVERY = [
    item
    for item in vars(records).values()
    if isinstance(item, type) and issubclass(item, BaseModel) and item is not records.Record
]


OF_THEIR_OWN = (records.Plan, records.QuantizedChoice)
"""Records that are no part of a report."""


@pytest.mark.parametrize("record", EVERY, ids=lambda record: record.__name__)
def test_every_record_is_documented(record: type[BaseModel]) -> None:
    """And every field says what it is, or what it is of."""
    assert record in in_order() or record in OF_THEIR_OWN
    assert record.__doc__ and not [n for n, field in record.model_fields.items() if not field.description]
