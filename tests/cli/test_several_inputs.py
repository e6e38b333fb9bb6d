"""Commands on networks of two inputs, from Python, ONNX and saved programs, with data of each kind."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import graphcomp
from graphcomp.compiler import load_source
from graphcomp.errors import LoadError
from graphcomp.report.report import read_report
from tests.cli.conftest import Cli
from tests.learnable import SHAPE
from tests.onnx.onnx_files import make, typed
from tests.onnx.read_examples import weight
from tests.several import NUMBERS, archive, fused

NET = """
import numpy as np
import torch
from tests.several import Fused, Tokens
def made(): return Fused(), (torch.ones(1, 3, 8, 8), torch.ones(1, 5))
def words(): return Tokens(), (torch.ones(1, 6, dtype=torch.int64), torch.ones(1, 6))
def bare(): return Fused()
def wrong(): return Fused(), "examples"
def rows():
    with np.load("two.npz") as file:
        return {part: list(zip(*(file[f"{n}_{suffix}"] for n in ("image", "numbers", "y"))))
                for part, suffix in (("train", "train"), ("eval", "test"))}
"""
SIZES = ["--input-shape", "image=1,3,8,8", "--input-shape", "numbers=1,5"]
SHAPES = "input_shape: {image: [1, 3, 8, 8], numbers: [1, 5]}"
COMPILE = ["--passes", "fold-bn, obs{ratio=0.5, multiple=1}, refit", "--target", "cpu-avx2", "--no-bench"]


@pytest.fixture
def spec(cli: Cli, tmp_path: Path) -> str:
    """A file of samples, and of a network, in the current folder."""
    Path("net.py").write_text(NET)
    return archive(tmp_path).replace(f"{tmp_path}/", "")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["net.py:made", "net.py:bare", "net.onnx", "saved"])
@pytest.mark.parametrize("data", ["npz:two.npz", "net.py:rows", "random"])
def test_compile_and_evaluate(cli: Cli, spec: str, model: str, data: str) -> None:
    sizes = SIZES if model == "net.py:bare" else []
    graphcomp.export_onnx(fused(), "net.onnx")
    graphcomp.save(fused(), "saved")
    done = cli("compile", model, *sizes, *COMPILE, "--data", data, "-o", "out")
    assert done.code == 0, done.err
    report = read_report(Path("out/report.json"))
    assert [step.name for step in report.steps] == ["fold-bn", "obs", "refit"]
    assert report.steps[-1].drift is not None and report.steps[-1].fit is not None
    assert (report.final.score is not None) == (data != "random")
    again = cli("compile", model, *sizes, *COMPILE, "--data", data, "-o", "out", "--resume")
    assert again.code == 0, again.err
    for made in ("out/program", "out/model.onnx"):
        found = cli("evaluate", made, "--data", data, "--json", "e.json")
        assert found.code == 0, found.err
        score = json.loads(Path("e.json").read_text())["snapshot"]["score"]
        expected = report.final.score
        assert (
            score is None if expected is None else score["value"] == pytest.approx(expected.value, abs=0.03)
        )


@pytest.mark.slow
def test_quantize_robustness_and_classes(cli: Cli, spec: str) -> None:
    """Images are damaged and numbers are not; some classes; 8 bits with a race."""
    passes = ["--passes", "fold-bn, quantize{samples=64}", "--target", "cpu-avx2", "--no-bench"]
    done = cli("compile", "net.py:made", *passes, "--data", spec, "--robustness", "-o", "out")
    assert done.code == 0, done.err
    report = read_report(Path("out/report.json"))
    assert report.robustness is not None and len(report.robustness.final) == 6
    assert report.quantized is not None and report.quantized.accuracy is not None
    some = cli("compile", "net.py:made", *COMPILE, "--data", spec, "--classes", "1,3", "-o", "some")
    assert some.code == 0, some.err
    assert read_report(Path("some/report.json")).final.score is not None
    assert "inputs: image 3x8x8, numbers 5" in cli("inspect", "net.py:bare", *SIZES).out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape"),
    [("net.py:made", ""), ("net.py:bare", SHAPES)],
)
def test_study(cli: Cli, spec: str, model: str, shape: str) -> None:
    text = f"""
recipe:
  model: {model}
  data: {spec}
  target: cpu-avx2
  passes: [{{obs: {{ratio: $rate, multiple: 1}}}}, refit]
grid: {{rate: [0.25, 0.5]}}
{shape}
"""
    Path("s.yaml").write_text(text)
    done = cli("study", "s.yaml", "--workers", "1", "-o", "out", "--check")
    assert done.code == 0, done.err
    rows = Path("out/results.csv").read_text().splitlines()
    assert len(rows) == 3
    resumed = cli("study", "s.yaml", "--workers", "1", "-o", "out", "--resume")
    assert resumed.code == 0 and Path("out/results.csv").read_text().splitlines() == rows


@pytest.mark.slow
def test_words(cli: Cli, spec: str) -> None:
    rng = np.random.RandomState(0)
    tokens = rng.randint(0, 20, (128, 6))
    np.savez("words.npz", tokens=tokens, mask=np.ones((128, 6), np.float32), y=tokens.sum(1) % 4)
    done = cli("compile", "net.py:words", *COMPILE, "--data", "npz:words.npz", "-o", "out")
    assert done.code == 0, done.err
    assert cli("evaluate", "out/model.onnx", "--data", "npz:words.npz").code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["net.py:bare"],
            "found no input shape, expected one; give --input-shape, e.g. 1,3,224,224",
        ),
        (["net.py:bare", *SIZES[2:]], "--input-shape: found none of 'image', expected one"),
        (
            ["net.py:bare", "--input-shape", "picture=1,3,8,8"],
            "found 'picture' for net.py:bare, expected",
        ),
        (
            ["net.py:made", "--input-shape", "1,3,8,8"],
            "found one without a name for net.py:made, which",
        ),
        (["net.py:wrong"], "found a network and a str, expected a network and a tensor"),
    ],
)
def test_shapes_that_are_none(cli: Cli, spec: str, words: list[str], expected: str) -> None:
    found = cli("inspect", *words)
    assert found.code == 1 and expected in " ".join(found.err.split()), found.err


def test_given_examples_may_have_another_size(cli: Cli, spec: str) -> None:
    shapes = {"image": (1, 3, 8, 8), "numbers": (2, NUMBERS)}
    program = load_source("net.py:made", None, shapes).program
    assert [tuple(x.shape) for x in program.example_inputs] == [(1, *SHAPE), (1, NUMBERS)]
    words = load_source("net.py:words", None, {"tokens": (1, 9), "mask": (1, 9)}).program
    assert [(x.dtype.is_floating_point, x.shape[1]) for x in words.example_inputs] == [(False, 9), (True, 9)]
    with pytest.raises(LoadError, match="which takes"):
        load_source("net.py:words", None, {"tokens": (1, 1 << 30, 1 << 10)})


def test_inputs_of_a_file_that_are_no_samples(cli: Cli) -> None:
    """A number is settled, whatever its input is called, and the result has no such input."""
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]),
        onnx.helper.make_node("Relu", ["c"], ["r"]),
        onnx.helper.make_node("Mul", ["r", "gain:0"], ["m"]),
        onnx.helper.make_node("Conv", ["m", "v"], ["y"], kernel_shape=[3, 3]),
    ]
    constants = {"w": weight(32, 3, 3, 3), "v": weight(4, 32, 3, 3)}
    onnx.save(typed(make(nodes, {"x": ("N", 3, 8, 8), "gain:0": ()}, constants)), "gain.onnx")
    failed = cli("inspect", "gain.onnx")
    assert failed.code == 1
    assert "say what it is once and for all: --input gain:0=VALUE" in failed.err
    given = ["--input", "gain:0=1.5"]
    assert cli("inspect", "gain.onnx", *given).code == 0
    passes = ["--passes", "l1{ratio=0.5}", "--data", "random", "--target", "cpu-avx2", "--no-bench"]
    assert cli("compile", "gain.onnx", *given, *passes, "-o", "out").code == 0
    assert [i.name for i in onnx.load("out/model.onnx").graph.input] == ["x"]
    assert read_report(Path("out/report.json")).recipe["arguments"] == {"gain:0": 1.5}
