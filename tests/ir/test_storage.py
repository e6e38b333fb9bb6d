import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from graphcomp.base import files
from graphcomp.base.files import atomic_directory, write_text
from graphcomp.errors import LoadError, OutputError
from graphcomp.ir import load, save
from graphcomp.ir.program import PASS_KEY, Program, editable, named_tensors, output_tensors
from graphcomp.ir.saved import storage
from graphcomp.ir.tracing import trace
from tests import nets

ROOT = Path(__file__).parents[2]


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def traced(model: nn.Module, *shape: int) -> Program:
    return trace(model.eval(), random_input(*shape))


def saved(program: Program, directory: Path) -> Program:
    save(program, directory)
    return load(directory)


def flags(program: Program) -> dict[str, tuple[Any, ...]]:
    """What has to survive of every tensor, besides its numbers."""
    return {
        name: (type(t), t.dtype, t.requires_grad, t.stride())
        for name, t in named_tensors(program.module).items()
    }


def assert_same(program: Program, loaded: Program) -> None:
    ours, theirs = named_tensors(program.module), named_tensors(loaded.module)
    assert str(loaded) == str(program)
    assert flags(loaded) == flags(program)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert list(loaded.module.state_dict()) == list(program.module.state_dict())
    assert [n.name for n in loaded.graph.nodes] == [n.name for n in program.graph.nodes]
    assert [n.meta[PASS_KEY] for n in loaded.graph.nodes] == [n.meta[PASS_KEY] for n in program.graph.nodes]
    assert loaded.history == program.history
    assert all(torch.equal(a, b) for a, b in zip(program.example_inputs, loaded.example_inputs, strict=True))
    assert {n: m.training for n, m in loaded.module.named_modules()} == {
        n: m.training for n, m in program.module.named_modules()
    }
    with torch.no_grad():
        expected, actual = program(*program.example_inputs), loaded(*program.example_inputs)
    assert type(actual) is type(expected)
    pairs = list(zip(output_tensors(expected), output_tensors(actual), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


# ---- round trips -----------------------------------------------------------------------------------------

ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (torchvision.models.resnet18, 32),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 32),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, 32),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]), 32),
    "vit": (lambda: VisionTransformer(32, 8, 2, 2, 16, 32), 32),
    "swin": (lambda: SwinTransformer([4, 4], 8, [2, 1], [2, 2], [2, 2]), 64),
    "lraspp": (
        partial(
            torchvision.models.segmentation.lraspp_mobilenet_v3_large, weights=None, weights_backbone=None
        ),
        32,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_torchvision_networks_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    build, size = ZOO[name]
    torch.manual_seed(0)
    program = traced(build(), 1, 3, size, size)
    before = torch.get_rng_state()
    loaded = saved(program, tmp_path / "program")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(program, loaded)
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == [
        "program.json",
        "weights.safetensors",
    ]


TRAPS = [name for i, name in enumerate(nets.TRAPS) if i % 6 == 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_trap_nets_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    model, shape = nets.TRAPS[name]()
    program = traced(nets.scramble(model, 0), *shape)
    assert_same(program, saved(program, tmp_path / "program"))


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(spec=nets.random_cnn())
def test_random_nets_come_back_as_they_were(
    spec: nets.Spec, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, shape = nets.build(spec)
    program = traced(model, *shape)
    assert_same(program, saved(program, tmp_path_factory.mktemp("random") / "program"))


class Everything(nn.Module):
    """Tied and frozen weights, buffers, tensors on containers, several dtypes and memory orders."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 4)
        self.decode = nn.Linear(4, 6)
        self.again = nn.Linear(6, 4)
        self.again.weight = self.encode.weight
        self.block = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(6)
        )
        self.block.register_parameter("scale", nn.Parameter(torch.randn(6, 1, 1)))
        self.register_buffer("offset", torch.arange(6).view(6, 1, 1))
        self.register_buffer("mask", torch.tensor([True, False] * 3).view(6, 1, 1), persistent=False)
        self.block[1].weight.requires_grad_(False)
        self.block[0].to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.block(x) * self.block.scale + self.offset
        y = torch.where(self.mask, y, -y)
        z = self.again(self.decode(self.encode(y.mean((2, 3)))))
        return {"map": y, "codes": [z, (z[..., 1:None:2], y.to(torch.float64))]}


def everything() -> Program:
    torch.manual_seed(0)
    return traced(Everything(), 1, 3, 5, 5)


def test_flags_ties_buffers_and_memory_orders_survive(tmp_path: Path) -> None:
    program = everything()
    loaded = saved(program, tmp_path / "program")
    assert_same(program, loaded)
    module = loaded.module
    assert module.get_parameter("again.weight") is module.get_parameter("encode.weight")
    assert not module.get_parameter("block.1.weight").requires_grad
    assert module.get_parameter("block.0.weight").is_contiguous(memory_format=torch.channels_last)
    assert not module.get_parameter("block.0.weight").is_contiguous()


def test_a_buffer_that_is_not_persistent_stays_so(tmp_path: Path) -> None:
    program = everything()
    program.module._non_persistent_buffers_set.add("mask")
    loaded = saved(program, tmp_path / "program")
    assert "mask" in dict(loaded.module.named_buffers())
    assert "mask" not in loaded.module.state_dict()


def test_history_pass_names_and_low_precision_survive(tmp_path: Path) -> None:
    program = everything().to(torch.bfloat16)
    for node in program.graph.nodes:
        node.meta[PASS_KEY] = f"pass-of-{node.name}"
    program = Program(program.module, program.example_inputs, ({"pass": "l1", "drop": {"a": [1, 2]}}, {}))
    loaded = saved(program, tmp_path / "program")
    assert_same(program.to(torch.float32), loaded.to(torch.float32))
    assert flags(loaded) == flags(program)
    assert all(n.meta[PASS_KEY] == f"pass-of-{n.name}" for n in loaded.graph.nodes)


def test_a_loaded_program_is_saved_as_the_same_files(tmp_path: Path) -> None:
    saved(saved(everything(), tmp_path / "a"), tmp_path / "b")
    for name in (storage.PROGRAM_FILE, storage.WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_views_of_one_memory_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    program = traced(model, 1, 4)
    assert_same(program, saved(program, tmp_path / "program"))


def sgd_step(program: Program) -> tuple[float, list[Tensor]]:
    module = program.clone().module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    torch.manual_seed(3)
    for _ in range(2):
        loss = torch.stack(
            [t.double().pow(2).mean() for t in output_tensors(module(random_input(4, 3, 5, 5)))]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), [t.detach() for t in named_tensors(module).values()]


def test_a_loaded_program_trains_as_the_saved_one(tmp_path: Path) -> None:
    program = everything()
    loss, weights = sgd_step(program)
    again_loss, again = sgd_step(saved(program, tmp_path / "program"))
    assert again_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(weights, named_tensors(program.module).values(), strict=True)
    )


def run_python(code: str, *arguments: object, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_loads_in_a_fresh_interpreter_without_the_models_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "secret_model.py").write_text(
        "import torch\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 4, 3)\n"
        "    def forward(self, x):\n"
        "        return torch.nn.functional.hardswish(self.conv(x)).flatten(1)\n"
    )
    monkeypatch.syspath_prepend(source)
    import secret_model

    program = traced(secret_model.Block(), 1, 3, 6, 6)
    save(program, tmp_path / "program")
    out = run_python(
        """
        import importlib.util, sys, torch
        from graphcomp import load
        assert importlib.util.find_spec("secret_model") is None
        program = load(sys.argv[1])
        print(program(*program.example_inputs).detach().double().tolist())
        """,
        tmp_path / "program",
        cwd=tmp_path,
    )
    assert json.loads(out) == program(*program.example_inputs).detach().double().tolist()


# ---- layers and arguments --------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 8, (3, 1), 2, (1, 0), 1, 2, bias=False),
    "conv-circular": lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, dilation=2),
    "linear": lambda: nn.Linear(3, 2, bias=False),
    "bilinear": lambda: nn.Bilinear(2, 3, 4),
    "batchnorm-bare": lambda: nn.BatchNorm2d(4, 1e-3, None, affine=False, track_running_stats=False),
    "batchnorm-3d": lambda: nn.BatchNorm3d(4, momentum=0.3),
    "instancenorm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "groupnorm": lambda: nn.GroupNorm(2, 4, affine=False),
    "layernorm": lambda: nn.LayerNorm([4, 5], bias=False),
    "layernorm-bare": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "rmsnorm": lambda: nn.RMSNorm(4, eps=0.1),
    "attention": lambda: nn.MultiheadAttention(8, 2, 0.1, batch_first=True),
    "attention-odd": lambda: nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True, kdim=4, vdim=6),
    "embedding": lambda: nn.Embedding(5, 3, padding_idx=-1, max_norm=2.0),
    "gelu": lambda: nn.GELU("tanh"),
    "prelu": lambda: nn.PReLU(4, 0.1),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "hardtanh": lambda: nn.Hardtanh(-2, float("inf")),
    "threshold": lambda: nn.Threshold(0.1, 20),
    "softmax": lambda: nn.Softmax(dim=None),
    "dropout": lambda: nn.Dropout2d(0.3, inplace=True),
    "max-pool": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True, return_indices=True),
    "avg-pool": lambda: nn.AvgPool2d(3, None, (1, 0), count_include_pad=False, divisor_override=4),
    "adaptive-pool": lambda: nn.AdaptiveAvgPool2d((None, 3)),
    "upsample": lambda: nn.Upsample(scale_factor=(2, 3), mode="bilinear", align_corners=False),
    "upsample-nearest": lambda: nn.UpsamplingNearest2d(size=7),
    "shuffle": lambda: nn.PixelShuffle(2),
    "flatten": lambda: nn.Flatten(1, 2),
    "unflatten": lambda: nn.Unflatten(1, (2, -1)),
    "padding": lambda: nn.ConstantPad2d((1, 2, 3, 4), -1.5),
    "distance": lambda: nn.PairwiseDistance(3.0, keepdim=True),
    "identity": lambda: nn.Identity(1, unused="x"),
    "glu": lambda: nn.GLU(1),
}


EXAMPLES: dict[str, tuple[Tensor, ...]] = {
    "conv-circular": (torch.zeros(1, 4, 5),),
    "linear": (torch.zeros(1, 3),),
    "bilinear": (torch.zeros(1, 2), torch.zeros(1, 3)),
    "batchnorm-3d": (torch.zeros(1, 4, 3, 5, 5),),
    "layernorm": (torch.zeros(1, 4, 5),),
    "layernorm-bare": (torch.zeros(1, 5, 4),),
    "rmsnorm": (torch.zeros(1, 4),),
    "attention": (torch.zeros(1, 3, 8),) * 3,
    "attention-odd": (torch.zeros(1, 3, 8), torch.zeros(1, 3, 4), torch.zeros(1, 3, 6)),
    "embedding": (torch.zeros(1, 3, dtype=torch.int64),),
    "distance": (torch.zeros(1, 4), torch.zeros(1, 4)),
}
DEFAULT = (torch.zeros(1, 4, 5, 5),)


def calling(layer: nn.Module, examples: tuple[Tensor, ...] = DEFAULT) -> Program:
    """A program that calls `layer`."""
    graph = fx.Graph()
    inputs = tuple(graph.placeholder(f"x{i}") for i in range(len(examples)))
    graph.output(graph.call_module("block.layer", inputs))
    root = nn.Module()
    root.block = nn.Module()
    root.block.layer = layer
    return Program(fx.GraphModule(root.eval(), graph, "Calling").eval(), examples)


def plain(module: nn.Module) -> dict[str, Any]:
    hidden = vars(nn.Module()).keys() - {"training"}
    return {n: {k: v for k, v in vars(m).items() if k not in hidden} for n, m in module.named_modules()}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_rebuilt_with_every_attribute(name: str, tmp_path: Path) -> None:
    program = calling(LAYERS[name](), EXAMPLES.get(name, DEFAULT))
    loaded = saved(program, tmp_path / "program")
    before, after = program.layer("block.layer"), loaded.layer("block.layer")
    assert repr(after) == repr(before)
    assert plain(after) == plain(before)
    assert flags(loaded) == flags(program)
    assert list(after.state_dict()) == list(before.state_dict())


def test_attributes_set_after_construction_survive(tmp_path: Path) -> None:
    layer = nn.MultiheadAttention(8, 2)
    layer.out_proj.note = ("mine", 1.5)
    layer.dropout = 0.25
    layer.eval().out_proj.train()
    program = calling(layer, EXAMPLES["attention"])
    program.layer("block.layer.out_proj").train()
    loaded = saved(program, tmp_path / "program")
    assert plain(loaded.layer("block.layer")) == plain(program.layer("block.layer"))
    assert loaded.layer("block.layer.out_proj").training


ARGUMENTS: list[Any] = [
    (1, [2, (3,)], "a\"'\\\n{}", None, True, -0.0, 1e-300, 10**30),
    {"a": 1, "b": {"c": (1, [2])}, "d e": None},
    (slice(None, -1, 2), ..., slice(1, None)),
    (float("inf"), float("-inf")),
    (torch.float16, torch.channels_last, torch.strided, torch.device("cpu"), torch.Size([1, 2])),
]


@pytest.mark.parametrize("value", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments_come_back_equal(value: Any, tmp_path: Path) -> None:
    program = returning(value)
    node = next(n for n in program.graph.nodes if n.op == "output")
    loaded = next(n for n in saved(program, tmp_path / "program").graph.nodes if n.op == "output")
    assert repr(loaded.args) == repr(node.args)  # tells 1 from True, (1,) from [1] and 0.0 from -0.0


def test_nan_comes_back(tmp_path: Path) -> None:
    program = returning(float("nan"))
    value = saved(program, tmp_path / "program")(torch.zeros(1))[1]
    assert value != value


def returning(value: Any) -> Program:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"), value))
    return Program(fx.GraphModule(nn.Module(), graph, "Returning"), (torch.zeros(1),))


# ---- what cannot be saved --------------------------------------------------------------------------------


def helper(x: Tensor) -> Tensor:
    return x * 2


def with_function(function: Callable[..., Any], *args: Any) -> Program:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), *args)))
    return Program(fx.GraphModule(nn.Module(), graph, "Calling"), (torch.zeros(1),))


class Pair(NamedTuple):
    first: int
    second: int


class OwnConv(nn.Conv2d):
    pass


def hooked() -> nn.Module:
    layer = nn.Conv2d(4, 8, 1)
    layer.register_forward_hook(lambda m, x, y: y * 2)
    return layer


def with_own_forward() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def with_other_weight() -> nn.Module:
    layer = nn.Conv2d(4, 8, 1)
    layer.weight = nn.Parameter(torch.zeros(6, 4, 1, 1))
    return layer


def with_other_child() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2)
    layer.out_proj = nn.Linear(8, 8)  # type: ignore[assignment]
    return layer


def with_complex_weight() -> Program:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.mul, (graph.placeholder("x"), graph.get_attr("weight"))))
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(1, dtype=torch.complex128))
    return Program(fx.GraphModule(root, graph, "Complex"), (torch.zeros(1),))


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 1))


REFUSED: dict[str, tuple[Callable[[], Program], str]] = {
    "function": (
        lambda: with_function(helper),
        r"helper: found function .*test_storage\.helper, expected one of",
    ),
    "eval": (lambda: with_function(eval), r"eval.*: found function builtins\.eval"),
    "attribute": (lambda: with_function(getattr, "__class__"), r"getattr.*__class__.*expected one of"),
    "complex": (lambda: returning(1j), r"output.*: found a builtins\.complex, expected nodes"),
    "named-tuple": (
        lambda: returning(Pair(1, 2)),
        r"output.*: found a .*test_storage\.Pair, expected nodes",
    ),
    "subclass": (
        lambda: calling(OwnConv(4, 8, 1)),
        r"block\.layer: found .*OwnConv, expected a public class",
    ),
    "parametrized": (lambda: calling(parametrized()), r"block\.layer: found .*ParametrizedConv2d"),
    "hooks": (lambda: calling(hooked()), r"block\.layer \(Conv2d\): found hooks, expected none"),
    "forward": (lambda: calling(with_own_forward()), r"block\.layer \(ReLU\): found forward unlike"),
    "weight": (
        lambda: calling(with_other_weight()),
        r"block\.layer\.weight: found parameter \(6, 4, 1, 1\), expected parameter \(8, 4, 1, 1\)",
    ),
    "child": (lambda: calling(with_other_child()), r"block\.layer \(MultiheadAttention\): found submodules"),
    "encoder-layer": (
        lambda: calling(nn.TransformerEncoderLayer(8, 2, 16)),
        r"block\.layer: found .*TransformerEncoderLayer, expected a public class of torch\.nn that is one",
    ),
    "recurrent": (
        lambda: calling(nn.LSTM(3, 4)),
        r"block\.layer: found .*LSTM, expected .* that is one layer",
    ),
    "dtype": (with_complex_weight, r"weight.*complex128, expected a type"),
    "argument": (
        lambda: with_function(torch.relu, "x"),
        r"nodes\.relu \(torch\.relu\): found 2 arguments, expected 0 to 1",
    ),
    "does-not-run": (
        lambda: calling(nn.Linear(3, 2)),
        r"nodes\.block_layer \(block\.layer\): .*; expected a program that runs on its example inputs",
    ),
    "sparse": (
        lambda: calling(nn.BatchNorm1d(1)._apply(lambda t: t.to_sparse() if t.dim() else t)),
        r"running_mean|weight",
    ),
    "plan": (lambda: Program(everything().module, (), ({"keep": {1, 2}},)), "history: .*JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_load_differently_is_refused_by_name(name: str, tmp_path: Path) -> None:
    build, message = REFUSED[name]
    with pytest.raises(LoadError, match=message):
        save(build(), tmp_path / "program")
    assert list(tmp_path.iterdir()) == []


# ---- what must not be loaded -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "program"
    save(everything(), directory)
    return directory


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "program"))


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / storage.PROGRAM_FILE
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def node_of(document: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for n in document["nodes"] if n["op"] == op)


def call(target: str, *args: Any, op: str = "call_function") -> Callable[[dict[str, Any]], object]:
    """Make the first call of kind `op` one of `target`."""
    return lambda d: node_of(d, op).update(target=target, args=list(args))


QUOTED = 'a" or open("pwned", "w") or "'  # no dots, so that it could be the name of one module
INJECTION = '__import__("pathlib").Path("pwned").touch()'

HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    **{
        f"function {name}": call(name, "touch pwned")
        for name in (
            "os.system",
            "posix.system",
            "builtins.eval",
            "builtins.exec",
            "builtins.__import__",
            "builtins.open",
            "torch.load",
            "torch.hub.load",
            "torch.from_file",
            "torch.serialization.load",
            "torch.autocast",
            "torch.ops.load_library",
            "torch.os.system",
            "operator.call",
            "operator.methodcaller",
            "operator.attrgetter",
            "math.__loader__",
            "torchvision.models.get_model",
            "torchvision.io.read_file",
            "graphcomp.ir.saved.storage.load",
            "",
        )
    },
    **{
        f"method {name}": call(name, {"node": "x"}, op="call_method")
        for name in (
            "__reduce__",
            "__reduce_ex__",
            "__class__",
            "__init_subclass__",
            "numpy",
            "share_memory_",
        )
    },
    "method apply_": call("apply_", {"node": "x"}, op="call_method"),
    "method resize_": call("resize_", {"node": "x"}, op="call_method"),
    "method with code": call(f"mean() or {INJECTION} or x.mean", {"node": "x"}, op="call_method"),
    "getattr of a dunder": call("builtins.getattr", {"node": "x"}, "__class__"),
    "getattr of grad_fn": call("builtins.getattr", {"node": "x"}, "grad_fn"),
    "getattr of a node": call("builtins.getattr", {"node": "x"}, {"node": "x"}),
    "getattr with default": call("builtins.getattr", {"node": "x"}, "shape", 1),
    "class of another module": lambda d: d["modules"]["encode"].update(kind="Parameter"),
    "class with a path": lambda d: d["modules"]["encode"].update(kind="modules.Linear"),
    "class that is a module": lambda d: d["modules"]["encode"].update(kind="functional"),
    "class that is private": lambda d: d["modules"]["encode"].update(kind="__builtins__"),
    "class with other arguments": lambda d: d["modules"]["encode"].update(arguments={"f": 1}),
    "forward attribute": lambda d: d["modules"]["encode"].update(attributes={"": {"forward": 1}}),
    "hook attribute": lambda d: d["modules"]["encode"].update(attributes={"": {"_forward_hooks": 1}}),
    "attribute of no module": lambda d: d["modules"]["encode"].update(attributes={"x": {"y": 1}}),
    "module over a method": lambda d: d["modules"].update(forward={"kind": "ReLU"}),
    "module in a layer": lambda d: d["modules"].update({"encode.more": {"kind": "ReLU"}}),
    "module name with code": lambda d: (
        d["modules"].update({QUOTED: {"kind": "ReLU"}}),
        node_of(d, "call_module").update(target=QUOTED),
    ),
    "target with code": call(f'a") or {INJECTION} or ("', op="call_module"),
    "input with code": lambda d: node_of(d, "placeholder").update(target=f"x={INJECTION}"),
    "input with annotation": lambda d: node_of(d, "placeholder").update(target=f"x: {INJECTION}"),
    "keyword with code": lambda d: node_of(d, "call_method").update(kwargs={f"dim=0 or {INJECTION}, y": 1}),
    "keyword that is reserved": lambda d: node_of(d, "call_method").update(kwargs={"class": 1}),
    "node name with code": lambda d: node_of(d, "call_module").update(name=f"a = {INJECTION}; b"),
    "program name with code": lambda d: d.update(name=f"A: {INJECTION}"),
    "tensor name with code": lambda d: (
        d["tensors"].update({QUOTED: {**d["tensors"]["offset"], "same_as": "offset"}}),
        node_of(d, "get_attr").update(target=QUOTED),
    ),
    "dtype that is no dtype": call("operator.add", {"dtype": "load"}),
    "dtype of a number": call("operator.add", {"dtype": 3}),
    "device that is none": call("operator.add", {"device": "toaster"}),
    "unknown kind of value": call("operator.add", {"python": INJECTION}),
    "two kinds of value": call("operator.add", {"tuple": [], "list": []}),
    "node that does not exist": call("operator.add", {"node": "nowhere"}),
    "node that comes later": call("operator.add", {"node": "output"}),
    "bottomless value": lambda d: node_of(d, "output").update(args=[nested(600)]),
}


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_refused(
    name: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edit(directory, HOSTILE[name])
    with pytest.raises(LoadError, match=r"program\.json"):
        load(directory)
    assert not (tmp_path / "pwned").exists()


def test_strings_are_never_code(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f'") or {INJECTION} or ("'
    edit(directory, lambda d: node_of(d, "output").update(args=[{"dict": [[text, text]]}]))
    assert load(directory)(random_input(1, 3, 5, 5)) == {text: text}
    assert not (tmp_path / "pwned").exists()


def test_nothing_is_unpickled(directory: Path) -> None:
    torch.save({"encode.weight": torch.zeros(4, 6)}, directory / storage.WEIGHTS_FILE)
    with pytest.raises(LoadError, match=r"weights\.safetensors: .*expected a safetensors file"):
        load(directory)


# ---- damage ----------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "later format": (lambda d: d.update(format=2), r"program\.json: found format 2, expected 1"),
    "no format": (lambda d: d.pop("format"), r"program\.json: found format None, expected 1"),
    "no nodes": (lambda d: d.pop("nodes"), r"program\.json: nodes: Field required"),
    "other field": (lambda d: d["nodes"][0].update(extra=1), r"program\.json: nodes\.0\.extra: Extra inputs"),
    "no tensor in json": (
        lambda d: d["tensors"].pop("decode.bias"),
        r"weights\.safetensors: found \['decode\.bias'\] that program\.json does not name",
    ),
    "other shape": (
        lambda d: d["tensors"]["decode.bias"].update(shape=[7]),
        r"weights\.safetensors: decode\.bias: found \(6,\) float32, expected \(7,\)",
    ),
    "other dtype": (
        lambda d: d["tensors"]["decode.bias"].update(dtype="float64"),
        r"decode\.bias: found \(6,\) float32, expected \(6,\) float64",
    ),
    "other layer": (
        lambda d: d["modules"]["decode"]["arguments"].update(in_features=5),
        r"decode\.weight: found parameter \(6, 4\), expected parameter \(6, 5\)",
    ),
    "other kind": (
        lambda d: d["tensors"]["decode.bias"].update(kind="buffer"),
        r"decode\.bias: found buffer \(6,\), expected parameter \(6,\)",
    ),
    "no layer": (lambda d: d["modules"].pop("decode"), r"decode\.weight: found a tensor, expected none"),
    "no bias": (
        lambda d: d["modules"]["decode"]["arguments"].update(bias=False),
        r"decode\.bias: found a tensor, expected none",
    ),
    "tied to nothing": (
        lambda d: d["tensors"]["again.weight"].update(same_as="nowhere"),
        r"tensors\.again\.weight: expected itself or `same_as` to be stored",
    ),
    "memory order": (
        lambda d: d["tensors"]["block.0.weight"].update(order=[0, 1, 2, 2]),
        r"block\.0\.weight: found memory order",
    ),
    "gradient of integers": (
        lambda d: d["tensors"]["offset"].update(requires_grad=True),
        r"tensors\.offset: found torch\.int64 with requires_grad",
    ),
    "no input": (lambda d: d.update(inputs=2), r"expected also \['#input\.1'\]"),
    "name twice": (lambda d: d["nodes"].insert(2, d["nodes"][1]), r"nodes\..*: found a name that fx makes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_json_is_named(name: str, directory: Path) -> None:
    change, message = DAMAGE[name]
    edit(directory, change)
    with pytest.raises(LoadError, match=message):
        load(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "nul", "[" * 100_000, '{"format": 1, "format": 2}'])
def test_text_that_is_no_program_is_named(text: str, directory: Path) -> None:
    (directory / storage.PROGRAM_FILE).write_text(text)
    with pytest.raises(LoadError, match=r"program\.json: "):
        load(directory)


@pytest.mark.parametrize("name", [storage.PROGRAM_FILE, storage.WEIGHTS_FILE])
def test_missing_and_binary_files_are_named(name: str, directory: Path) -> None:
    (directory / name).write_bytes(b"\xff\xfe\x00damaged")
    with pytest.raises(LoadError, match=f"{name}: "):
        load(directory)
    (directory / name).unlink()
    with pytest.raises(LoadError, match=rf"{name}: found 'No such file"):
        load(directory)


def test_weights_of_another_save_are_named(directory: Path) -> None:
    file = directory / storage.WEIGHTS_FILE
    tensors = load_file(file)
    tensors["stranger"] = tensors.pop("decode.bias").clone()
    save_file({k: v.clone() for k, v in tensors.items()}, file)
    with pytest.raises(LoadError, match=r"found \['stranger'\] .* expected also \['decode\.bias'\]"):
        load(directory)


# ---- whole or not at all ---------------------------------------------------------------------------------


def test_a_program_replaces_an_older_one(directory: Path) -> None:
    other = traced(nn.Linear(3, 2), 1, 3)
    assert_same(other, saved(other, directory))
    assert [f.name for f in directory.parent.iterdir()] == ["program"]


def test_a_directory_with_other_content_is_left_alone(directory: Path) -> None:
    (directory / "notes.txt").write_text("mine")
    before = {f.name: f.read_bytes() for f in directory.iterdir()}
    with pytest.raises(OutputError, match="found a directory with other content"):
        save(traced(nn.Linear(3, 2), 1, 3), directory)
    assert {f.name: f.read_bytes() for f in directory.iterdir()} == before


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "program").write_text("mine")
    with pytest.raises(OutputError, match="program: found a file, expected"):
        save(everything(), tmp_path / "program")
    assert (tmp_path / "program").read_text() == "mine"


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file/program: found '.*', expected a place to write to"):
        save(everything(), tmp_path / "file" / "program")


def test_a_full_disk_leaves_the_older_program(directory: Path) -> None:
    """The kernel refuses to write a file beyond 4 KiB: the weights cannot be finished."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    program = traced(nn.Linear(64, 64), 1, 64)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match=r"program: found '.*File too large.*', expected"):
            save(program, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [f.name for f in directory.parent.iterdir()] == ["program"]
    assert_same(everything(), load(directory))


def test_a_disk_that_is_full_at_the_last_moment_is_named(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="program: found 'No space left on device'"):
        save(traced(nn.Linear(3, 2), 1, 3), directory)
    with pytest.raises(OutputError, match="No space left"):
        write_text(tmp_path / "x", "x")
    assert [f.name for f in tmp_path.iterdir()] == ["program"]
    assert_same(everything(), load(directory))


def test_a_failed_swap_restores_the_older_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if target == directory and "part" in {f.name for f in self.iterdir()}:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        atomic_directory(directory, lambda path: True) as new,
    ):
        (new / "part").write_text("new")
    load(directory)
    assert [f.name for f in directory.parent.iterdir()] == ["program"]


def test_a_link_to_a_directory_stays_a_link(directory: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory, target_is_directory=True)
    other = traced(nn.Linear(3, 2), 1, 3)
    assert_same(other, saved(other, link))
    assert link.is_symlink()
    assert_same(other, load(directory))


def test_an_edited_copy_is_saved(tmp_path: Path) -> None:
    program = everything()
    copy = Program(editable(program, {"encode.bias": torch.ones(4)}), program.example_inputs)
    loaded = saved(copy, tmp_path / "program")
    assert_same(copy, loaded)
    assert torch.equal(loaded.module.get_parameter("encode.bias"), torch.ones(4))
