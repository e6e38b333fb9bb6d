"""Models that one file cannot hold, with a limit that is lowered: two files, both or none, read back."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from graphcomp.compiler import Job, build, make_passes
from graphcomp.compiler.recipe import Recipe
from graphcomp.errors import BenchError, ExportError, PassError
from graphcomp.ir import Program, trace
from graphcomp.onnx import data_names, export, export_onnx, read_onnx, storage
from graphcomp.passes import PASSES
from graphcomp.runtime import benchmark, onnxfile, open_session
from tests.tiny import SHAPE, SPEC


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what one file holds."""
    monkeypatch.setattr(storage, "MOST_BYTES", 6000)


def network(seed: int = 0) -> Program:
    """About 5 kB of weights, among them small ones."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    return trace(net.eval(), torch.randn(1, 3, 8, 8))


def folder_of(path: Path) -> set[str]:
    return {p.name for p in path.parent.iterdir()}


def computed(path: Path) -> np.ndarray:
    feeds = {"input": np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 3, 8, 8)}
    return np.asarray(open_session(path).session.run(None, feeds)[0])


def test_two_files_that_are_one_model(low: None, tmp_path: Path) -> None:
    program, path = network(), tmp_path / "model.onnx"
    made = export_onnx(program, path)
    assert made.data is not None and folder_of(path) == {"model.onnx", made.data}
    assert data_names(path) == {made.data}
    assert made.bytes == sum((tmp_path / name).stat().st_size for name in folder_of(path))
    outline = onnx.load(path, load_external_data=False)
    beside = [t for t in outline.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {tuple(t.dims) for t in beside} == {(16, 3, 3, 3), (8, 16, 3, 3), (4, 128)}
    assert path.stat().st_size < 6000 and onnxfile.read(path).bytes == made.bytes
    x = torch.from_numpy(np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 3, 8, 8))
    again = read_onnx(path)
    for found in (torch.from_numpy(computed(path)), again.module(x)):
        torch.testing.assert_close(found, program.module(x), rtol=1e-4, atol=1e-5)
    timed = benchmark(path, path, runs=6, seconds=0.05)
    assert timed.base.bytes == made.bytes and timed.base.macs == timed.new.macs > 0


def test_a_second_export_takes_the_place_of_the_first(low: None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    strange = tmp_path / "model-0123456789abcdef.data"
    strange.write_bytes(b"of somebody else")
    first = export_onnx(network(), path)
    again = export_onnx(network(), path)
    assert first.data == again.data
    other = export_onnx(network(1), path)
    assert other.data != first.data and folder_of(path) == {"model.onnx", other.data, strange.name}
    before = computed(path)
    smaller = export_onnx(network(1), path, weights="fp16")
    assert smaller.data is None and folder_of(path) == {"model.onnx", strange.name}
    assert np.abs(computed(path) - before).max() < 1e-2


def test_what_is_refused_leaves_both_files_as_they_were(
    low: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(network(), path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def wrong(*_: object) -> None:
        raise ExportError("something else")

    with monkeypatch.context() as patch:
        patch.setattr(export, "compare", wrong)
        for weights in ("fp32", "fp16"):
            with pytest.raises(ExportError, match="something else"):
                export_onnx(network(1), path, weights=weights)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ExportError, match="found no suffix, expected one"):
        export_onnx(network(), tmp_path / "model")


def test_half_precision_beside_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried as float32 first, with files of its own that go."""
    monkeypatch.setattr(storage, "MOST_BYTES", 1000)
    path = tmp_path / "model.onnx"
    made = export_onnx(network(), path, weights="fp16")
    assert made.data is not None and made.half is not None and made.half.tensors == 3
    assert folder_of(path) == {"model.onnx", made.data} and np.isfinite(computed(path)).all()


@pytest.mark.parametrize("location", ["../w.data", "/etc/passwd", "link", ".", "inner/../model.onnx"])
def test_files_elsewhere_are_not_read_for_times(low: None, location: str, tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(bytes(1 << 16))
    path = tmp_path / "place" / "model.onnx"
    export_onnx(network(), path)
    (path.parent / "link").symlink_to(tmp_path / "w.data")
    outline = onnx.load(path, load_external_data=False)
    for tensor in outline.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(outline.SerializeToString())
    with pytest.raises(BenchError, match="its external data cannot be read"):
        onnxfile.read(path)


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files beside files are its own: named in the report, replaced and removed."""
    out = tmp_path / "out"

    def run(passes: str) -> set[str]:
        bench = {"runs": 6, "seconds": 0.05}
        recipe = Recipe.model_validate({"passes": [passes], "data": "random?limit=32", "bench": bench})
        report = build(Job(SPEC, recipe, make_passes(recipe, PASSES), None, SHAPE), out, overwrite=True)
        named = {report.export.data, report.baseline_export.data} - {None}
        assert {p.name for p in out.iterdir() if p.suffix == ".data"} == named
        assert report.bench is not None and report.bench.new.bytes == report.export.bytes
        return {str(name) for name in named}

    with monkeypatch.context() as patch:
        patch.setattr(storage, "MOST_BYTES", 4000)
        first = run("l1{ratio=0.25, multiple=1}")
        second = run("l1{ratio=0.5, multiple=1}")
        assert len(first) == len(second) == 2 and len(first & second) == 1
        with pytest.raises(PassError, match=r"found .* GiB, expected no more than one ONNX file holds"):
            run("l1{target=latency:0.9, multiple=1}")
    assert run("l1{ratio=0.25, multiple=1}") == set()
