"""`graphcomp passes`.

The options stand in `passes.json`, which tests/cli/test_passes.py holds equal to the passes themselves: to
ask those would import torch, seconds before the first line.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from graphcomp.cli.console import out_console

FILE = Path(__file__).with_name("passes.json")
"""Name of a pass -> JSON schema of its options, as pydantic describes the dataclass. Written by
`GRAPHCOMP_UPDATE_GOLDEN=1 python -m pytest tests/cli/test_passes.py`."""


def passes_command(
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """List every pass with its options and defaults."""
    schemas = json.loads(FILE.read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(schemas, indent=2))
        return
    for name, schema in schemas.items():
        head = schema["description"].split("\n\n")[0].replace("\n", " ")
        table = Table(title=f"{name}: {head}", title_justify="left", title_style="bold", expand=False)
        for column in ("option", "type", "default"):
            table.add_column(column, overflow="fold")
        for option, of in schema["properties"].items():
            table.add_row(option, _type(of), json.dumps(of.get("default")))
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
