"""Export: the file computes what the program does, says where its nodes come from, or is not written."""

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper
from torch import Tensor, nn

from graphcomp.errors import ExportError, OutputError
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.program import PASS_KEY, Program, named_tensors, output_tensors
from graphcomp.ir.tracing import trace
from graphcomp.onnx import cleanup, drafts, export, storage, translate
from graphcomp.onnx.export import export_onnx
from graphcomp.onnx.origins import MODULE_PROP, NODE_PROP, PASS_PROP
from graphcomp.onnx.rows import NoRow
from graphcomp.records import Export
from tests.nets import TRAPS, scramble

HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


class Residual(nn.Module):
    """Conv-BN-ReLU, a residual add, a masked option-A shortcut, flatten and linear."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)
        self.register_buffer("mask", torch.arange(16.0).view(1, 16, 1, 1) % 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.bn1(self.conv1(x)))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.bn2(self.down(x)) * self.mask + shortcut)
        return cast(Tensor, self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


class Twice(nn.Module):
    """One convolution that two BatchNorms follow in turn; a dict of outputs named like inner values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.bn1(self.conv(x)))
        z = F.relu(self.bn2(self.conv(y)))
        return {"relu": z, "conv2d": y, "input": y + z, "again": z}


class Shuffled(nn.Module):
    """Chunk, cat of permuted and selected channels, batch-sized views, and two outputs."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(8 * 36, 3)
        self.register_buffer("order", torch.tensor([5, 0, 3, 7, 1, 1, 2, 6]))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([self.left(a), b], 1)
        x = F.pad(x, (0, 0, 0, 0))[:, self.order]
        y = x.view(x.shape[0], 2, x.shape[1] // 2, 6, 6).transpose(1, 2).flatten(1, 2)
        return self.fc(y.view(y.size(0), -1)), [torch.sigmoid(y)]


class Plain(nn.Module):
    """One convolution, then `body`."""

    def __init__(self, body: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.conv(x))


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "residual": lambda: (Residual(), (1, 3, 8, 8)),
    "twice": lambda: (Twice(), (1, 3, 6, 6)),
    "shuffled": lambda: (Shuffled(), (1, 3, 6, 6)),
    "dense": lambda: (torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), (1, 3, 32, 32)),
    "transposed": TRAPS["conv-transpose-grouped"],
    "linear-bn": TRAPS["batchnorm1d-after-linear"],
    "attention": TRAPS["attention-matmul"],
}
ZOO = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(),
    "lraspp": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights_backbone=None, num_classes=4
    ),
}


@dataclass(frozen=True)
class Exported:
    program: Program
    path: Path
    record: Export
    model: ModelProto

    def nodes(self, *ops: str) -> list[NodeProto]:
        return [n for n in self.model.graph.node if n.op_type in ops]


def traced(model: nn.Module, shape: tuple[int, ...] = (1, 3, 4, 4), seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return trace(scramble(model, seed).eval(), torch.randn(shape))


def exported_to(path: Path, program: Program, **options: Any) -> Exported:
    record = export_onnx(program, path, **options)
    return Exported(program, path, record, onnx.load(path))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    done: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in done:
            model, shape = (ZOO[name](), (1, 3, 64, 64)) if name in ZOO else NETS[name]()
            done[name] = exported_to(tmp_path_factory.mktemp("onnx") / f"{name}.onnx", traced(model, shape))
        return done[name]

    return get


def props(node: NodeProto) -> dict[str, str]:
    return {p.key: p.value for p in node.metadata_props}


def run(model: Path | bytes, *inputs: Tensor) -> dict[str, NDArray[Any]]:
    source = str(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def assert_same(file: Exported, batch: int) -> None:
    inputs = fresh_inputs(file.program, batch, seed=99)
    with torch.no_grad():
        expected = output_tensors(file.program(*(x.clone() for x in inputs)))
    found = run(file.path, *inputs)
    for (name, value), tensor in zip(found.items(), expected, strict=True):
        scale = float(tensor.abs().max())
        np.testing.assert_allclose(value, tensor.numpy(), atol=2e-6 * scale, rtol=0, err_msg=name)


def expected_calls(program: Program) -> Counter[str]:
    """How often the graph calls each module that multiplies."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    calls = [cast(str, n.target) for n in program.graph.nodes if n.op == "call_module"]
    return Counter(t for t in calls if isinstance(program.module.get_submodule(t), kinds))


# ----- what the file computes and is called


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_file_equals_program_at_a_batch_it_was_not_checked_at(
    exported: Callable[[str], Exported], name: str
) -> None:
    assert_same(exported(name), batch=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_record_describes_the_file(exported: Callable[[str], Exported], name: str) -> None:
    file = exported(name)
    assert file.record.path == str(file.path)
    assert file.record.bytes == file.path.stat().st_size
    assert file.record.nodes == len(file.model.graph.node)
    assert file.record.opset == 18 == file.model.opset_import[0].version
    assert set(file.record.parity) == {"1", "2", "5"}
    assert all(0 <= error < 1e-5 for error in file.record.parity.values())


@pytest.mark.slow
def test_names_and_open_batch(exported: Callable[[str], Exported]) -> None:
    def shapes(values: Any) -> dict[str, list[str | int]]:
        dims = {v.name: v.type.tensor_type.shape.dim for v in values}
        return {name: [d.dim_param or d.dim_value for d in sizes] for name, sizes in dims.items()}

    graph = exported("shuffled").model.graph
    assert shapes(graph.input) == {"input": ["batch", 3, 6, 6]}
    assert shapes(graph.output) == {"output_0": ["batch", 3], "output_1_0": ["batch", 8, 6, 6]}


@pytest.mark.slow
def test_outputs_may_be_called_like_the_input_or_inner_values(exported: Callable[[str], Exported]) -> None:
    names = [o.name for o in exported("twice").model.graph.output]
    assert names == ["relu", "conv2d", "input_output", "again"]


@pytest.mark.slow
def test_two_inputs_keep_their_names(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return torch.relu(left) @ right.transpose(1, 2)

    program = trace(Two().eval(), (torch.randn(1, 4, 5), torch.randn(1, 3, 5)))
    file = exported_to(tmp_path / "two.onnx", program)
    assert [i.name for i in file.model.graph.input] == ["left", "right"]
    assert_same(file, batch=4)


@pytest.mark.slow
def test_network_that_works_on_its_input_in_place(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x, inplace=True) * 2

    assert_same(exported_to(tmp_path / "m.onnx", trace(InPlace(), torch.randn(1, 3, 4, 4))), batch=2)


@pytest.mark.slow
def test_fixed_batch_is_the_first_of_batches(tmp_path: Path) -> None:
    program = traced(Plain(lambda x: x.view(1, 64)))
    file = exported_to(tmp_path / "m.onnx", program, dynamic=())
    assert [d.dim_value for d in file.model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 4, 4]
    assert set(file.record.parity) == {"1"}
    wide = exported_to(tmp_path / "w.onnx", traced(Plain(torch.relu)), dynamic=(), batches=(4,))
    assert wide.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    assert_same(wide, batch=4)


@pytest.mark.slow
def test_opset_20(tmp_path: Path) -> None:
    file = exported_to(tmp_path / "m.onnx", traced(Plain(F.gelu)), opset=20)
    assert file.record.opset == 20 == file.model.opset_import[0].version
    assert [props(n)[MODULE_PROP] for n in file.nodes("Conv")] == ["conv"]
    assert_same(file, batch=2)


# ----- where nodes come from


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_every_node_says_where_it_comes_from(exported: Callable[[str], Exported], name: str) -> None:
    file = exported(name)
    fx_nodes = {n.name: n for n in file.program.graph.nodes}
    for node in file.model.graph.node:
        found = props(node)
        assert set(found) == {MODULE_PROP, NODE_PROP, PASS_PROP}
        source = fx_nodes[found[NODE_PROP]]
        assert found[MODULE_PROP] == (source.target if source.op == "call_module" else source.name)
        assert found[PASS_PROP] == "trace"


@pytest.mark.parametrize("name", ["residual", "twice", "shuffled", "dense", "transposed", "linear-bn"])
def test_heavy_nodes_belong_to_the_module_that_multiplies(
    exported: Callable[[str], Exported], name: str
) -> None:
    assert_heavy_nodes_are_right(exported(name))


def assert_heavy_nodes_are_right(file: Exported) -> None:
    tags = [(props(n)[MODULE_PROP], n) for n in file.nodes(*HEAVY)]
    assert Counter(module for module, _ in tags) == expected_calls(file.program)
    stored = {i.name: numpy_helper.to_array(i) for i in file.model.graph.initializer}
    tensors = named_tensors(file.program.module)
    for module, node in tags:
        weight = tensors[f"{module}.weight"].detach().numpy()
        held = stored[node.input[1]].T if is_transposed(node) else stored[node.input[1]]
        assert held.shape == weight.shape
        assert cosines(held, weight).min() > 0.9999, f"{node.name} does not hold the weight of {module}"


def is_transposed(node: NodeProto) -> bool:
    gemm = node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
    return gemm or node.op_type == "MatMul"


def cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """By output channel: a folded BatchNorm scales each channel, of either sign, and turns none."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return cast(
        "NDArray[Any]", np.abs((a * b).sum(1)) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_torchvision_networks(exported: Callable[[str], Exported], name: str) -> None:
    file = exported(name)
    assert_heavy_nodes_are_right(file)
    assert_same(file, batch=3)
    assert [o.name for o in file.model.graph.output] == (["out"] if name == "lraspp" else ["output"])


def test_module_used_twice_has_two_nodes_in_order(exported: Callable[[str], Exported]) -> None:
    assert [props(n)[NODE_PROP] for n in exported("twice").nodes("Conv")] == ["conv", "conv_1"]


def test_function_of_tokens_is_told_apart_from_linear_layers(exported: Callable[[str], Exported]) -> None:
    found = [props(n)[MODULE_PROP] for n in exported("attention").nodes("MatMul", "Gemm")]
    assert sorted(found) == ["embed", "head", "key", "matmul", "matmul_1", "project", "query", "value"]


def test_split_lost_its_metadata_and_still_belongs_to_chunk(exported: Callable[[str], Exported]) -> None:
    assert [props(n)[MODULE_PROP] for n in exported("shuffled").nodes("Split")] == ["chunk"]


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_one_tensor_are_stored_once_and_equal_ones_twice(tmp_path: Path, tied: bool) -> None:
    """Who reads a file knows by that which layers may change by themselves."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    model[2].load_state_dict(model[0].state_dict())
    if tied:
        model[2].weight = model[0].weight
    file = exported_to(tmp_path / "m.onnx", trace(model.eval(), torch.randn(1, 3, 4, 4)))
    assert [n.input[1] for n in file.nodes("Conv")] == ["0.weight", "0.weight" if tied else "2.weight"]
    assert [n.input[2] for n in file.nodes("Conv")] == ["0.bias", "2.bias"]
    assert [props(n)[MODULE_PROP] for n in file.nodes("Conv")] == ["0", "2"]


@pytest.mark.slow
def test_pass_is_the_one_of_the_fx_node(tmp_path: Path) -> None:
    program = traced(Residual(), (1, 3, 8, 8))
    by = {"conv1": "pfa", "bn1": "fold-bn", "add": "pad"}
    for node in program.graph.nodes:
        node.meta[PASS_KEY] = by.get(node.name, "trace")
    file = exported_to(tmp_path / "m.onnx", program)
    found = {props(n)[NODE_PROP]: props(n)[PASS_PROP] for n in file.model.graph.node}
    # bn1 is folded into conv1 by the exporter, and the Conv is conv1's.
    assert {k: v for k, v in found.items() if v != "trace"} == {"conv1": "pfa", "add": "pad"}


@pytest.mark.slow
def test_nothing_of_this_machine_is_in_the_file(exported: Callable[[str], Exported]) -> None:
    for name in ("residual", "twice"):  # with and without a rewrite by the clean-up
        content = exported(name).path.read_bytes()
        assert b"pkg.torch" not in content
        assert str(Path(torch.__file__).parent).encode() not in content


# ----- clean-up


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes through torch's exporter."""

    def write(*_: Any) -> Any:
        raise NoRow("conv: conv2d: no row")

    monkeypatch.setattr(drafts, "write", write)


@pytest.mark.slow
@pytest.mark.usefixtures("no_rows")
def test_clean_up_says_what_it_did_and_keeps_the_function(tmp_path: Path) -> None:
    file = exported_to(tmp_path / "m.onnx", traced(Shuffled(), (1, 3, 6, 6)))
    assert file.record.fallback == "conv: conv2d: no row"
    assert file.record.cleanup == [
        "indexing by Transpose, GatherND, Transpose -> Gather: 1 rewritten, 14 -> 12 nodes",
        "Identity or Pad by nothing -> dropped: 1 rewritten, 12 -> 11 nodes",
    ]
    assert not file.nodes("GatherND", "Pad")
    assert [props(n)[MODULE_PROP] for n in file.nodes("Gather")] == ["getitem_2"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_rows")
def test_exported_option_a_shortcut_is_one_slice(tmp_path: Path) -> None:
    file = exported_to(tmp_path / "m.onnx", traced(Residual(), (1, 3, 8, 8)))
    assert len(file.nodes("Slice")) == 1
    assert [line.split(":")[0] for line in file.record.cleanup] == ["Slice of a Slice -> one Slice"]


def test_what_rows_write_needs_no_clean_up(exported: Callable[[str], Exported]) -> None:
    for name, counts in {"residual": {"Slice": 1, "Pad": 1}, "shuffled": {"Gather": 1, "Pad": 0}}.items():
        file = exported(name)
        assert file.record.cleanup == [] and file.record.fallback is None
        assert {op: len(file.nodes(op)) for op in counts} == counts
        assert not file.nodes("Identity", "BatchNormalization", "GatherND", "Shape")


@pytest.mark.slow
@pytest.mark.usefixtures("no_rows")
def test_clean_up_can_be_left_out(tmp_path: Path) -> None:
    program = traced(Shuffled(), (1, 3, 6, 6))
    file = exported_to(tmp_path / "m.onnx", program, cleanup=False)
    assert file.record.cleanup == []
    assert len(file.nodes("GatherND")) == 1
    assert_same(file, batch=2)


def cleaned(body: str, output: str = "float[n,c,h,w] y") -> tuple[list[str], list[str]]:
    """Operators left of a graph of x, and what was said; the outputs are checked to be the same."""
    text = f"""<ir_version: 10, opset_import: ["": 18]>
    g (float[n,4,6,6] x) => ({output}) <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}},
        int64[1] three = {{3}}, int64[1] five = {{5}}, int64[1] last = {{-1}},
        int64[8] none = {{0,0,0,0,0,0,0,0}},
        int64[8] some = {{0,0,0,1,0,0,0,0}}, int64[3,1] index = {{2,0,-1}}, int64[2,2] pairs = {{0,1,1,0}}>
    {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    new, done = cleanup.clean(model)
    onnx.checker.check_model(new, full_check=True)
    x = torch.randn(2, 4, 6, 6)
    before, after = run(model.SerializeToString(), x), run(new.SerializeToString(), x)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    return [n.op_type for n in new.graph.node], done


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Slice(x, one, five, two) y = Slice(a, zero, three, three, two)", ["Slice"]),
        (
            "a = Slice(x, zero, two, one) b = Slice(a, one, five, two) y = Slice(b, one, last, three)",
            ["Slice"],
        ),
        ("a = Identity(x) b = Relu(a) y = Add(a, b)", ["Relu", "Add"]),
        ("a = Pad(x, none) y = Relu(a)", ["Relu"]),
        (
            "a = Transpose<perm=[2,0,1,3]>(x) b = GatherND(a, index) y = Transpose<perm=[1,2,0,3]>(b)",
            ["Gather"],
        ),
        (
            "a = Transpose<perm=[1,0,2,3]>(x) b = GatherND(a, index) c = Transpose<perm=[1,0,2,3]>(b) "
            "d = ReduceMax<keepdims=1>(a) y = Add(c, d)",
            ["Transpose", "Gather", "ReduceMax", "Add"],
        ),
    ],
)
def test_clean_up_rewrites(body: str, left: list[str]) -> None:
    operators, done = cleaned(body)
    assert Counter(operators) == Counter(left)
    assert len(done) == 1


@pytest.mark.parametrize(
    "body",
    [
        "a = Slice(x, one, five, two) y = Slice(a, one, three, two)",  # the same axis twice
        "a = Slice(x, one, five, last) y = Slice(a, one, three, three)",  # -1 is axis 3
        "a = Slice(x, one, five, two) b = Slice(a, zero, three, three) c = ReduceMax(a) y = Add(b, c)",
        "a = Slice(x, one, five, two) s = Add(zero, zero) y = Slice(a, s, three, three)",
        "y = Identity(x)",
        "a = Pad(x, some) y = Relu(a)",
        "a = Transpose<perm=[1,0,2,3]>(x) b = GatherND(a, index) y = Transpose<perm=[0,1,3,2]>(b)",
        "a = Transpose<perm=[1,2,0,3]>(x) b = GatherND(a, pairs) y = Transpose<perm=[1,0,2]>(b)",
        "a = Transpose<perm=[1,0,2,3]>(x) b = Relu(a) y = Transpose<perm=[1,0,2,3]>(b)",
    ],
)
def test_clean_up_leaves_alone(body: str) -> None:
    output = "float[n,h,w] y" if "pairs" in body else "float[n,c,h,w] y"
    _, done = cleaned(body, output)
    assert done == []


def test_clean_up_keeps_a_slice_that_is_an_output() -> None:
    body = "a = Slice(x, one, five, two) y = Slice(a, zero, three, three)"
    assert cleaned(body, "float[n,c,h,w] y, float[n,4,4,6] a") == (["Slice", "Slice"], [])


# ----- refusals: nothing is written


@pytest.fixture
def halves() -> Program:
    return traced(Plain(lambda x: {"first": x[:, :2], "second": x[:, 2:]}))


def broken_by(change: Callable[[ModelProto], None]) -> Callable[..., drafts.Draft]:
    """What makes a draft with a mistake in it."""

    def draft(*args: Any) -> drafts.Draft:
        made = drafts.draft(*args)
        change(made.model)
        return made

    return draft


@pytest.fixture(scope="module")
def exported_halves() -> tuple[Program, Any]:
    program = traced(Plain(lambda x: {"first": x[:, :2], "second": x[:, 2:]}))
    axes = ({0: "batch"},)
    captured = translate.capture(program, axes, 1)
    return program, translate.translate(program, captured, 18, ["input"], ["first", "second"], axes)


@pytest.mark.slow
@pytest.mark.usefixtures("no_rows")
def test_a_run_translates_a_network_once(
    tmp_path: Path, exported_halves: tuple[Program, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as alone, named by each program's own passes; other weights are another network."""
    halves, asked = exported_halves[0], list[str]()
    monkeypatch.setattr(export, "capture", lambda *_: None)

    def translated(program: Program, *_: Any) -> Any:
        asked.append(program.fingerprint())
        return exported_halves[1]

    monkeypatch.setattr(export, "translate", translated)
    known, told = export.Exports(), list[str]()
    for number, name in enumerate(("trial", "l1", "l1")):
        program = halves.clone()
        for node in program.graph.nodes:
            node.meta[PASS_KEY] = name
        tell = lambda message, fraction: told.append(message)  # noqa: E731
        options: dict[str, Any] = {"batches": (1,), "known": known if number < 2 else None, "progress": tell}
        export_onnx(program, tmp_path / f"{number}.onnx", **options)
    assert len(asked) == 2, "the second one is known, the third one is another run's"
    assert told.count("translate it to ONNX") == 2 and told.count("run the network") == 3
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
    made = {
        p.value
        for n in onnx.load(tmp_path / "1.onnx").graph.node
        for p in n.metadata_props
        if p.key == PASS_PROP
    }
    assert made == {"l1"}
    with torch.no_grad():
        next(iter(named_tensors(program.module).values())).add_(0.0).mul_(1.0 + 1e-6)
    export_onnx(program, tmp_path / "3.onnx", batches=(1,), known=known)
    assert len(asked) == 3


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go first; one alone is kept however large it is."""
    monkeypatch.setattr(export, "_MAX_KEPT", 25)
    known = export.Exports()
    for name in "abc":
        known.add(name, translate.Translated(bytes(10), {}))
    assert [known.find(name) is not None for name in "abc"] == [False, True, True]
    known.add("d", translate.Translated(bytes(99), {}))
    assert [known.find(name) is not None for name in "bcd"] == [False, False, True]


def assert_refused(tmp_path: Path, program: Program, text: str, **options: Any) -> None:
    with pytest.raises(ExportError, match=text):
        export_onnx(program, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_error_above_tolerance_names_output_and_batch(tmp_path: Path, halves: Program) -> None:
    text = r"output 'first' at batch 2: found a relative error of \S+ .* at most -1;"
    assert_refused(tmp_path, halves, text, tolerance=-1, batches=(2,))


def test_wrong_file_is_caught(tmp_path: Path, halves: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: ModelProto) -> None:
        bias = next(i for i in model.graph.initializer if i.name == "conv.bias")
        values = numpy_helper.to_array(bias).copy()
        values[2] *= 1.01
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))

    monkeypatch.setattr(export, "draft", broken_by(broken))
    assert_refused(tmp_path, halves, "output 'second' at batch 1: found a relative error")


def test_invalid_file_is_caught(tmp_path: Path, halves: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: ModelProto) -> None:
        model.graph.node[0].op_type = "Convolve"

    monkeypatch.setattr(export, "draft", broken_by(broken))
    assert_refused(tmp_path, halves, r"m\.onnx: the ONNX checker found .*Convolve")


@pytest.mark.slow
def test_opset_is_checked_on_the_model(tmp_path: Path) -> None:
    text = r"opset: found 18 in the exported model, expected 99 \(the exporter said: .*\); ask for 18"
    assert_refused(tmp_path, traced(Plain(torch.relu)), text, opset=99)


def test_batch_baked_into_a_view(tmp_path: Path) -> None:
    text = r"view: found .* runs at batch 2; .*dynamic=()"
    assert_refused(tmp_path, traced(Plain(lambda x: x.view(1, 64))), text)


def test_batch_baked_into_a_branch(tmp_path: Path) -> None:
    def body(x: Tensor) -> Tensor:
        return only_small_batches(x)

    assert_refused(tmp_path, traced(Plain(body)), r"found .*batch.*dynamic=()")


@torch.fx.wrap
def only_small_batches(x: Tensor) -> Tensor:
    """Specialises the batch when it is exported, and runs at every batch in torch."""
    if x.shape[0] == 7:
        return x * 2
    return x + x


@pytest.mark.slow
def test_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    text = r"^linalg_svdvals: the ONNX exporter found 'No ONNX function found for .*_linalg_svd"
    assert_refused(tmp_path, traced(Plain(torch.linalg.svdvals)), text)


def test_nan_of_the_program_itself(tmp_path: Path) -> None:
    program = traced(Plain(torch.log))
    assert_refused(tmp_path, program, "output 'output': found NaN or infinity from the program itself")


@pytest.mark.parametrize("batches", [(), (0,), (2, -1)])
def test_batches_that_make_no_sense(tmp_path: Path, batches: tuple[int, ...]) -> None:
    assert_refused(
        tmp_path, traced(Plain(torch.relu)), re.escape(f"batches: found {list(batches)}"), batches=batches
    )


def test_output_that_is_no_tensor(tmp_path: Path) -> None:
    program = traced(Plain(lambda x: (x, x.shape[0])))
    assert_refused(tmp_path, program, "output_1: found int, expected tensors")


@pytest.mark.usefixtures("no_rows")
def test_more_weights_than_torchs_exporter_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MOST_BYTES", 60)
    assert_refused(
        tmp_path, traced(Plain(torch.relu)), "weights: found .* GiB and a call .* expected at most"
    )


def test_place_that_cannot_be_written(tmp_path: Path, halves: Program) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file/m\.onnx: found "):
        export_onnx(halves, tmp_path / "file" / "m.onnx")
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk_leaves_the_old_file(
    tmp_path: Path, halves: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_text("old")

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_onnx(halves, tmp_path / "m.onnx")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.onnx", "old")]


# ----- side effects


@pytest.mark.slow
def test_program_and_terminal_are_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    program = traced(Plain(lambda x: {"a": x, "b": None}))  # the exporter warns about None
    tensors = {name: t.clone() for name, t in named_tensors(program.module).items()}
    meta = [dict(n.meta) for n in program.graph.nodes]
    handlers = list(logging.getLogger("torch").handlers)
    exported_to(tmp_path / "m.onnx", program)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.getLogger("torch").handlers == handlers
    assert [dict(n.meta) for n in program.graph.nodes] == meta
    assert tensors.keys() == named_tensors(program.module).keys()
    assert all(torch.equal(t, tensors[name]) for name, t in named_tensors(program.module).items())
    assert not any(m.training for m in program.module.modules())
