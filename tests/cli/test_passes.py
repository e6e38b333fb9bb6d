"""What the command line says of the passes without importing them, and what it may import at all."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from graphcomp.cli import passes as command
from graphcomp.passes import PASSES

ROOT = Path(__file__).parent.parent.parent
HEAVY = {"torch", "numpy", "scipy", "onnx", "onnxruntime", "matplotlib"}
RUN = """
from graphcomp.cli.main import main
sys.argv = ["graphcomp", *{}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import graphcomp",
        "from graphcomp.passes import PASSES; assert 'l1' in PASSES and len([*PASSES]) == len(PASSES)",
        *(
            RUN.format(a)
            for a in (["--help"], ["--version"], ["passes"], ["passes", "--json"], ["bench", "-h"])
        ),
    ],
)
def test_what_needs_no_torch_loads_none(code: str) -> None:
    """In a process of its own; no time is asserted."""
    code = f"import sys\n{code}\nprint(sorted({HEAVY} & sys.modules.keys()), file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, "[]\n")


def test_the_table_says_what_the_passes_are() -> None:
    """`passes.json`: every pass in the order of PASSES, with every option in the order of its fields."""
    schemas = {name: TypeAdapter(kind).json_schema() for name, kind in PASSES.items()}
    text = json.dumps(schemas, indent=2, ensure_ascii=False) + "\n"
    if os.environ.get("GRAPHCOMP_UPDATE_GOLDEN"):
        command.FILE.write_text(text, encoding="utf-8")
    found = command.FILE.read_text(encoding="utf-8")
    assert found == text, "write it anew with GRAPHCOMP_UPDATE_GOLDEN=1 and read the difference"
    for name, kind in PASSES.items():
        assert list(schemas[name]["properties"]) == [field.name for field in fields(kind)]
        assert schemas[name]["description"] == kind.__doc__
