"""Whatever is typed or lies in a file: a result, or an error on purpose, soon, and nothing left behind.

Every subcommand and every option is drawn from the application itself; one without values to try fails the
test. `GRAPHCOMP_FUZZ=N` tries each N times, other ways each time.
"""

import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save_file

from graphcomp import budget, explanation, pipeline, runtime, study
from graphcomp.cli import main as command_line
from graphcomp.errors import GraphcompError
from graphcomp.ir import save
from graphcomp.passes import PASSES
from tests.runtime.test_bench import write
from tests.tiny import SPEC, tiny, tiny_program

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("GRAPHCOMP_FUZZ", "0"))
LONGEST = 10.0
"""Seconds of the processor until an answer."""

COMMANDS: dict[str, Any] = vars(typer.main.get_command(command_line.app))["commands"]

# ---- what is tried ----------------------------------------------------------------------------------------

TEXTS = st.sampled_from(
    [
        *(
            "",
            " ",
            "\n",
            "a\nb",
            "-1",
            "0",
            "nan",
            "inf",
            "1e999",
            "9" * 5000,
            "a" * 5000,
            "[" * 2000,
            "{" * 2000,
        ),
        *("\udcff", "\x1b[31m", "[red]x[/]", "\u00e9", "../..", "/", "/dev/null/x", "a:b", "'", '"', *"*~?&"),
    ]
) | st.text(st.characters(exclude_characters="\0"), max_size=12)
FILES = """empty junk junk.py junk.onnx junk.npz junk.safetensors junk.pth junk.yaml deep.json net.onnx
    small.onnx d.npz w.safetensors r.yaml s.yaml program damaged folder absent fails.py link""".split()
NAMES = st.sampled_from(FILES)
MODELS = st.sampled_from(
    [
        SPEC,
        *"""program damaged folder models: models:x torchvision:x fails.py:net fails.py:exits fails.py:wrong
        fails.py:quoted fails.py:absent junk.py:x : .py: r.yaml:x link""".split(),
    ]
)
DATA = st.builds(
    "{}{}{}".format,
    st.sampled_from(["random", "npz:", "imagefolder:", "cifar10:", "digits", "x:", ""]),
    st.sampled_from(["", *FILES]),
    st.sampled_from(
        ["", "?", "?limit=4", "?limit=0", "?limit=x", "?mean=1,2,3&std=0", "?std=nan", "?a=b&a=c", "?&="]
    ),
)
NUMBERS = st.sampled_from(
    [*["1"] * 20, "0", "2", "-1", "0.5", "x", "nan", "1e400", str(10**30), "2147483648"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
OPTIONS = sorted({name for kind in PASSES.values() for name in kind.__dataclass_fields__})
OPTION_VALUES = st.sampled_from(
    ["0", "0.5", "-1", "nan", "[]", "{macs: 0.5}", "{macs=0.5}", "{{", "x", "[x]", ""]
)
ONE_PASS = st.builds(
    "{}{{{}={}}}".format, st.sampled_from([*PASSES, "x", ""]), st.sampled_from([*OPTIONS, "x"]), OPTION_VALUES
) | st.sampled_from([*PASSES])
PASS_TEXTS = st.lists(ONE_PASS, min_size=1, max_size=3).map(", ".join)

BY_NAME: dict[str, SearchStrategy[str]] = {
    "model": MODELS, "weights": NAMES, "recipe": NAMES, "study": NAMES, "base": NAMES, "new": NAMES,
    "passes": PASS_TEXTS, "data": DATA,
    "classes": st.sampled_from(["0,1", "1,0", "cat,dog", "0,cat", "0,0", "0,9", "0", ",", "-1,2"])
    | st.just("0," + "9" * 5000),
    "head": st.sampled_from(["slice", "random", "x"]),
    "target": st.sampled_from(["auto", "cpu-avx2", "cuda-fp16", "x"]),
    "input_shape": st.sampled_from(
        "1,3,8,8 1x3x8x8 3,8 1,3,0,8 1,3,100000,100000 1,3,1,1 1,4,8,8".split()
    )
    | st.lists(NUMBERS, max_size=9).map(",".join),
    "join": st.sampled_from(["couple", "pad", "x"]),
    "dct": st.sampled_from(["coefficients", "dense", "both", "x"]),
    "provider": st.sampled_from(["cpu", "cpu,cpu", "x", ","]),
    "precision": st.sampled_from(["fp32", "fp16", "bf16", "x", ""]),
    "batch": st.lists(NUMBERS, max_size=3).map(",".join),
    **dict.fromkeys(["start", "until"], st.sampled_from(["0", "layer1", "fc", "", "x", "."])),
    "inputs": st.sampled_from("x=1 mask=none mask=[1,(2 mask=[[1]] mask= =1 mask=1e999 mask=x a-b=1".split()),
    "only": st.sampled_from(["ratio=0.5", "x=1", "a", "=", "a-b=1", "ratio="]),
    "settings": st.sampled_from(["x=1", "x", "=1", "x={", "x=[[1", "x=!!python/name:os.system"]),
    "networks": st.sampled_from(["", ",", "x"]),
    "out": st.sampled_from(["out", "a/b", "folder", "program", "empty", "empty/below", "absent"]),
    "json_file": st.sampled_from(["o.json", "a/o.json", "folder", "empty/below"]),
    "svg_file": st.sampled_from(["o.svg", "a/o.svg", "folder", "empty/below"]),
    "graphml_file": st.sampled_from(["o.graphml", "a/o.graphml", "folder", "empty/below"]),
    "dot_file": st.sampled_from(["o.dot", "a/o.dot", "folder", "empty/below"]),
    "class_names": NAMES,
    "dynamic": st.sampled_from(["height", "height,width", "batch", "depth", ",", "width,width"]),
    **dict.fromkeys(["seed", "workers", "threads", "runs", "seconds", "memory"], NUMBERS),
}  # fmt: skip
WRITTEN = ("out", "json_file", "svg_file", "graphml_file", "dot_file")


def parameters() -> Iterator[tuple[str, Any]]:
    for name, command in COMMANDS.items():
        yield from ((name, p) for p in command.params if p.name != "help")


def test_every_option_has_values_to_try() -> None:
    assert len(COMMANDS) >= 9
    for command, parameter in parameters():
        assert getattr(parameter, "is_flag", False) or parameter.name in BY_NAME, (command, parameter.name)
    names = {parameter.name for _, parameter in parameters()}
    assert set(BY_NAME) <= names  # no values for options that are gone


@st.composite
def commands(draw: st.DrawFn, name: str) -> list[str]:
    """The likely mistakes: most arguments make sense, so that the others are reached."""
    found = [name]
    for parameter in COMMANDS[name].params:
        if parameter.name == "help" or (not parameter.required and draw(st.integers(0, 2)) == 0):
            continue
        if parameter.param_type_name == "option":
            if parameter.is_flag:
                found.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
                continue
            found.append(parameter.opts[0])
        odd = parameter.name not in WRITTEN and draw(st.integers(0, 7)) == 0
        found.append(draw(TEXTS if odd else BY_NAME[parameter.name]))
    return [argument.replace("\0", "") for argument in found]


PASS = ONE_PASS | st.dictionaries(st.sampled_from([*PASSES, "x"]), VALUES, max_size=1)
RECIPES = st.fixed_dictionaries(
    {"passes": st.lists(PASS, max_size=2)},
    optional={
        "model": MODELS, "data": DATA, "weights": NAMES, "seed": VALUES, "classes": VALUES, "bench": VALUES,
        "export": VALUES, "robustness": VALUES, "target": VALUES, "head": VALUES, "x": VALUES,
        "start": VALUES, "until": VALUES, "arguments": VALUES,
    },
)  # fmt: skip
STUDIES = st.fixed_dictionaries(
    {
        "recipe": RECIPES | VALUES,
        "grid": st.dictionaries(st.sampled_from(["a", "b", "$"]), VALUES, max_size=2),
    },
    optional={
        **dict.fromkeys(["input_shape", "workers", "class_names", "engine"], VALUES),
        **dict.fromkeys(["settings", "repeats", "paper", "quick"], VALUES),
    },
)


def as_yaml(kind: SearchStrategy[Any]) -> SearchStrategy[str]:
    """Sensible files, and ones that are cut, or in which a character is another one."""

    @st.composite
    def damaged(draw: st.DrawFn) -> str:
        text = yaml.safe_dump(draw(kind))
        at = draw(st.integers(0, len(text)))
        other = draw(st.sampled_from(["", "&a ", "*a ", "{", "!!", "\t", "\x07", ": ", "- ", "%"]))
        return text[:at] + other + text[at + draw(st.integers(0, 3)) :]

    return kind.map(yaml.safe_dump) | damaged()


# ---- trying it --------------------------------------------------------------------------------------------


class AcceptedError(GraphcompError):
    """In place of work that takes long: everything before it was accepted."""


def accept(*_: Any, **__: Any) -> Any:
    raise AcceptedError("accepted")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of every kind, sound and not."""
    place = tmp_path_factory.mktemp("fuzz")
    junk = random.Random(0).randbytes(500)
    for name in FILES:
        if name.startswith("junk"):
            (place / name).write_bytes(junk)
    (place / "empty").write_bytes(b"")
    (place / "deep.json").write_text("[" * 100_000)
    (place / "folder" / "sub").mkdir(parents=True)
    (place / "folder" / "file").write_text("x")
    (place / "link").symlink_to("nowhere")
    (place / "fails.py").write_text(
        "import torch\n"
        "def net(): raise ValueError('two\\nlines')\n"
        "def exits(): raise SystemExit(3)\n"
        "def wrong(): return 1\n"
        "def quoted():\n"
        "    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))\n"
        "    net.add_module('a\"b\\n', torch.nn.ReLU())\n"
        "    return net\n"
    )
    np.savez(place / "d.npz", x=np.zeros((8, 8, 8, 3), np.uint8), y=np.arange(8) % 4)
    save_file(tiny().state_dict(), place / "w.safetensors")
    write(place / "net.onnx")
    write(place / "small.onnx", 4)
    save(tiny_program(), place / "program")
    shutil.copytree(place / "program", place / "damaged")
    (place / "damaged" / "weights.safetensors").write_bytes(junk)
    return place


@pytest.fixture
def ready(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """In that place, without what takes long; errors as the command line ends with them."""
    errors: list[BaseException] = []

    def fail(error: BaseException, debug: bool) -> None:
        errors.append(error)
        sys.exit(1)

    monkeypatch.chdir(place)
    monkeypatch.setattr(command_line, "_fail", fail)
    for room, name in (
        (pipeline.Pipeline, "run"), (runtime, "benchmark"), (explanation, "explain"), (budget, "calibrate"),
        (study, "run_study"), (runtime, "diagnose"),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, accept)
    with warnings.catch_warnings():
        yield errors


def everything(place: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))
    }


def written(arguments: list[str]) -> set[str]:
    """The first parts of paths that the command was told to write to."""
    options = {o: p.name for p in COMMANDS[arguments[0]].params for o in p.opts}
    told = {v for o, v in pairwise(arguments) if options.get(o) in WRITTEN}
    return {Path(value).parts[0] for value in told} | {"out"}


def attempt(place: Path, arguments: list[str], recipe: str, study: str, errors: list[BaseException]) -> None:
    (place / "r.yaml").write_text(recipe, encoding="utf-8")
    (place / "s.yaml").write_text(study, encoding="utf-8")
    before = everything(place)
    errors.clear()
    begun = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["graphcomp", *arguments])
        with pytest.raises(SystemExit) as stop:
            command_line.main()
    assert time.process_time() - begun < LONGEST
    assert stop.value.code in (0, 1, 2, None)
    assert all(isinstance(error, GraphcompError) for error in errors), errors
    after = everything(place)
    told = written(arguments)
    changed = {name for name in {*before, *after} if before.get(name, 0) != after.get(name, 0)}
    assert not {name for name in changed if Path(name).parts[0] not in told}, changed
    assert not {name for name in changed if Path(name).name.startswith(".")}, changed
    for name in sorted(changed, reverse=True):
        assert name not in before, f"{name} was there and is not the command's"
        path = place / name
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=EXAMPLES or 15,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,) if EXAMPLES else (Phase.generate, Phase.shrink),
)
@given(st.data(), as_yaml(RECIPES), as_yaml(STUDIES))
def test_any_command_ends_on_purpose(
    place: Path, ready: list[BaseException], command: str, data: st.DataObject, recipe: str, study: str
) -> None:
    attempt(place, data.draw(commands(command)), recipe, study, ready)
