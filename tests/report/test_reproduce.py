"""The command that a report prints computes what the report says, whatever the run was told."""

import re
import shlex
import sys
import warnings
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import graphcomp
from graphcomp.cli import main as command_line
from graphcomp.compiler import results
from graphcomp.ir import save
from graphcomp.records import Export, Report
from graphcomp.report.report import read_report
from tests.tiny import SPEC, tiny

SHAPE = ["--input-shape", "1,3,8,8"]
TINY = [SPEC, *SHAPE, "--target", "cpu-avx2"]
ODD = "it's [a] $HOME & more"
"""A name that a shell would take apart."""


def arrays() -> str:
    """Labelled images and their spec."""
    rng = np.random.default_rng(0)
    np.savez(f"{ODD}.npz", x=rng.integers(0, 256, (48, 8, 8, 3), dtype=np.uint8), y=np.arange(48) % 4)
    return f"npz:{ODD}.npz"


def folders() -> str:
    """The same as files."""
    rng = np.random.default_rng(1)
    for i in range(24):
        place = Path("my photos") / f"class {i % 4}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return "imagefolder:my photos"


def weights(name: str) -> str:
    """Other weights than the factory's."""
    state = tiny().state_dict()
    save_file({key: x * 1.25 if x.is_floating_point() else x for key, x in state.items()}, name)
    return name


def written(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


RUNS: dict[str, Callable[[], list[str]]] = {
    "a bundled model with its own weights and data": lambda: [
        "models:resnet20-digits", "--passes", "fold-bn", "--seed", "2",
    ],
    "a factory with a shape, weights and two passes": lambda: [
        *TINY, "--weights", weights(f"{ODD}.safetensors"), "--passes", "l1{ratio=0.5}, fold-bn",
    ],
    "a factory in a file with an odd name": lambda: [
        f"{written(f'{ODD}.py', Path(SPEC.rpartition(':')[0]).read_text())}:tiny", *SHAPE,
        "--passes", 'random{ratio=0.5, exclude="*out*"}', "--seed", "7", "--target", "cpu-avx2",
    ],
    "a recipe": lambda: [
        "--recipe",
        written(
            "r.yaml",
            f"model: {SPEC}\nweights: {weights('w.safetensors')}\ndata: {arrays()!r}\n"
            "seed: 4\ntarget: cpu-avx2\n"
            "passes: [{pfa: {energy: 0.8, multiple: 1}}, {finetune: {epochs: 1, batch: 8}}]\n"
            "robustness: {occlusion: [0.2], motion_blur: [], brightness: []}\n",
        ),
        *SHAPE,
    ],
    "a recipe and what overrides it": lambda: [
        *TINY, "--recipe",
        written("r.yaml", "model: other\nweights: absent\nseed: 4\npasses: [{l1: {target: {macs: 0.6}}}]\n"),
        "--data", f"{arrays()}?limit=20", "--seed", "5", "--robustness",
    ],
    "some classes": lambda: [
        *TINY, "--data", arrays(), "--classes", "3,1", "--passes", "l1{ratio=0.5}",
    ],
    "some classes with a head of its own": lambda: [
        *TINY, "--data", arrays(), "--classes", "0,2,3", "--head", "random", "--seed", "3",
        "--passes", "random{ratio=0.5}",
    ],
    "folders of images with options": lambda: [
        *TINY, "--data", f"{folders()}?limit=16&mean=0.5,0.4,0.3&std=0.2,0.2,0.3",
        "--passes", "apoz{ratio=0.5}, finetune{epochs=0, bn_reestimate=8}",
    ],
    "a saved program": lambda: [
        saved(), "--data", arrays(), "--passes", "fold-bn, l1{ratio=0.25, join=pad, multiple=1}",
    ],
}  # fmt: skip


def saved() -> str:
    program = graphcomp.trace(tiny(), torch.zeros(1, 3, 8, 8))
    save(program, Path("my program"))
    return "my program"


def graphcomp_says(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "argv", ["graphcomp", *arguments])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    assert not stop.value.code


def result(out: Path) -> tuple[dict[str, Any], str]:
    """All that a run decided and measured, but for times, and the weights."""
    report = read_report(out / "report.json")
    return without_times(report), graphcomp.load(out / "program").fingerprint()


def without_times(report: Report) -> dict[str, Any]:
    kept = report.model_dump(mode="json", exclude={"started", "seconds", "environment"})
    for step in kept["steps"]:
        del step["seconds"], step["training"]
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_printed_command_computes_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(_: object, path: Path, *__: object) -> Export:  # takes seconds, and decides nothing
        return Export(path=path.name, bytes=1, opset=18, nodes=1, parity={}, cleanup=[])

    monkeypatch.setattr(results, "_export", export)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        graphcomp_says(["compile", *RUNS[name](), "--no-bench", "-o", "first"], monkeypatch)
        html = Path("first/report.html").read_text()
        printed = {
            part: unescape(text)
            for part, text in re.findall(r'<pre id="reproduce-(\w+)"[^>]*>(.*?)</pre>', html, re.S)
        }
        Path("recipe.yaml").write_text(printed["recipe"])
        program, *arguments = shlex.split(printed["command"])
        assert program == "graphcomp" and arguments[-2:] == ["-o", "OUT"]
        graphcomp_says(arguments, monkeypatch)
    capsys.readouterr()
    assert result(Path("OUT")) == result(Path("first"))
