"""Files in 8 bits beside the float file, whoever wrote them: every layer's time is its own."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from graphcomp.explanation import explain
from graphcomp.explanation.attribution import attribute
from graphcomp.explanation.explanation import _origins
from graphcomp.explanation.matching import Matching
from graphcomp.explanation.profiling import trace_pair
from graphcomp.explanation.quantised import is_quantised, origins_by_tensor
from graphcomp.runtime import onnxfile
from tests.onnx.quantised_files import FILES, NAMES, float_file

MACS = {"stem": 62208, "inner": 331776, "outer": 331776, "wise": 20736, "fc": 160}


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_layer_is_found_once(name: str, turned: bool, tmp_path: Path) -> None:
    paths = [float_file(tmp_path), FILES[name](tmp_path)]
    if turned:
        paths.reverse()
    first, second = (onnxfile.read(path) for path in paths)
    files = first, second
    feeds = {"input": np.zeros((1, 3, 12, 12), np.float32)}
    profiles = trace_pair(files, feeds, runs=1, seconds=0)
    origins = _origins(files, None)
    sides = [attribute(f, p, 1, 1, o) for f, p, o in zip(files, profiles, origins, strict=True)]
    for side in sides:
        assert {k.layer: k.macs for k in side if k.macs} == MACS
    eight = sides[0 if turned else 1]
    expected = {"8 bits", "plain", "blocked"} if name == "defaults" else {"8 bits"}
    assert {k.form for k in eight if k.macs} <= expected
    assert all(k.form == "8 bits" for k in eight if k.macs and k.operator.node.op.startswith("QLinear"))
    pairs = Matching(*sides).heavy_pairs()
    assert [len(p.base) == len(p.new) == 1 and p.base[0].layer == p.new[0].layer for p in pairs] == [True] * 5


@pytest.mark.slow
def test_explained(tmp_path: Path) -> None:
    """No time is asserted, but that the parts are all there and sum to the gap."""
    found = explain(
        float_file(tmp_path),
        FILES["nameless"](tmp_path),
        runs=6,
        seconds=0.1,
        traced_runs=6,
        traced_seconds=0.1,
    )
    assert found.theoretical == 1
    assert sum(part.ms for part in found.parts) == pytest.approx(found.gap.value, abs=1e-9)
    rows = {row.layer: row for row in found.rows if row.base_macs}
    assert set(rows) == set(NAMES) and {row.new_form for row in rows.values()} == {"8 bits"}
    assert all(set(row.parts) == {"padding", "kernel"} for row in rows.values())
    by_pass = {part.kind: set(part.by_pass) for part in found.parts}
    assert by_pass["kernel"] == {"quantize"} and by_pass["padding"] == {""}  # no pass changed a width
    assert all("quantize" in by_pass[kind] for kind in ("kernel", "fusion"))


@pytest.mark.parametrize("name", ["by channel", "nameless", "defaults"])
def test_names_come_from_the_float_file(name: str, tmp_path: Path) -> None:
    base, new = onnx.load(float_file(tmp_path)), onnx.load(FILES[name](tmp_path))
    assert is_quantised(new) and not is_quantised(base)
    found = origins_by_tensor(new, base)
    layers = {n.output[0]: n for n in new.graph.node if n.op_type in ("Conv", "Gemm")}
    assert {found[output].module for output in layers} == set(NAMES)
    assert {found[output].made_by for output in layers} == {"trace"}
