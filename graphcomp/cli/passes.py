"""`graphcomp passes`."""

import json
from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.table import Table

from graphcomp.cli.console import out_console


def passes_command(
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """List every pass with its options and defaults."""
    from pydantic import TypeAdapter

    from graphcomp.passes import PASSES

    schemas = {name: TypeAdapter(kind).json_schema() for name, kind in PASSES.items()}
    if as_json:
        print(json.dumps(schemas, indent=2))
        return
    for name, kind in PASSES.items():
        head = (kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        table = Table(title=f"{name}: {head}", title_justify="left", title_style="bold", expand=False)
        for column in ("option", "type", "default"):
            table.add_column(column, overflow="fold")
        for option in fields(kind):
            schema = schemas[name].get("properties", {}).get(option.name, {})
            table.add_row(option.name, _type(schema), json.dumps(schema.get("default")))
        out_console.print(table)


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "$ref" in schema:
        return f"options of {schema['$ref'].rpartition('/')[2]}"
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object":
        return "{macs: x} or {params: x} or {latency: x}" if "macs" in json.dumps(schema) else "mapping"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return " ".join([kind, *limits])
