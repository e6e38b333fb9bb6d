"""What a saved program may not do, whoever wrote it; `tests/hostile.py` makes up more of it."""

import builtins
import json
import keyword
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.cli.main import main
from graphcomp.errors import LoadError
from graphcomp.ir import load, save
from graphcomp.ir.saved import bounds, storage
from graphcomp.ir.saved.grammar import functions, is_own_name, methods
from graphcomp.ir.saved.modules import layers
from graphcomp.ir.tracing import trace
from tests.hostile import Attending, Document, Small, within

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures itself in /proc"),
]

ROOT = Path(__file__).parents[2]
SHELL = "__import__('os').system('touch pwned')"


class Bare(nn.Module):
    """One tensor and one node: what it becomes is the attacker's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("original")
    save(trace(Small().eval(), torch.zeros(1, 3, 8, 8)), place / "small")
    save(trace(Attending().eval(), torch.tensor([[1, 4, 2]])), place / "attending")
    save(trace(Bare().eval(), torch.zeros(1, 3)), place / "bare")
    return {name: place / name for name in ("small", "attending", "bare")}


@pytest.fixture
def directory(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(originals["small"], tmp_path / "program"))


@pytest.fixture
def bare(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(originals["bare"], tmp_path / "bare"))


def edit(directory: Path, change: Callable[[Document], object]) -> None:
    file = directory / storage.PROGRAM_FILE
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def node(d: Document, name: str) -> Document:
    return next(n for n in d["nodes"] if n["name"] == name)


def called(d: Document, target: str) -> Document:
    return next(n for n in d["nodes"] if n["target"] == target)


def before_output(d: Document, *nodes: Document) -> None:
    """Put nodes at the end; the last one is what the program yields."""
    d["nodes"][-1:-1] = nodes
    d["nodes"][-1]["args"] = [{"node": nodes[-1]["name"]}]


def function(name: str, target: str, *args: Any, **kwargs: Any) -> Document:
    return {"name": name, "op": "call_function", "target": target, "args": list(args), "kwargs": kwargs}


def method(name: str, target: str, *args: Any, **kwargs: Any) -> Document:
    return {"name": name, "op": "call_method", "target": target, "args": list(args), "kwargs": kwargs}


# ---- the attacks that worked -----------------------------------------------------------------------------


def node_named_self(d: Document) -> None:
    """From here on, `self.conv` is an attribute of a tensor."""
    before_output(d, function("self", "torch.relu", {"node": "x"}))


KEPT = function(
    "kept", "torch.relu", {"node": "self"}
)  # a reader at the end, for what is read no more is freed


def path_through_attributes(d: Document) -> None:
    """`self.norm` is `Tensor.norm` after that, whose builtins hold `eval`."""
    node_named_self(d)
    d["modules"] |= {
        "norm": {"kind": "Module"},
        "norm.__builtins__": {"kind": "Module"},
        "norm.__builtins__.get": {"kind": "Identity"},
    }
    found = {"name": "f", "op": "call_module", "target": "norm.__builtins__.get", "args": ["eval"]}
    before_output(d, found, KEPT)


def key_that_is_called(d: Document) -> None:
    """`max` calls what it is given."""
    path_through_attributes(d)
    before_output(
        d, function("found", "builtins.max", [SHELL, "0"], key={"node": "f"}), {**KEPT, "name": "end"}
    )


def path_to_globals(d: Document) -> None:
    node_named_self(d)
    d["modules"]["norm"] = {"kind": "Module"}
    d["tensors"]["norm.__globals__"] = {**d["tensors"]["offset"], "same_as": "offset"}
    before_output(d, {"name": "g", "op": "get_attr", "target": "norm.__globals__"}, KEPT)


ATTACKS: dict[str, tuple[Callable[[Document], None], str]] = {
    "a node named self": (node_named_self, r"nodes\.self: found name 'self', expected an identifier"),
    "a module path through builtins": (path_through_attributes, r"norm\.__builtins__"),
    "a tensor path to globals": (path_to_globals, r"norm\.__globals__"),
    "max with key": (key_that_is_called, r"norm\.__builtins__|found argument 'key'"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_that_worked_are_refused(name: str, bare: Path) -> None:
    attack, message = ATTACKS[name]
    edit(bare, attack)
    with pytest.raises(LoadError, match=message):
        load(bare)
    assert not Path("pwned").exists()


def test_max_takes_no_key_whatever_it_is(directory: Path) -> None:
    edit(directory, lambda d: before_output(d, function("m", "builtins.max", [1, 2], key={"node": "x"})))
    with pytest.raises(LoadError, match=r"nodes\.m \(builtins\.max\): found argument 'key'"):
        load(directory)


def test_the_command_line_runs_no_attack_either(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(bare, key_that_is_called)
    monkeypatch.setattr(sys, "argv", ["graphcomp", "evaluate", str(bare), "--data", "random"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code
    assert "norm.__builtins__" in capsys.readouterr().err
    assert not Path("pwned").exists()


# ---- names -----------------------------------------------------------------------------------------------

RESERVED = ["self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "__x", "é", "a b", ""]
RESERVED += ["\uff53elf", *keyword.kwlist, *dir(builtins)]  # `self` in full width


def test_no_node_takes_a_name_that_means_something(directory: Path) -> None:
    assert [name for name in RESERVED if is_own_name(name)] == []
    text = (directory / storage.PROGRAM_FILE).read_text()
    for name in ("self", "torch", "inf", "lambda", "max", "__x", "\uff53elf"):
        edit(directory, lambda d, n=name: before_output(d, function(n, "torch.relu", {"node": "x"})))
        with pytest.raises(LoadError, match=r"nodes\..*: found name '.*', expected an identifier"):
            load(directory)
        (directory / storage.PROGRAM_FILE).write_text(text)


@pytest.mark.parametrize(
    "name", ["self", "torch", "device", "max", "getattr", "inf", "lambda", "__x", "math_floor"]
)
def test_no_input_takes_a_name_that_generated_code_reads(name: str, directory: Path) -> None:
    edit(directory, lambda d: before_output(d, function("m", "math.floor", 2.5)))
    load(directory)
    edit(directory, lambda d: d["nodes"][0].update(target=name))
    with pytest.raises(LoadError, match="nodes"):
        load(directory)


def test_an_input_may_be_called_input(directory: Path) -> None:
    edit(directory, lambda d: d["nodes"][0].update(target="input"))
    program = load(directory)
    assert program(*program.example_inputs)["out"].shape == (1, 4)


@pytest.mark.parametrize(
    "path",
    [
        "__class__",
        "conv.__class__",
        "conv.forward",
        "forward",
        "graph",
        "_modules",
        "conv.weight.data",
        "a..b",
    ],
)
def test_paths_lead_through_modules_and_tensors_only(path: str, directory: Path) -> None:
    changes: list[Callable[[Document], object]] = [
        lambda d: called(d, "act").update(target=path),
        lambda d: called(d, "offset").update(target=path),
        lambda d: d["modules"].update({path: {"kind": "ReLU"}}),
        lambda d: d["tensors"].update({path: {**d["tensors"]["offset"], "same_as": "offset"}}),
    ]
    text = (directory / storage.PROGRAM_FILE).read_text()
    for change in changes:
        edit(directory, change)
        with pytest.raises(LoadError):
            load(directory)
        (directory / storage.PROGRAM_FILE).write_text(text)


# ---- schemas ---------------------------------------------------------------------------------------------

CALLING = "key out generator default distance_function tracker iK names file func fn f callable".split()


def test_every_function_and_method_has_a_schema_without_callables() -> None:
    table = {**{n: s for n, (_, s) in functions().items()}, **methods()}
    assert len(table) > 900
    for name, schema in table.items():
        for argument in CALLING:
            attention = argument == "key" and "attention" in name
            assert attention or schema.flaw((1,) * schema.least, {argument: 1}), (name, argument)
        assert schema.flaw(({"a": 1},), {}), name
        assert schema.rest is not None or schema.flaw((1,) * (len(schema.places) + 1), {}), name


def test_text_goes_only_where_a_function_takes_words() -> None:
    table = {n: s for n, (_, s) in functions().items()}
    wordy = {n for n, s in table.items() if not s.flaw(("mean",) * max(1, s.least), {})}
    assert {"torch.einsum"} <= wordy
    assert not wordy & {
        "torch.relu",
        "operator.mod",
        "operator.add",
        "operator.mul",
        "builtins.max",
        "builtins.int",
    }
    hostile = "x" * 1000
    assert {n for n in table if not table[n].flaw((hostile,) * max(1, table[n].least), {})} <= {
        "operator.eq", "operator.ne", "operator.is_", "operator.is_not", "operator.contains"
    }  # fmt: skip


NO_LAYERS = """Module Container Sequential ModuleList ModuleDict ParameterList ParameterDict DataParallel
    RNN LSTM GRU RNNBase RNNCellBase Transformer TransformerEncoder TransformerEncoderLayer TransformerDecoder
    TransformerDecoderLayer AdaptiveLogSoftmaxWithLoss TripletMarginWithDistanceLoss
    LinearCrossEntropyLoss""".split()  # what they are built from is not plain, or there is no bound to it


def test_every_class_of_torch_is_a_layer_or_is_not() -> None:
    classes = {
        n for n in dir(nn) if isinstance(getattr(nn, n), type) and issubclass(getattr(nn, n), nn.Module)
    }
    lazy = {n for n in classes if n.startswith("Lazy")}
    assert classes - lazy - set(NO_LAYERS) <= layers().keys()
    assert not layers().keys() & (lazy | set(NO_LAYERS))
    assert all(not {"device", "dtype", "distance_function"} & set(s.names) for _, s in layers().values())


# ---- bounds ----------------------------------------------------------------------------------------------

X = {"node": "x"}
BILLION = 10**9


def layer(kind: str, **arguments: Any) -> Callable[[Document], object]:
    return lambda d: d["modules"]["act"].update(kind=kind, arguments=arguments)


def doubling(times: int) -> Callable[[Document], object]:
    """A list that holds the list before it twice: small to write, 2^times items to read."""
    return lambda d: before_output(
        d,
        function("a0", "operator.getitem", [1, 2], {"slice": [None, None, None]}),
        *(
            function(f"a{i}", "operator.add", {"node": f"a{i - 1}"}, {"node": f"a{i - 1}"})
            for i in range(1, times)
        ),
    )


TOO_LARGE: dict[str, Callable[[Document], object]] = {
    "Transformer": layer("Transformer", num_encoder_layers=BILLION),
    "LSTM": layer("LSTM", input_size=3, hidden_size=4, num_layers=10**8),
    "Linear": layer("Linear", in_features=BILLION, out_features=BILLION),
    "MultiheadAttention": layer("MultiheadAttention", embed_dim=10**18, num_heads=1),
    "LocalResponseNorm": layer("LocalResponseNorm", size=10**10),
    "Upsample": layer("Upsample", scale_factor=1e6),
    "ReflectionPad2d": layer("ReflectionPad2d", padding=BILLION),
    "ConstantPad2d": layer("ConstantPad2d", padding=10**8, value=0.0),
    "inputs": lambda d: d.update(inputs=BILLION),
    "no inputs": lambda d: d.update(inputs=-1),
    "shape": lambda d: d["tensors"]["offset"].update(shape=[BILLION, BILLION]),
    "zeros": lambda d: before_output(d, function("z", "torch.zeros", [BILLION, 10**4])),
    "zeros on the CPU": lambda d: before_output(
        d, function("z", "torch.zeros", [BILLION, 10**4], device={"device": "cpu"})
    ),
    "arange": lambda d: before_output(d, function("z", "torch.arange", 10**12)),
    "full of a tensor": lambda d: before_output(d, function("z", "torch.full", [10**5, 10**6], X)),
    "expand": lambda d: before_output(d, method("z", "expand", X, 10**12, -1, -1, -1)),
    "repeat": lambda d: before_output(d, method("z", "repeat", X, 10**5, 10**5, 1, 1)),
    "unbind": lambda d: before_output(
        d, method("e", "expand", X, 10**7, 3, 8, 8), method("z", "unbind", {"node": "e"}, 0)
    ),
    "split": lambda d: before_output(
        d, method("e", "expand", X, 10**6, 3, 8, 8), function("z", "torch.split", {"node": "e"}, 1)
    ),
    "tensor_split": lambda d: before_output(d, function("z", "torch.tensor_split", X, BILLION)),
    "chunk of nothing": lambda d: before_output(
        d, function("e", "torch.narrow", X, 1, 0, 0), function("z", "torch.chunk", {"node": "e"}, BILLION, 1)
    ),
    "one_hot": lambda d: before_output(
        d, method("e", "long", X), function("z", "torch.nn.functional.one_hot", {"node": "e"}, 10**12)
    ),
    "interpolate": lambda d: before_output(
        d, function("z", "torch.nn.functional.interpolate", X, scale_factor=1e6)
    ),
    "power": lambda d: before_output(d, function("z", "operator.pow", 10, BILLION)),
    "shift": lambda d: before_output(d, function("z", "operator.lshift", 1, 10**12)),
    "repeated list": lambda d: before_output(d, function("z", "operator.mul", [0], BILLION)),
    "repeated text": lambda d: before_output(d, function("z", "operator.mul", "a", BILLION)),
    "padded text": lambda d: before_output(d, function("z", "operator.mod", "%999999999d", 1)),
    "list in itself": lambda d: before_output(
        d,
        function("a", "operator.getitem", [1, 2], {"slice": [None, None, None]}),
        function("z", "operator.setitem", {"node": "a"}, 0, {"node": "a"}),
    ),
    "doubling": doubling(60),
    "nested": lambda d: before_output(
        d,
        function("a0", "operator.getitem", [1], {"slice": [None, None, None]}),
        *(
            function(f"a{i}", "operator.add", [{"node": f"a{i - 1}"}], [{"node": f"a{i - 1}"}])
            for i in range(1, 40)
        ),
    ),
    "no nodes": lambda d: d.update(nodes=[]),
    "no output": lambda d: d["nodes"].pop(),
    "two outputs": lambda d: d["nodes"].append({**d["nodes"][-1], "name": "again"}),
    "output first": lambda d: d["nodes"].insert(1, d["nodes"].pop()),
    "an operand of itself": lambda d: called(d, "torch.cat").update(
        args=[[{"node": called(d, "torch.cat")["name"]}]]
    ),
    "tied in a circle": lambda d: (
        d["tensors"]["conv.bias"].update(same_as="norm.bias"),
        d["tensors"]["norm.bias"].update(same_as="conv.bias"),
    ),
    "deep history": lambda d: d.update(history=[{"a": _deep(400)}]),
    "sparse": lambda d: before_output(d, method("z", "to_sparse", X)),
    "write into a list": lambda d: before_output(d, function("z", "operator.iconcat", [1], [2])),
    "bound method": lambda d: before_output(d, function("z", "builtins.getattr", X, "values")),
}  # fmt: skip


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_or_endless_is_refused_at_once(name: str, directory: Path) -> None:
    edit(directory, TOO_LARGE[name])
    with pytest.raises(LoadError), within():
        load(directory)


def test_honest_programs_are_far_from_every_bound(
    originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousandth of the elements and a tenth of the kernels are enough."""
    monkeypatch.setattr(bounds, "ELEMENTS", bounds.ELEMENTS // 1000)
    monkeypatch.setattr(bounds, "KERNELS_PER_NODE", bounds.KERNELS_PER_NODE // 10)
    monkeypatch.setattr(bounds, "KERNELS", 0)
    for place in originals.values():
        with within():
            load(place)


@pytest.mark.parametrize("name", [storage.PROGRAM_FILE, storage.WEIGHTS_FILE])
def test_files_without_an_end_are_refused(name: str, directory: Path) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(LoadError, match=f"{name}: found no regular file"):
        load(directory)
    (directory / name).unlink()
    (directory / name).symlink_to("/dev/zero")
    with pytest.raises(LoadError, match=f"{name}: found no regular file"):
        load(directory)


# ---- fuzzing ---------------------------------------------------------------------------------------------


def test_mutations_are_refused_or_never_leave_torch(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile", "150"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["refused"] > 50 and counts["runs"] > 0, counts
