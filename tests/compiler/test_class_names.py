"""Names of classes in the metadata of every file of a run."""

import ast
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from graphcomp.compiler import Job, build, make_passes
from graphcomp.compiler.class_names import KEY, MOST_BYTES, with_class_names
from graphcomp.compiler.recipe import Recipe
from graphcomp.compiler.source import Source
from graphcomp.errors import LoadError
from graphcomp.ir import load
from graphcomp.onnx import export_onnx, read_onnx
from graphcomp.passes import PASSES
from tests.tiny import SHAPE, SPEC, images_in, tiny_program

NAMES = ["cat", 'Köln\'s "dog"', "a, b", "4"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    return path


def names_in(path: Path) -> dict[int, str]:
    found = {p.key: p.value for p in onnx.load(path).metadata_props}
    return dict(ast.literal_eval(found[KEY]))


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "expected"), [(None, NAMES), ((3, 1), [NAMES[1], NAMES[3]])])
def test_every_file_of_a_run_has_them(
    classes: tuple[int, ...] | None, expected: list[str], file: Path, tmp_path: Path
) -> None:
    data = images_in(tmp_path, 240)
    recipe = Recipe.model_validate(
        {"passes": ["l1{ratio=0.5}, quantize"], "data": data, "bench": False, "classes": classes}
        | {"export": {"class_names": str(file), "weights": "fp16"}}
    )
    out = tmp_path / "out"
    report = build(Job(SPEC, recipe, make_passes(recipe, PASSES), None, SHAPE), out)
    for name in ("model.onnx", "baseline.onnx", "model-int8.onnx"):
        assert names_in(out / name) == dict(enumerate(expected))
    again = load(out / "program")
    export_onnx(again, tmp_path / "again.onnx", batches=(1,))
    assert names_in(tmp_path / "again.onnx") == dict(enumerate(expected))
    assert KEY in read_onnx(out / "model.onnx").interface.metadata
    assert report.export.half is not None and report.baseline_export.half is None
    assert report.export.bytes < report.baseline_export.bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\nc\n", r"found 3 names, expected 4, one a line for every output of the network"),
        (b"a\nb\nc\nd\ne", "found 5 names, expected 4"),
        (b"a\n\nb\nc\nd\n", r"names.txt:2: found no name, expected one a line"),
        (b"", "names.txt:1: found no name"),
        (b"\xff\xfe", "it is no text, expected a text file with a class name a line"),
        (b"a\n" * MOST_BYTES, f"expected a text file of at most {MOST_BYTES} bytes"),
    ],
)
def test_files_that_do_not_name_the_outputs(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        with_class_names(Source(tiny_program(), None, None), file, None)


@pytest.mark.parametrize("name", ["absent", ".", "x" * 300])
def test_files_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="expected a text file"):
        with_class_names(Source(tiny_program(), None, None), tmp_path / name, None)


@pytest.mark.slow
def test_names_of_a_file_whose_classes_are_cut_are_left_out(file: Path, tmp_path: Path) -> None:
    """Else the smaller file names outputs that it has not, and the ones it has wrongly."""
    named = with_class_names(Source(tiny_program(), None, None), file, None).program
    told = named.interface
    named = replace(named, interface=told.model_copy(update={"metadata": {**told.metadata, "author": "x"}}))
    export_onnx(named, tmp_path / "named.onnx", batches=(1,))
    data = images_in(tmp_path, 240)
    recipe = Recipe.model_validate(
        {"passes": ["l1{ratio=0.5, multiple=1}"], "data": data, "bench": False, "classes": (3, 1)}
    )
    job = Job(str(tmp_path / "named.onnx"), recipe, make_passes(recipe, PASSES), None, None)
    report = build(job, tmp_path / "out")
    found = {p.key: p.value for p in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert KEY not in found and found["author"] == "x"
    assert any("--class-names writes others" in said for said in report.remarks)
