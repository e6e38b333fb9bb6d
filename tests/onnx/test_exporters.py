"""Files in the ways of other exporters: read for any number of samples, cut exactly, written, read again."""

from pathlib import Path

import onnx
import pytest

from graphcomp import analyse, compile, export_onnx, read_onnx
from tests.onnx.imitations import NETWORKS

STAYS_AT_ONE = {"squeezed_of_all"}
SHAPES = {"style_transfer": {"x": (1, 3, 16, 12)}}
NOTHING_TO_REMOVE = {"pytorch_writes_into_parts"}
"""A convolution whose channels are coordinates."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_file_of_another_exporter(name: str, tmp_path: Path) -> None:
    """Reading compares with ONNX Runtime, two samples together and each alone; compiling verifies."""
    model, path = NETWORKS[name](), tmp_path / "given.onnx"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    program = read_onnx(path, SHAPES.get(name))
    assert all((0 in port.axes) is (name not in STAYS_AT_ONE) for port in program.interface.inputs)
    assert [p.name for p in program.interface.outputs] == [o.name for o in model.graph.output]
    groups = analyse(program).removable
    if name in NOTHING_TO_REMOVE:
        assert not groups
    else:
        assert groups
        made = compile(program, "l1{ratio=0.5, multiple=1}")
        assert made.steps[0].verify_error < 1e-9
        program = made.program
    out = tmp_path / "made.onnx"
    assert export_onnx(program, out, batches=(1, 2) if name not in STAYS_AT_ONE else (1,)).fallback is None
    again = read_onnx(out, SHAPES.get(name))
    assert [len(g.channels) for g in analyse(again).groups] == [
        len(g.channels) for g in analyse(program).groups
    ]
