"""The command line: output, exit codes, and one clear message for everything that can be wrong."""

import csv
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

import graphcomp
from graphcomp.cli import console, passes
from graphcomp.cli import main as command_line
from graphcomp.compiler import Job, results
from graphcomp.errors import GraphcompWarning, ProviderError
from graphcomp.ir import Program, load
from graphcomp.onnx import export_onnx
from graphcomp.passes import L1, PASSES, FoldBN
from graphcomp.pipeline import Context, Pipeline
from graphcomp.records import Bench, Evaluation, Explanation, Plan
from graphcomp.report.report import read_report
from graphcomp.runtime.doctor import Finding
from graphcomp.runtime.session import probe
from tests.cli.conftest import Cli, Result
from tests.runtime.test_bench import write
from tests.tiny import SPEC, tiny

ROOT = Path(__file__).parents[2]
TINY = [SPEC, "--input-shape", "1,3,8,8", "--data", "random?limit=8", "--target", "cpu-avx2"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for commands that read one."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        passes = ["--passes", "fold-bn, l1{ratio=0.5}"]
        patch.setattr(sys, "argv", ["graphcomp", "compile", *TINY, *passes, "--no-bench", "-o", str(out)])
        command_line.main()
    assert not stop.value.code
    return out


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes only: what comes after them takes seconds and is tested where it lives."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "export_onnx", stop)


# ---------------------------------------------------------------------- commands that work


@pytest.mark.slow
def test_compile(cli: Cli, tmp_path: Path) -> None:
    """Everything from a recipe file, with what the command line says on top."""
    rng = np.random.default_rng(0)
    np.savez("d.npz", x=rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), y=rng.integers(0, 4, 60))
    save_file(tiny().state_dict(), "w.safetensors")
    Path("r.yaml").write_text(
        f"model: {SPEC}\nweights: w.safetensors\ndata: npz:d.npz\ntarget: cpu-avx512\nseed: 4\n"
        "passes: [{l1: {target: {macs: 0.5}}}, fold-bn]\nbench: {runs: 6, seconds: 0.2}\n"
    )
    found = cli(
        "compile", "--recipe", "r.yaml", "--target", "cpu-avx2", "--input-shape", "1,3,8,8", "-o", "o"
    )
    assert found.code == 0, found.err
    for text in (
        "Trainable params",
        "MACs per sample",
        "Accuracy (top-1)",
        "1. l1: removed ",
        "2. fold-bn: folded 3",
    ):
        assert text in found.out
    assert "results in o: model.onnx, program/, plans/, report.json, report.html" in found.out
    for text in ("load the model", "[1/2] l1: plan", "[2/2] fold-bn: verify", "export the result"):
        assert text in found.err
    report = read_report(tmp_path / "o/report.json")
    assert (report.target, report.seed, report.weights) == ("cpu-avx2", 4, "w.safetensors")
    assert report.final.macs <= 0.5 * report.baseline.macs
    assert report.bench is not None and report.final.score is not None


def test_options_on_top_of_a_recipe(cli: Cli, tmp_path: Path, no_export: None) -> None:
    Path("r.yaml").write_text(f"model: {SPEC}\npasses: [random: {{ratio: 0.5}}]\nseed: 4\ndata: random\n")
    arguments = ["--recipe", "r.yaml", "--seed", "5", "--target", "cpu-avx2"]
    found = cli("compile", *arguments, "--data", "random?limit=9", "--input-shape", "1,3,8,8", "-o", "o")
    assert found.code == 130
    state = json.loads(Path("o/state.json").read_text())["fingerprint"]
    assert (state["seed"], state["data"], state["target"]) == (5, "random?limit=9", "cpu-avx2")
    assert [list(p) for p in state["passes"]] == [["random"]]


@pytest.mark.parametrize(("option", "expected"), [([], "dense"), (["--dct", "both"], "both")])
def test_storage_of_dct_layers(
    option: list[str], expected: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    def stop(job: Job, *_: object, **__: object) -> None:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr("graphcomp.compiler.build", stop)
    Path("r.yaml").write_text(f"model: {SPEC}\npasses: [fold-bn]\nexport: {{dct: dense, opset: 20}}\n")
    cli("compile", "--recipe", "r.yaml", *option, "-o", "o")
    assert (jobs[0].recipe.export.dct, jobs[0].recipe.export.opset) == (expected, 20)


@pytest.mark.parametrize(
    ("in_recipe", "argument", "loaded"),
    [(SPEC, None, True), (None, SPEC, True), (SPEC, SPEC, True), ("models:resnet20", SPEC, False)],
)
def test_weights_of_a_recipe_belong_to_its_model(
    in_recipe: str | None, argument: str | None, loaded: bool, cli: Cli, no_export: None
) -> None:
    save_file(
        {k: v + 1 if v.is_floating_point() else v for k, v in tiny().state_dict().items()}, "w.safetensors"
    )
    model = f"model: {in_recipe}\n" if in_recipe else ""
    Path("r.yaml").write_text(f"{model}weights: w.safetensors\npasses: [fold-bn]\ndata: random?limit=8\n")
    found = cli(
        "compile", *([argument] if argument else []), "--recipe", "r.yaml", "--input-shape", "1,3,8,8"
    )
    assert found.code == 130, found.err
    folded = graphcomp.load("out/checkpoints/01-fold-bn")
    bias = tiny().state_dict()["fc.bias"]
    assert torch.equal(folded.tensors["fc.bias"], bias + 1 if loaded else bias)


def test_demo_recipe_is_found_from_anywhere(cli: Cli) -> None:
    """`models/demo.yaml` is that of the package where there is no such file."""
    found = cli("compile", "models:absent", "--recipe", "models/demo.yaml", "-o", "o")
    assert found.code == 1 and "models:absent" in found.err and "demo.yaml" not in found.err


def test_the_studies_of_the_sources_are_there_in_every_folder(cli: Cli) -> None:
    """So is one in a quick size: its cells, on data that come with graphcomp."""
    found = cli("study", "recipes/pfa-table1.yaml", "--quick", "--list")
    assert found.code == 0 and re.fullmatch(r"energy=0.8-\w{8}\n", found.out), found.err
    found = cli("study", "recipes/absent.yaml", "--list")
    assert found.code == 1 and "absent.yaml: No such file" in found.err


def test_passes(cli: Cli) -> None:
    found = cli("passes")
    assert found.code == 0
    for name, kind in PASSES.items():
        assert f"{name}: " in found.out
        for option in fields(kind):
            assert f"│ {option.name} " in found.out
    for text in ("couple | pad", "{macs: x} or {params: x}", "number >= 0 < 1", '["*"]', "1000"):
        assert text in found.out


def test_passes_as_json(cli: Cli) -> None:
    schemas = json.loads(cli("passes", "--json").out)
    assert list(schemas) == list(PASSES)
    for name, kind in PASSES.items():
        assert set(schemas[name]["properties"]) == {f.name for f in fields(kind)}
    assert schemas["l1"]["properties"]["min_channels"]["default"] == 0
    assert schemas["l1"]["additionalProperties"] is False


def test_doctor(cli: Cli) -> None:
    found = cli("doctor")
    assert found.code == 0, found.out
    for text in ("torch", "onnxruntime", "instruction set", "provider cpu", "provider cuda", "load"):
        assert text in found.out


@pytest.mark.parametrize("name", ["torch", "onnxruntime-gpu", "cuda thread loader"])
def test_doctor_fails_for_what_is_essential(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called."""
    good = Finding("torch", True, "2.9")
    missing = Finding(name, False, "not installed", "pip install [sic] :x:")
    monkeypatch.setattr("graphcomp.runtime.diagnose", lambda: [good, replace(missing, essential=False)])
    assert cli("doctor").code == 0
    monkeypatch.setattr("graphcomp.runtime.diagnose", lambda: [good, missing])
    found = cli("doctor")
    assert found.code == 1 and "pip install [sic] :x:" in found.out


@pytest.mark.slow
def test_bench(cli: Cli, compiled: Path) -> None:
    files = [compiled / "baseline.onnx", compiled / "model.onnx"]
    found = cli(
        "bench", *files, "--batch", "1,2", "--runs", "6", "--seconds", "0.1", "--json", "b/bench.json"
    )
    assert found.code == 0, found.err
    assert "Time per run in ms (cpu, 1 thread" in found.out
    assert "Speedup by batch size" in found.out and "of theory" in found.out
    bench = Bench.model_validate_json(Path("b/bench.json").read_text())
    assert [b.batch for b in bench.batches] == [1, 2]
    report = read_report(compiled / "report.json")
    assert bench.batches[0].theoretical == pytest.approx(report.baseline.macs / report.final.macs)


@pytest.mark.slow
def test_explain(cli: Cli, compiled: Path) -> None:
    files = [compiled / "baseline.onnx", compiled / "model.onnx"]
    outputs = ["--json", "e/explained.json", "--svg", "e/waterfall.svg"]
    found = cli("explain", *files, "--batch", "2", "--runs", "6", "--seconds", "0.1", *outputs)
    assert found.code == 0, found.err
    assert re.match(r"\d+\.\d\dx instead of \d+\.\d\dx \(batch 2, cpu, 1 thread, ", found.out)
    for text in ("padding to whole blocks", "By layer", "stem", "gap, as measured"):
        assert text in found.out
    explanation = Explanation.model_validate_json(Path("e/explained.json").read_text())
    assert sum(part.ms for part in explanation.parts) == pytest.approx(explanation.gap.value)
    assert {row.made_by for row in explanation.rows if row.new_operators} == {"l1"}
    assert explanation.bench is not None and "promised by the MACs" in Path("e/waterfall.svg").read_text()


def test_inspect(cli: Cli) -> None:
    found = cli("inspect", SPEC, "--input-shape", "1,3,8,8", "--nodes", "--json", "i.json", "--svg", "i.svg")
    assert found.code == 0, found.err
    assert "%stem: 1x16x8x8 = conv 3->16 k3 s1" in found.out
    for text in ("stem", "outer", "network output", "MACs"):
        assert text in found.out
    json.loads(Path("i.json").read_text())
    assert Path("i.svg").read_text().lstrip().startswith(("<svg", "<?xml"))


def test_inspect_for_other_tools(cli: Cli) -> None:
    found = cli("inspect", SPEC, "--input-shape", "1,3,8,8", "--graphml", "i.graphml", "--dot", "o/i.dot")
    assert found.code == 0, found.err
    graph = networkx.read_graphml("i.graphml", force_multigraph=True)
    assert graph.nodes["stem"]["shape"] == "1x16x8x8" and graph.nodes["stem"]["groups"] == "1"
    written = Path("o/i.dot").read_text()
    assert written.startswith("digraph ") and all(f'"{name}"' in written for name in graph)
    Path("file").touch()
    for option in ("--graphml", "--dot"):
        refused = cli("inspect", SPEC, "--input-shape", "1,3,8,8", option, "file/i")
        assert refused.code == 1 and refused.err.count("\n") == 1 and "file/i: found " in refused.err


def test_inspect_a_saved_program(cli: Cli, compiled: Path) -> None:
    found = cli("inspect", compiled / "program", "--nodes", "--join", "pad")
    assert found.code == 0, found.err
    assert "%stem: 1x8x8x8 = conv 3->8 k3 s1" in found.out


ODD = "[red]:x:[b] " + "n" * 180
"""Markup and the code of an emoji to rich, and wider than the terminal."""


@pytest.mark.parametrize("command", ["compile", "inspect", "evaluate", "study", "list", "wrong"])
def test_names_are_shown_as_they_are(command: str, cli: Cli) -> None:
    """Of files, folders, modules, classes and axes; on the terminal they may be folded, paths are not."""
    Path(f"{ODD}.py").write_text(
        "import torch\n"
        "def net():\n"
        "    layers = torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), torch.nn.Linear(256, 2)\n"
        "    one = torch.nn.Sequential(*layers)\n"
        f"    one.add_module({':x:[b]' * 30!r}, torch.nn.Linear(2, 2))\n"
        "    return one.eval()\n"
    )
    model = [f"{ODD}.py:net", "--input-shape", "1,3,8,8"]
    Path("s.yaml").write_text(
        f"recipe: {{model: {SPEC!r}, data: random, passes: [{{l1: {{ratio: 0.5, include: $where}}}}]}}\n"
        f"grid: {{where: [{ODD!r}, absent]}}\n"
    )
    found = cli(
        *{
            "compile": ["compile", *model, "--passes", "fold-bn", "-o", f"{ODD}.py"],
            "inspect": ["inspect", *model, "--nodes"],
            "evaluate": ["evaluate", *model, "--data", "random?limit=4"],
            "study": ["study", "s.yaml", "--workers", "1", "-o", ODD, "--input-shape", "1,3,8,8"],
            "list": ["study", "s.yaml", "--list"],
            "wrong": ["inspect", f"{ODD}.py:absent", "--input-shape", "1,3,8,8"],
        }[command]
    )
    shown = "".join((found.out + found.err).split())
    assert "Traceback" not in shown and "\N{CROSS MARK}" not in shown
    named = {
        "inspect": ":x:[b]" * 30,
        "list": "where=-red-x-b-nnn",
        "study": f"resultsin{ODD}".replace(" ", ""),
    }
    expected = named.get(command, ODD.replace(" ", ""))
    assert expected in shown, shown
    if command == "study":
        assert f"results in {ODD}: results.csv, study.html, cells/" in found.out.splitlines()


@pytest.mark.parametrize("width", ["20", "200"])
def test_what_machines_read_is_plain(
    width: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    """However narrow the terminal: JSON, the printed program, names of cells."""
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("FORCE_COLOR", "1")
    schemas = {"l1": {**json.loads(passes.FILE.read_text())["l1"], "description": f"{ODD}\n\nMore."}}
    Path("passes.json").write_text(json.dumps(schemas))
    monkeypatch.setattr(passes, "FILE", Path("passes.json"))
    schemas = json.loads(cli("passes", "--json").out)
    assert schemas["l1"]["description"].startswith(ODD)
    program = str(graphcomp.load(compiled / "program"))
    assert cli("inspect", compiled / "program", "--nodes").out.startswith(f"{program}\n")


def test_version(cli: Cli) -> None:
    assert cli("--version") == Result(0, f"{graphcomp.__version__}\n", "")


def test_help(cli: Cli) -> None:
    bare = cli()
    for found in (bare, cli("--help"), cli("-h")):
        for name in (
            "compile",
            "inspect",
            "bench",
            "explain",
            "passes",
            "doctor",
            "smaller and measurably faster",
        ):
            assert name in found.out + found.err
    assert "--resume" in cli("compile", "--help").out


@pytest.mark.parametrize(
    "arguments",
    [["nosuch"], ["compile", "--nosuch"], ["bench", "one.onnx"], ["explain", "one.onnx"], ["inspect"]],
)
def test_wrong_usage(arguments: list[str], cli: Cli) -> None:
    found = cli(*arguments)
    assert found.code == 2 and "Traceback" not in found.err and "Usage: " in found.err


# ---------------------------------------------------------------------- everything that can be wrong


def failing(cli: Cli, *arguments: object) -> str:
    """The one message of a command that fails; whitespace as single spaces."""
    found = cli(*arguments)
    assert found.code == 1, found
    assert found.err.count("error:") == 1 and "Traceback" not in found.err + found.out
    assert found.out == ""
    return " ".join(found.err[found.err.index("error:") :].split())


def compile_tiny(cli: Cli, *changes: str, passes: str = "fold-bn") -> str:
    """Fails before anything is written."""
    message = failing(cli, "compile", *TINY, "--passes", passes, "-o", "o", *changes)
    assert not Path("o").exists()
    return message


def test_unreadable_weights(cli: Cli) -> None:
    for name in ("w.safetensors", "w.pth"):
        Path(name).write_bytes(b"not weights at all")
        message = compile_tiny(cli, "--weights", name)
        assert message.startswith(f"error: {name}: found an unreadable file (")
    assert compile_tiny(cli, "--weights", "absent.pth").startswith("error: absent.pth: found no such file")
    torch.save(tiny(), "whole.pth")  # a module: loading it would run code
    assert "objects that need unrestricted pickle" in compile_tiny(cli, "--weights", "whole.pth")


def test_weights_of_another_shape(cli: Cli) -> None:
    state = tiny().state_dict()
    state["fc.weight"] = torch.zeros(4, 17)
    state["spare"] = state.pop("fc.bias")
    torch.save(state, "w.pth")
    message = compile_tiny(cli, "--weights", "w.pth")
    assert message.startswith("error: w.pth: found other weights than Tiny has")
    assert "1 missing: fc.bias" in message and "1 unexpected: spare" in message
    assert "fc.weight (found float32 [4, 17], expected float32 [4, 16])" in message


def test_weights_that_are_not_numbers(cli: Cli) -> None:
    state = tiny().state_dict()
    state["inner.weight"][1, 2, 0, 0] = torch.nan
    save_file(state, "w.safetensors")
    message = compile_tiny(cli, "--weights", "w.safetensors")
    assert message.startswith(
        "error: w.safetensors: found NaN or infinite values in inner.weight, expected finite"
    )


def test_untraceable_model(cli: Cli) -> None:
    Path("m.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        if x.sum() > 0:\n            return x\n        return -x\n"
    )
    message = failing(cli, "compile", "m.py:Net", *TINY[1:], "--passes", "fold-bn", "-o", "o")
    assert "m.py:4: `if x.sum() > 0:`" in message and "Net (Net)" in message and "torch.fx.wrap" in message


@pytest.mark.parametrize(
    ("content", "model", "expected"),
    [
        (None, "m.py:net", "m.py: found no such file, expected a Python file"),
        ("def nett(): ...", "m.py:net", "m.py: found no 'net', .*; did you mean nett"),
        ("def net(): return 3", "m.py:net", "m.py:net: found a int, expected a torch.nn.Module"),
        ("def net(): return 1 / 0", "m.py:net", "m.py:1: found ZeroDivisionError: division by zero"),
        ("def net(:", "m.py:net", "m.py:1: found SyntaxError"),
        (
            None,
            "torchvision:resnet51",
            "torchvision:resnet51: found no such network, .*; did you mean .*resnet50",
        ),
        (None, "models:resnet21", "models:resnet21: found no such network, expected one of resnet20"),
        (None, "resnet50", "model 'resnet50': found no such thing, expected torchvision:NAME, .*resnet50"),
    ],
)
def test_model_that_cannot_be_had(content: str | None, model: str, expected: str, cli: Cli) -> None:
    if content is not None:
        Path("m.py").write_text(content)
    message = failing(cli, "compile", model, *TINY[1:], "--passes", "fold-bn", "-o", "o")
    assert re.search(expected, message), message
    assert not Path("o").exists()


def test_typo_in_a_recipe(cli: Cli) -> None:
    Path("r.yaml").write_text("passes:\n  - fold-bn\n  - l1: {ratoi: 0.5}\n")
    message = failing(cli, "compile", *TINY, "--recipe", "r.yaml", "-o", "o")
    assert message.startswith("error: r.yaml:3: l1.ratoi: found an unknown option") and "'ratio'?" in message
    assert not Path("o").exists()
    message = failing(cli, "compile", *TINY, "--recipe", "absent.yaml", "-o", "o")
    assert message.startswith("error: absent.yaml: ") and "expected a readable YAML file" in message


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ("fold-bm", "found no pass 'fold-bm', expected one of fold-bn, .*; did you mean 'fold-bn'"),
        ("l1{ratoi=0.5}", "l1.ratoi: found an unknown option, .*; did you mean 'ratio'"),
        ("l1{ratio=1.0}", "l1.ratio: found 1.0, Input should be less than 1"),
        ("l1{ratio=0.5", "column 12: found the end, expected a closing bracket"),
        ("", "column 1: found '', expected the name of a pass"),
    ],
)
def test_bad_passes(passes: str, expected: str, cli: Cli) -> None:
    assert re.search(expected, compile_tiny(cli, passes=passes))


def test_nothing_to_do(cli: Cli) -> None:
    message = failing(cli, "compile", *TINY, "-o", "o")
    assert message.startswith("error: found neither --recipe nor --passes, expected one, e.g. --passes")
    message = failing(cli, "compile", "--passes", "fold-bn", "-o", "o")
    assert message.startswith("error: MODEL: found none, expected one on the command line or as `model:`")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--target", "gpu", "target: found 'gpu', expected one of auto, cpu-avx512"),
        ("--classes", "1", "--classes: found '1', expected two or more classes by id or name such as 0,3,5"),
        ("--classes", "1,9", "classes: found 'random.limit=8' without labels, expected labelled data"),
        ("--classes", "1,", "--classes: found '1,', expected two or more classes"),
        ("--head", "big", "--head: found 'big', expected slice or random"),
        ("--input-shape", "3xx8", "--input-shape: found '3xx8', expected positive sizes with the batch"),
        ("--input-shape", "1,3,0,8", "--input-shape: found '1,3,0,8', expected positive sizes"),
        (
            "--input-shape",
            "1,5,8,8",
            "found '1,5,8,8' beside others, expected one for each input, by name",
        ),
        ("--data", "nothing", "data spec 'nothing': found source 'nothing', expected one of digits"),
        ("--data", "npz:absent.npz", "absent.npz"),
        ("--data", "npz:empty.npz", "empty.npz: found .*"),
        ("--data", "npz:wrong.npz", "wrong.npz: found samples of shape 3x9x9, expected 3x8x8"),
        ("--data", "npz:labels.npz", "npz:labels.npz: found 8 classes, expected 4, .*"),
        ("--data", "imagefolder:folder", "folder: found .*"),
        ("--data", "cifar10:folder", "folder.*found .*"),
    ],
)
def test_bad_options(option: str, value: str, expected: str, cli: Cli) -> None:
    Path("folder").mkdir()
    np.savez("empty.npz", x=np.zeros((0, 8, 8, 3), np.uint8), y=np.zeros(0, np.int64))
    np.savez("wrong.npz", x=np.zeros((9, 9, 9, 3), np.uint8), y=np.zeros(9, np.int64))
    np.savez("labels.npz", x=np.zeros((9, 8, 8, 3), np.uint8), y=np.full(9, 7))
    message = failing(cli, "compile", *TINY, option, value, "--passes", "fold-bn", "-o", "o")
    assert re.search(expected, message), message
    assert not Path("o").exists() or list(Path("o").iterdir()) == []  # at most an empty directory


@pytest.mark.slow
def test_empty_layer(cli: Cli) -> None:
    """What would leave nothing is refused, what would remove nothing says so; the pass before is kept."""
    message = failing(cli, "compile", *TINY, "--passes", "fold-bn, l1{target=macs:0.01}", "-o", "o")
    assert message.startswith("error: pass 'l1' failed after trace > fold-bn: target macs: found 0.2")
    assert "expected 0.01; ask for less, include more layers, or set multiple=1" in message
    message = failing(cli, "compile", *TINY, "--passes", "l1{ratio=0.01}", "-o", "p")
    assert "error: l1: found nothing to change (" in message and "--allow-nothing" in message
    assert not list(Path("p").rglob("model.onnx"))
    same = cli(
        "compile", *TINY, "--passes", "l1{ratio=0.01}", "-o", "p", "--resume", "--allow-nothing", "--no-bench"
    )
    assert same.code == 0 and "removed 0 of " in same.out and list(Path("p").rglob("model.onnx"))
    assert Path("o/checkpoints/01-fold-bn.json").exists()


def _has(provider: Any) -> bool:
    try:
        probe(provider)
    except ProviderError:
        return False
    return True


@pytest.mark.skipif(_has("cuda"), reason="the CUDA provider works here")
def test_absent_provider(cli: Cli, compiled: Path) -> None:
    message = failing(
        cli,
        "bench",
        compiled / "baseline.onnx",
        compiled / "model.onnx",
        "--provider",
        "cuda",
        "--json",
        "b.json",
    )
    assert message.startswith("error: provider 'cuda': ") and "`graphcomp doctor`" in message
    assert not Path("b.json").exists()
    files = compiled / "baseline.onnx", compiled / "model.onnx"
    message = failing(cli, "bench", *files, "--provider", "cpu,cuda", "--cuda-graphs", "--json", "b.json")
    assert message.startswith("error: provider 'cuda': ") and not Path("b.json").exists()  # nor the rest
    assert failing(cli, "explain", *files, "--provider", "cuda").startswith("error: provider 'cuda': ")
    message = compile_tiny(cli, "--target", "cuda-fp16")  # before any work
    assert message.startswith("error: provider 'cuda': ")


def test_a_target_that_is_elsewhere(cli: Cli, no_export: None) -> None:
    """Without timing, a network is compiled for a device that this machine does not have."""
    found = cli("compile", *TINY, "--target", "tensorrt-int8", "--passes", "fold-bn", "--no-bench", "-o", "o")
    assert found.code == 130 and "fold-bn: done" in found.err  # stopped in the export


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["absent.onnx", "absent.onnx"], "absent.onnx"),
        (["text.onnx", "text.onnx"], "text.onnx"),
        (
            ["text.onnx", "text.onnx", "--batch", "1,x"],
            "--batch: found '1,x', expected positive integers such as 1,8",
        ),
        (["text.onnx", "text.onnx", "--batch", "0"], "--batch: found '0', expected positive integers"),
        (
            ["text.onnx", "text.onnx", "--provider", "cpu,tpu"],
            "--provider: found 'cpu,tpu', expected cpu, cuda",
        ),
        (
            ["text.onnx", "text.onnx", "--cuda-graphs"],
            "CUDA graphs: found provider 'cpu', expected one of cuda",
        ),
    ],
)
def test_bench_of_what_is_no_model(arguments: list[str], expected: str, cli: Cli) -> None:
    Path("text.onnx").write_text("hello")
    assert expected in failing(cli, "bench", *arguments)


def test_explain_what_cannot_be_compared(cli: Cli, compiled: Path) -> None:
    Path("text.onnx").write_text("hello")
    assert "text.onnx: " in failing(cli, "explain", compiled / "model.onnx", "text.onnx")
    other = write(Path("other.onnx"), size=4, name="input")
    message = failing(cli, "explain", compiled / "model.onnx", other)
    assert message.startswith("error: inputs: found ") and "compare exports of the same task" in message


def test_inspect_what_is_no_model(cli: Cli) -> None:
    assert "found no input shape, expected one; give --input-shape" in failing(cli, "inspect", SPEC)
    assert "found no such thing" in failing(cli, "inspect", "nothing")


def test_full_disk(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        message = failing(cli, "compile", *TINY, "--passes", "fold-bn", "-o", "o")
    assert "state.json: found 'No space left on device'" in message and "free some space" in message
    assert not Path("o").exists()


def test_output_that_is_taken(cli: Cli, compiled: Path) -> None:
    message = failing(cli, "compile", *TINY, "--passes", "fold-bn", "-o", compiled)
    assert "expected an empty or new directory; use --resume to go on" in message and "--overwrite" in message
    message = failing(cli, "compile", *TINY, "--passes", "fold-bn", "-o", compiled, "--resume")
    assert message.startswith("error: --resume: passes: found ")
    Path("o").mkdir()
    Path("o/notes.txt").write_text("mine")
    message = failing(cli, "compile", *TINY, "--passes", "fold-bn", "-o", "o", "--overwrite")
    assert "found 'notes.txt', which is not graphcomp's" in message


def test_interrupt(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second pass: exit code 130, what to do next, the first pass kept."""

    def plan(*_: object) -> Plan:
        raise KeyboardInterrupt

    monkeypatch.setattr(L1, "plan", plan)
    found = cli("compile", *TINY, "--passes", "fold-bn, l1{ratio=0.5}", "-o", "o")
    assert found.code == 130
    assert "interrupted: finished passes are kept" in found.err and "--resume" in found.err
    assert "Traceback" not in found.err and found.out == ""
    assert Path("o/checkpoints/01-fold-bn.json").exists() and not Path("o/checkpoints/02-l1.json").exists()


def test_interrupted_pass_speaks_for_itself(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*_: object) -> Plan:
        raise KeyboardInterrupt("stopped after step 3 of 9 [sic]")

    monkeypatch.setattr(L1, "plan", plan)
    found = cli("compile", *TINY, "--passes", "l1{ratio=0.5}", "-o", "o")
    assert found.code == 130 and "interrupted: stopped after step 3 of 9 [sic]\n" in found.err


def test_resume(cli: Cli, monkeypatch: pytest.MonkeyPatch, no_export: None) -> None:
    """--resume plans nothing again that was finished."""
    arguments = ["compile", *TINY, "--passes", "fold-bn, l1{ratio=0.5}", "-o", "o"]
    assert cli(*arguments).code == 130  # in the export
    monkeypatch.setattr(FoldBN, "plan", None)
    monkeypatch.setattr(L1, "plan", None)
    again = cli(*arguments, "--resume")
    assert again.code == 130 and "export the baseline" in again.err and "l1: plan" not in again.err


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that tells what it counts."""

    def plan(self: L1, program: object, context: Context) -> Plan:
        for i in range(1, 4):
            context.progress(f"calibrate: {i},000 of 3,000 samples", i / 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(L1, "plan", plan)


@pytest.mark.parametrize(("every", "lines"), [(30.0, ["1,000"]), (0.0, ["1,000", "2,000", "3,000"])])
def test_what_counts_on_is_not_printed_every_time(
    every: float, lines: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch, counting: None
) -> None:
    """Where there is no bar; a line of another step is another line."""
    monkeypatch.setattr(console, "EVERY", every)
    found = cli("compile", *TINY, "--passes", "l1{ratio=0.5}, l1{ratio=0.5}", "-o", "o")
    assert re.findall(r"\[1/2\] l1: calibrate: (\S+) of 3,000 samples", found.err) == lines


def test_warnings_are_ours_only(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged cache entry is worth a line; what libraries have to say is not."""

    def plan(*_: object) -> Plan:
        warnings.warn("of a library", UserWarning, stacklevel=1)
        warnings.warn("cache: [x]: found something", GraphcompWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(L1, "plan", plan)
    found = cli("compile", *TINY, "--passes", "l1{ratio=0.5}", "-o", "o")
    assert "warning: cache: [x]: found something\n" in found.err
    assert "library" not in found.err


@pytest.mark.slow
def test_as_a_module(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "graphcomp", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.strip()) == (0, graphcomp.__version__)


def test_interrupt_elsewhere(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def diagnose() -> list[Finding]:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphcomp.runtime.diagnose", diagnose)
    found = cli("doctor")
    assert found.code == 130 and "Traceback" not in found.err


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_errors_of_the_machine(error: Exception, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*_: object) -> Plan:
        raise error

    monkeypatch.setattr(FoldBN, "plan", plan)
    message = failing(cli, "compile", *TINY, "--passes", "fold-bn", "-o", "o")
    assert message in ("error: MemoryError", "error: [Errno 5] Input/output error")


@pytest.mark.slow
def test_traceback_with_debug(tmp_path: Path) -> None:
    """In a process of its own, as a user runs it; without `--debug`, see `failing`."""
    command = [sys.executable, "-c", "from graphcomp.cli.main import main; main()"]
    arguments = ["compile", *TINY, "--passes", "fold-bm", "-o", "o", "--debug"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 1 and run.stdout == ""
    assert "Traceback (most recent call last)" in run.stderr
    assert "RecipeError: passes: found no pass 'fold-bm'" in run.stderr
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------------- studies

STUDY = f"""
recipe:
  model: {SPEC}
  data: npz:d.npz
  target: cpu-avx2
  passes: [{{l1: {{ratio: $ratio, include: $where}}}}]
grid: {{ratio: [0.5], where: [inner, absent]}}
"""


@pytest.mark.slow
def test_study(cli: Cli) -> None:
    """In processes, with all that a run leaves; one of the two cells cannot work, and the code says so."""
    rng = np.random.default_rng(0)
    np.savez("d.npz", x=rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), y=rng.integers(0, 4, 60))
    Path("s.yaml").write_text(STUDY)
    command = ["study", "s.yaml", "--input-shape", "1,3,8,8", "--workers", "2", "-o", "o"]
    found = cli(*command)
    assert found.code == 1
    assert "failed: ratio=0.5_where=absent-" in found.err
    assert re.search(r"o: 1 of 2 cells failed; tracebacks are in \S+, --resume runs them again", found.err)
    assert "results in o: results.csv, study.html, cells/" in found.out
    with Path("o/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert (Path("o/cells") / rows[0]["cell"] / "model.onnx").exists()
    assert "1 of 2 cells, 1 failed" in Path("o/study.html").read_text()
    assert "o: found files" in failing(cli, *command)
    done = Path("o/cells") / f"{rows[0]['cell']}.json"
    before = done.stat().st_mtime_ns
    assert cli(*command[:-4], "--resume", "-o", "o").code == 1  # in this process
    assert done.stat().st_mtime_ns == before


def test_study_lists_its_cells(cli: Cli) -> None:
    Path("s.yaml").write_text(STUDY)
    found = cli("study", "s.yaml", "--list")
    assert found.code == 0 and not Path("out").exists()
    assert [line[:-8] for line in found.out.split()] == ["ratio=0.5_where=inner-", "ratio=0.5_where=absent-"]


def test_study_lists_some_of_its_cells_with_other_settings(cli: Cli) -> None:
    """Values as YAML writes them; the names of cells say what they are, and tell settings apart."""
    text = STUDY.replace("grid:", "settings: {b: 8}\ngrid:").replace("passes:", "seed: $b\n  passes:")
    Path("s.yaml").write_text(text)
    some = ["study", "s.yaml", "--list", "--only", "where=inner"]
    (one,), (other,) = (cli(*some, *more).out.split() for more in ([], ["--set", "b=9"]))
    assert one[:-8] == other[:-8] == "ratio=0.5_where=inner-" and one != other
    assert cli(*some, "--only", "where=absent").out.split()[0] == one
    for text, message in (
        ("b", "--set: found 'b', expected NAME=VALUE, e.g. samples=5000"),
        ("b={", "--set: b: found '{', expected a value as YAML writes it"),
    ):
        assert message in failing(cli, *some, "--set", text)
    assert "--set: found 'b=2' beside another b" in failing(cli, *some, "--set", "b=1", "--set", "b=2")


def test_study_interrupted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphcomp.study.run.build", stop)
    Path("s.yaml").write_text(STUDY)
    found = cli("study", "s.yaml", "--workers", "1", "-o", "o")
    assert found.code == 130
    assert "interrupted: o: finished cells are kept; --resume goes on with the others" in found.err


def labelled_file(values: bool = False) -> str:
    rng = np.random.RandomState(0)
    y = rng.standard_normal((12, 4)) if values else np.arange(12) % 4
    np.savez("data.npz", x=rng.standard_normal((12, 3, 8, 8)).astype(np.float32), y=y)
    return "npz:data.npz"


def test_evaluate(cli: Cli) -> None:
    data = labelled_file()
    found = cli(
        "evaluate", SPEC, "--input-shape", "1,3,8,8", "--data", data, "--robustness", "--json", "e.json"
    )
    assert found.code == 0 and "Accuracy (top-1)" in found.out and "occlusion, 25 % of the area" in found.out
    record = Evaluation.model_validate_json(Path("e.json").read_text())
    assert len(record.robustness) == 6 and record.snapshot.score is not None
    again = cli("evaluate", SPEC, "--input-shape", "1,3,8,8", "--data", data, "--robustness")
    assert again.out == found.out
    plain = cli("evaluate", SPEC, "--input-shape", "1,3,8,8", "--data", data)
    assert plain.code == 0 and "occlusion" not in plain.out


def test_evaluate_counts_the_first_five(cli: Cli) -> None:
    found = cli("evaluate", "models:resnet20-digits", "--data", "digits?limit=20", "--json", "e.json")
    score = Evaluation.model_validate_json(Path("e.json").read_text()).snapshot.score
    assert score is not None and score.top5 is not None and score.value <= score.top5 <= 1
    assert re.search(rf"Accuracy \(top-5\) +{100 * score.top5:.2f} %", found.out)


def test_evaluate_values(cli: Cli) -> None:
    found = cli("evaluate", SPEC, "--input-shape", "1,3,8,8", "--data", labelled_file(values=True))
    assert found.code == 0 and "Mean absolute error" in found.out and "Accuracy" not in found.out


def test_evaluate_refusals(cli: Cli) -> None:
    tiny = ["evaluate", SPEC, "--input-shape", "1,3,8,8"]
    assert "--data: found none, expected labelled data" in failing(cli, *tiny)
    assert "robustness: found data without labels" in failing(cli, *tiny, "--data", "random", "--robustness")


@pytest.mark.slow
def test_compile_with_robustness(cli: Cli) -> None:
    """In the terminal, in report.json and in report.html; without labels it fails before any work."""
    model = [SPEC, "--input-shape", "1,3,8,8", "--target", "cpu-avx2", "--passes", "l1{ratio=0.5}"]
    found = cli("compile", *model, "--data", labelled_file(), "--robustness", "--no-bench", "-o", "o")
    assert found.code == 0 and "on damaged images" in found.out
    report = json.loads(Path("o/report.json").read_text())
    assert len(report["robustness"]["baseline"]) == len(report["robustness"]["final"]) == 6
    assert report["recipe"]["robustness"]["occlusion"] == [0.1, 0.25]
    assert 'id="robustness"' in Path("o/report.html").read_text()
    message = failing(cli, "compile", *model, "--data", "random", "--robustness", "-o", "p")
    assert "robustness: found data without labels" in message and not Path("p").exists()


@pytest.mark.slow
def test_random_weights_are_said_wherever_accuracy_is(cli: Cli) -> None:
    """They score a tenth of ten classes, which looks like a result."""
    rng = np.random.RandomState(0)
    x = rng.standard_normal((20, 3, 32, 32)).astype(np.float32)
    np.savez("d.npz", x=x, y=np.arange(20) % 10)
    said = "The weights are random: no file was given (--weights), so accuracy says nothing."
    found = cli("evaluate", "models:resnet20", "--data", "npz:d.npz", "--json", "e.json")
    assert found.code == 0 and said in " ".join(found.out.split())
    assert Evaluation.model_validate_json(Path("e.json").read_text()).remarks == [
        said[0].lower() + said[1:-1]
    ]
    plain = cli("evaluate", "models:resnet20-digits")
    assert plain.code == 0 and "random" not in plain.out
    options = ["--passes", "l1{ratio=0.5}", "--data", "npz:d.npz", "--no-bench", "--target", "cpu-avx2"]
    found = cli("compile", "models:resnet20", *options, "-o", "o")
    assert found.code == 0 and said in " ".join(found.out.split())
    assert said in Path("o/report.html").read_text()


def test_where_weights_were_found_is_said(cli: Cli) -> None:
    torch.save({"net": tiny().state_dict(), "epoch": 3}, "w.pth")
    found = cli("evaluate", *TINY[:3], "--data", labelled_file(), "--weights", "w.pth")
    assert found.code == 0 and "Weights read from what the file calls net.*" in " ".join(found.out.split())


CHOOSY = """
from torch import nn
class Choosy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    def forward(self, x, flag=False, *, way=None):
        x = self.body(x).relu().mean((2, 3)) if way == "mean" else self.body(x).relu().amax((2, 3))
        return self.head(x).sigmoid() if flag else self.head(x)
"""


@pytest.mark.slow
def test_arguments_of_forward_are_given_by_name(cli: Cli) -> None:
    Path("m.py").write_text(CHOOSY)
    shape = ("--input-shape", "1,3,8,8")
    chosen = ("--input", "flag=true", "--input", "way=mean")
    found = cli("inspect", "m.py:Choosy", *shape, *chosen, "--nodes")
    assert "sigmoid" in found.out and "mean" in found.out and "amax" not in found.out
    assert "Traced with flag=True, way='mean', which it is for." in found.err
    assert "amax" in cli("inspect", "m.py:Choosy", *shape, "--input", "way=null", "--nodes").out
    run = ("--passes", "l1{ratio=0.5, multiple=1}", "--data", "random?limit=8", "--no-bench", "-o")
    cli("compile", "m.py:Choosy", *shape, *chosen, *run, "a")
    told = {"flag": True, "way": "mean"}
    report = json.loads(Path("a/report.json").read_text())
    assert report["recipe"]["arguments"] == told and load(Path("a/program")).interface.arguments == told
    Path("r.yaml").write_text(f"model: m.py:Choosy\npasses: [fold-bn]\narguments: {told}\n")
    cli("compile", "--recipe", "r.yaml", *shape, "--input", "way=none", *run[2:], "b", "--allow-nothing")
    report = json.loads(Path("b/report.json").read_text())
    assert report["recipe"]["arguments"] == {"way": None}  # the command line's, as of any other field
    spec = cli("evaluate", "m.py:Choosy", *shape, *chosen, "--data", labelled_file())
    assert spec.code == 0 and "which it is for" in " ".join((spec.out + spec.err).split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flag", "--input: found 'flag', expected NAME=VALUE, e.g. flag=true"),
        ("=1", "--input: found '=1', expected NAME=VALUE"),
        (
            "flag=",
            "--input: flag: found '', expected true, false, none, a number, a list or a text, in quotes",
        ),
        ("flag=[1,(2", "--input: flag: found '[1,(2', expected true"),
        (f"flag={'[' * 9000}", "--input: flag: found '[[["),
        (f"flag={'9' * 5000}", "--input: flag: found '999"),
        ("flag=x\x1b[31m", "--input: flag: found 'x\\x1b[31m', expected true"),
        ("flag=1e999", "arguments.flag: found inf, expected None, true or false, a finite number"),
        ("flag={1: 2}", "arguments.flag: found {1: 2}, expected None"),
        ("flags=1", "arguments: found 'flags', expected arguments of Choosy.forward, which are x, flag, way"),
    ],
)
def test_what_no_argument_of_forward_is(text: str, said: str, cli: Cli) -> None:
    Path("m.py").write_text(CHOOSY)
    message = failing(cli, "inspect", "m.py:Choosy", "--input-shape", "1,3,8,8", "--input", text)
    assert message.startswith(f"error: {said}")


def test_arguments_are_given_once_and_to_code(cli: Cli) -> None:
    Path("m.py").write_text(CHOOSY)
    twice = failing(cli, "inspect", "m.py:Choosy", "--input", "flag=1", "--input", "flag=2")
    assert twice.startswith("error: --input: found 'flag=2' beside another flag, expected each name once")
    graphcomp.save(graphcomp.trace(tiny(), torch.zeros(1, 3, 8, 8)), "saved")
    message = failing(cli, "inspect", "saved", "--input", "flag=1")
    assert message.startswith("error: saved: found values for flag, expected a network with its own code")
    Path("r.yaml").write_text("model: m.py:Choosy\npasses: [fold-bn]\narguments:\n  flag: {a: 1}\n")
    message = failing(cli, "compile", "--recipe", "r.yaml")
    assert message.startswith("error: r.yaml:4: arguments.flag: found {'a': 1}, expected None, true or false")


RECIPE = f"model: {SPEC}\npasses: [fold-bn]\ndata: random\n"
ONE_CELL = "recipe: {model: models:resnet20, passes: [{l1: {ratio: $r}}], data: random}\ngrid: {r: [0.5]}\n"

EFFECTS: dict[str, dict[str, tuple[list[str], str] | None]] = {
    "compile": {
        **dict.fromkeys("--weights --recipe --data --classes --target --seed --input-shape --out".split()),
        "--class-names": None,
        **dict.fromkeys(
            "--allow-nothing --bench --dynamic --memory --robustness --dct --start --until --input".split()
        ),
        "--passes": (
            ["--passes", "fold-bn", "--recipe", "r.yaml"],
            "--passes: found --recipe r.yaml as well",
        ),
        "--head": ([SPEC, "--passes", "fold-bn", "--head", "random"], "--head: found it without --classes"),
        "--resume": ([SPEC, "--passes", "fold-bn", "--resume", "--overwrite"], "--resume: found --overwrite"),
        "--overwrite": (
            [SPEC, "--recipe", "r.yaml", "--overwrite", "--resume"],
            "--resume: found --overwrite",
        ),
    },
    "study": {
        **dict.fromkeys("--weights --data --input-shape --list".split()),
        "--only": (["s.yaml", "--only", "r=0.7"], "s.yaml: found no cell with r 0.7, expected one of 0.5"),
        "--set": (
            ["s.yaml", "--set", "r=0.7"],
            "s.yaml: settings: found r, expected one of those of the stu",
        ),
        "--quick": (["s.yaml", "--quick"], "s.yaml: found no `quick`, expected one for --quick"),
        "--check": (["s.yaml", "--list", "--check"], "--check: found it with --list"),
        "--resume": (["s.yaml", "--list", "--resume"], "--resume: found it with --list"),
        "--workers": (["s.yaml", "--list", "--workers", "2"], "--workers: found it with --list"),
        "--out": (["s.yaml", "--list", "-o", "o"], "--out: found it with --list"),
    },
    "inspect": dict.fromkeys(
        "--weights --input-shape --start --until --input --join --json --svg --graphml --dot --nodes".split()
    ),
    "evaluate": {
        **dict.fromkeys("--data --weights --input-shape --input --robustness --json".split()),
        "--seed": (["models:resnet20-digits", "--seed", "1"], "--seed: found it with digits, all of which"),
    },
    "bench": {
        **dict.fromkeys(
            "--provider --input-shape --batch --threads --runs --seconds --cuda-graphs --json".split()
        ),
        "--precision": (
            ["a.onnx", "b.onnx", "--precision", "fp16"],
            "precision: found 'fp16' with provider 'cpu'",
        ),
    },
    "explain": dict.fromkeys(
        "--provider --input-shape --batch --threads --runs --seconds --json --svg".split()
    ),
    "calibrate-target": dict.fromkeys("--target --threads --networks --json".split()),
    "passes": {"--json": None},
    "doctor": {},
}
"""Every option of every command: None if it always has an effect, else arguments where it has none."""


def test_every_option_has_an_effect_or_says_when_not() -> None:
    """A new option has to be thought about: where does it change nothing, and what contradicts it?"""
    import typer

    commands = typer.main.get_command(command_line.app).commands  # type: ignore[attr-defined]
    found = {
        name: {max(p.opts, key=len) for p in command.params if p.opts[0].startswith("-")}
        for name, command in commands.items()
    }
    assert found == {name: set(options) for name, options in EFFECTS.items()}


@pytest.mark.parametrize(
    ("command", "option"), [(c, o) for c, options in EFFECTS.items() for o, case in options.items() if case]
)
def test_contradictory_options_are_refused(command: str, option: str, cli: Cli) -> None:
    Path("r.yaml").write_text(RECIPE)
    Path("s.yaml").write_text(ONE_CELL)
    case = EFFECTS[command][option]
    assert case is not None
    message = failing(cli, command, *case[0])
    assert case[1] in message and re.search("leave|expected one", message)
    assert sorted(map(str, Path().iterdir())) == ["r.yaml", "s.yaml"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("head: random", "head: found random without classes"),
        (
            "export: {dynamic: [height]}\nbench: {batches: [1, 8]}",
            "export.dynamic: found no batch with",
        ),
    ],
)
def test_contradictions_in_recipes(lines: str, expected: str, cli: Cli) -> None:
    Path("r.yaml").write_text(f"{RECIPE}{lines}\n")
    assert expected in failing(cli, "compile", "--recipe", "r.yaml", "--input-shape", "1,3,8,8", "-o", "o")
    assert not Path("o").exists()


@pytest.mark.parametrize(("argument", "expected"), [("--bench", True), ("--no-bench", False), (None, False)])
def test_bench_on_the_command_line_counts(
    argument: str | None, expected: bool, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the recipe says the opposite."""
    jobs: list[Job] = []

    def stop(job: Job, *_: object, **__: object) -> None:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr("graphcomp.compiler.build", stop)
    Path("r.yaml").write_text(f"{RECIPE}bench: false\n")
    cli("compile", "--recipe", "r.yaml", *([argument] if argument else []))
    assert (jobs[0].recipe.bench is not False) == expected


@pytest.mark.parametrize(("given", "gib"), [(["--memory", "0.5"], 0.5), ([], 2.0)])
def test_memory_on_the_command_line_counts(
    given: list[str], gib: float, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the recipe's where there is none; passes are given bytes."""
    budgets: list[int] = []

    def stop(self: Pipeline, program: Program, context: Context, *_: object) -> None:
        budgets.append(context.memory)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "run", stop)
    Path("r.yaml").write_text(f"{RECIPE}memory: 2\n")
    cli("compile", "--recipe", "r.yaml", "--input-shape", "1,3,8,8", "-o", "o", *given)
    assert budgets == [int(gib * 2**30)]


@pytest.mark.parametrize("gib", ["0", "-1", "nan", "inf"])
def test_memory_is_more_than_nothing(gib: str, cli: Cli) -> None:
    Path("r.yaml").write_text(RECIPE)
    expected = f"--memory: found {float(gib):g}, expected GiB above 0"
    assert expected in failing(cli, "compile", "--recipe", "r.yaml", f"--memory={gib}")


@pytest.mark.parametrize(
    ("seconds", "fraction", "expected"),
    [
        (30, 0.5, " (about 30 s left)"),
        (60, 0.1, " (about 9 min left)"),
        (29, 0.5, ""),
        (600, 0.01, ""),
        (600, 1.0, ""),
    ],
)
def test_time_that_is_left(seconds: float, fraction: float, expected: str) -> None:
    assert console.time_left(seconds, fraction) == expected


# ----- ONNX files


class Eyes(torch.nn.Module):
    """Two inputs of any height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(1, 16, 3, padding=1)
        self.c, self.fc = torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Linear(16, 5)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        x = self.c((self.a(left).relu() + self.b(right).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def eyes(cli: Cli) -> Path:
    """A file of two inputs, as somebody else has it: names, class names, and no tags of ours."""
    program = graphcomp.trace(Eyes(), (torch.randn(1, 3, 32, 32), torch.randn(1, 1, 32, 32)))
    export_onnx(program, "eyes.onnx", dynamic=("batch", "height", "width"))
    model = onnx.load("eyes.onnx")
    for node in model.graph.node:
        node.ClearField("metadata_props")
    model.metadata_props.add(key="classes", value="a,b,c,d,e")
    model.producer_name, model.producer_version = "elsewhere", "3.1"
    onnx.save(model, "eyes.onnx")
    return Path("eyes.onnx")


SIZES = ["--input-shape", "left=1,3,32,32", "--input-shape", "right=1,1,32,32"]


@pytest.mark.slow
def test_a_file_of_two_inputs_is_compressed_inspected_timed_and_explained(cli: Cli, eyes: Path) -> None:
    done = cli("compile", eyes, *SIZES, "--passes", "l1{ratio=0.5}", "--data", "random", "--no-bench",
               "--target", "cpu-avx2", "-o", "out")  # fmt: skip
    assert done.code == 0, done.err
    report = read_report(Path("out/report.json"))
    assert "read from eyes.onnx, which elsewhere 3.1 wrote with opset 18" in report.remarks[0]
    assert report.input_shapes == {"left": (1, 3, 32, 32), "right": (1, 1, 32, 32)}
    assert report.final.params_trainable < 0.6 * report.baseline.params_trainable
    made = onnx.load("out/model.onnx")
    assert {p.key: p.value for p in made.metadata_props}["classes"] == "a,b,c,d,e"
    assert [v.name for v in made.graph.input] == ["left", "right"]
    assert {d.dim_param for d in made.graph.input[0].type.tensor_type.shape.dim} == {
        "batch", "", "height", "width"
    }  # fmt: skip
    assert "removable" in cli("inspect", eyes, *SIZES).out
    timing = ("--seconds", "0.01", "--runs", "1", *SIZES)
    assert cli("bench", eyes, "out/model.onnx", *timing).code == 0
    assert cli("explain", eyes, "out/model.onnx", *timing).code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compile", "eyes.onnx"], r"input 'left': found open sizes"),
        (["inspect", "eyes.onnx", "--input-shape", "1,3,32,32"], r"--input-shape: found ''"),
        (["inspect", "eyes.onnx", *SIZES, "--input-shape", "left=1,3,8,8"], r"found 'left=1,3,8,8' beside"),
        (["inspect", "eyes.onnx", *SIZES, "--weights", "w.pt"], r"found an ONNX file with --weights"),
        (["compile", "eyes.onnx", *SIZES, "--data", "digits"], r"digits"),
        (["bench", "eyes.onnx", "eyes.onnx"], r"give --input-shape left=1"),
        (["bench", "eyes.onnx", "eyes.onnx", "--input-shape", "x=1,3,8,8"], r"found a shape for 'x'"),
        (["inspect", "none.onnx"], r"none\.onnx"),
        (["compile", "eyes.onnx", "--dynamic", "depth"], r"--dynamic: found 'depth'"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_what_is_wrong_with_an_onnx_file_is_said(
    words: list[str], expected: str, cli: Cli, eyes: Path
) -> None:
    if words[0] == "compile":
        words = [*words, "--passes", "l1{ratio=0.5}", "--no-bench"]
    assert re.search(expected, failing(cli, *words))
