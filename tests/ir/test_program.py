"""Tracing, copying, printing; what a trace keeps of the model's function, and how it fails."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

from graphcomp.errors import TraceError
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.program import PASS_KEY, Program, editable, output_tensors, same_memory
from graphcomp.ir.tracing import trace
from tests.nets import TRAPS, Net, scramble
from tests.removing import digest, plain_program


def net(function: object, **parts: nn.Module | Tensor) -> Net:
    return Net(function, **parts)  # type: ignore[arg-type]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


X = torch.zeros(1, 3, 8, 8)


# ---- What is traced


@pytest.mark.parametrize("name", ["two-outputs", "frozen-batchnorm", "attention-heads", "inplace-on-slice"])
def test_a_program_computes_what_its_model_does(name: str) -> None:
    module, shape = TRAPS[name]()
    scramble(module, 1).eval()
    program = trace(module, torch.zeros(shape))
    (x,) = fresh_inputs(program, 2, 3)
    for found, expected in zip(output_tensors(program(x)), output_tensors(module(x.clone())), strict=True):
        if name == "frozen-batchnorm":  # a layer that adds up in another order: see tests/ir/test_frozen.py
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, expected)


AUGMENTED = {
    "view": lambda m, x: (z := m.a(x), operator_iadd(z[:, :2], m.b(x)), z)[2],
    "identity": lambda m, x: (z := m.a(x), operator_iadd(m.same(z), 1.0), z)[2],
    "twice": lambda m, x: (z := m.a(x), operator_iadd(z, z), operator_iadd(z, z), z)[3],
}


def operator_iadd(x: Tensor, y: object) -> Tensor:
    x += y  # type: ignore[assignment, operator]
    return x


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmented_assignment_reaches_what_else_reads_the_memory(name: str) -> None:
    """`x += y` under fx is `x + y`: other readers of the same memory would miss the change."""
    model = net(AUGMENTED[name], a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 2, 3), same=nn.Identity()).eval()
    program = trace(model, X)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(program(x), model(x))


def test_augmented_assignment_that_nobody_else_sees_becomes_an_operator() -> None:
    program = trace(
        net(lambda m, x: operator_iadd(m.a(x), m.b(x)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3)), X
    )
    assert "= add (%a, %b)" in str(program)


def test_augmented_assignment_of_a_size_leaves_the_size_alone() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        n = k = x.size(3)
        k += 1
        return m.a(x)[..., : n - 3] * k

    model = net(forward, a=nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(trace(model, X)(x), model(x))


def test_operands_by_keyword_come_first() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.a(input=torch.cat(tensors=torch.chunk(input=x, chunks=3, dim=1), dim=1))

    model = net(forward, a=nn.Conv2d(3, 4, 3))
    program = trace(model, X)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(program(x), model(x))
    assert all(n.args for n in program.graph.nodes if n.op.startswith("call_"))


def test_in_place_nodes_without_users_survive_and_dead_code_does_not() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        F.relu(y, inplace=True)
        y.add_(1.0)
        m.dead(y)
        torch.sigmoid(y)
        return y

    model = net(forward, a=nn.Conv2d(3, 4, 3), dead=nn.Conv2d(4, 4, 1), unused=nn.Conv2d(4, 4, 1))
    program = trace(model, X)
    x = torch.randn(1, 3, 8, 8)
    assert [n.name for n in program.graph.nodes] == ["x", "a", "relu", "add_", "output"]
    assert torch.equal(program(x), model(x))
    assert list(program.module._modules) == ["a"]


def test_tensors_made_in_forward_have_shapes() -> None:
    program = trace(net(lambda m, x: m.a(x) + torch.ones(1, x.size(1) + 1, 1, 1), a=nn.Conv2d(3, 4, 3)), X)
    assert "ones" in str(program)


def test_every_node_names_the_pass_that_made_it() -> None:
    program = trace(small(), X)
    assert {n.meta[PASS_KEY] for n in program.graph.nodes} == {"trace"}


def test_the_printed_program() -> None:
    assert str(trace(small(), X)) == "\n".join(
        [
            "%input_1: 1x3x8x8 = input input",
            "%_0: 1x4x6x6 = conv 3->4 k3 s1 (%input_1)",
            "%_1: 1x4x6x6 = batchnorm2d 4 (%_0)",
            "%_2: 1x4x6x6 = relu (%_1)",
            "%_3: 1x144 = flatten (%_2)",
            "%_4: 1x5 = linear 144->5 (%_3)",
            "%output: 1x5 = output (%_4)",
        ]
    )


def test_only_the_first_sample_is_kept_as_example() -> None:
    program = trace(small(), torch.randn(4, 3, 8, 8))
    assert [tuple(x.shape) for x in program.example_inputs] == [(1, 3, 8, 8)]


def test_layers_are_checked_by_kind() -> None:
    program = trace(small(), X)
    assert isinstance(program.layer("0", nn.Conv2d), nn.Conv2d)
    with pytest.raises(TypeError, match="0: found Conv2d, expected Linear"):
        program.layer("0", nn.Linear)


# ---- The model stays as it is


def test_the_model_keeps_its_training_mode_and_tensors() -> None:
    model = small().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program = trace(model, X)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert not any(m.training for m in program.module.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        model[0].weight.zero_()
    assert program.tensors["0.weight"].abs().sum() > 0


def test_weights_are_shared_on_request() -> None:
    model = small()
    assert trace(model, X, copy_weights=False).tensors["0.weight"] is model[0].weight


def test_frozen_weights_stay_frozen() -> None:
    model = small()
    model[0].requires_grad_(False)
    for program in (trace(model, X), trace(model, X).clone(), trace(model, X).to(torch.float64)):
        frozen = [n for n, p in program.module.named_parameters() if not p.requires_grad]
        assert frozen == ["0.weight", "0.bias"]


def test_clones_share_nothing() -> None:
    program = plain_program(*_trap("tied-convs"))
    before = digest(program)
    clone = program.clone()
    assert digest(clone) == before
    for name, tensor in clone.tensors.items():
        assert not same_memory(tensor, program.tensors[name])
    clone.layer("a").register_forward_hook(lambda *_: None)
    assert not program.layer("a")._forward_hooks
    for tensor in clone.tensors.values():
        with torch.no_grad():
            tensor.fill_(3)
    assert digest(program) == before
    assert clone.tensors["a.weight"] is clone.tensors["b.weight"]


def _trap(name: str) -> tuple[nn.Module, *tuple[int, ...]]:
    module, shape = TRAPS[name]()
    return module, *shape


def test_replaced_tensors_replace_all_names_of_a_tied_weight() -> None:
    program = plain_program(*_trap("tied-convs"))
    module = editable(program, {"b.weight": torch.ones_like(program.tensors["b.weight"])})
    changed = Program(module, program.example_inputs)
    assert changed.tensors["a.weight"] is changed.tensors["b.weight"]
    assert bool((changed.tensors["a.weight"] == 1).all())
    assert not bool((program.tensors["a.weight"] == 1).all())


def test_to_converts_floating_point_only() -> None:
    program = trace(small(), X).to(torch.float64)
    assert program.tensors["1.num_batches_tracked"].dtype == torch.int64
    assert program.tensors["1.running_mean"].dtype == torch.float64
    assert program.example_inputs[0].dtype == torch.float64


# ---- Weights that are computed


def test_parametrizations_are_baked_in() -> None:
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, 5))
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    x = torch.randn(1, 3, 8, 8)
    expected, keys = model(x), list(model.state_dict())
    for copy_weights in (True, False):
        program = trace(model, X, copy_weights=copy_weights)
        assert torch.equal(program(x), expected)
        assert type(program.layer("0")) is nn.Conv2d
        assert {"0.weight", "0.bias"} == {n for n in program.tensors if n.startswith("0.")}
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm_is_baked_in() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, 5))
    with torch.no_grad():
        model[0].weight_g.mul_(2)
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    program = trace(model, X)
    assert torch.equal(program(x), expected)
    assert {"0.weight", "0.bias"} == {n for n in program.tensors if n.startswith("0.")}
    assert hasattr(model[0], "weight_g")


# ---- What a program is, in 64 characters


def test_a_fingerprint_is_of_content() -> None:
    """Not of the object, nor of what does not change the function in eval mode."""
    program = trace(small(), X)
    print_ = program.fingerprint()
    assert len(print_) == 64
    copy = Program(editable(program), program.example_inputs, ({"name": "a pass"},))
    copy.module.train()
    assert copy.fingerprint() == print_


@pytest.mark.parametrize(
    ("a", "b"),
    [
        # the same weights, shapes and printed program
        (nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=2, dilation=2)),
        (nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.GELU(), nn.GELU("tanh")),
        (nn.BatchNorm2d(2), nn.BatchNorm2d(2, eps=1e-3)),
        (nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU6())),
        (nn.TransformerEncoderLayer(8, 2, 4), nn.TransformerEncoderLayer(8, 4, 4)),
        (nn.TransformerEncoderLayer(8, 2, 4), nn.TransformerEncoderLayer(8, 2, 4, activation="gelu")),
    ],
)
def test_a_fingerprint_sees_every_setting(a: nn.Module, b: nn.Module) -> None:
    b.load_state_dict(a.state_dict())
    x = torch.zeros(1, 8, 8) if isinstance(a, nn.TransformerEncoderLayer) else torch.zeros(1, 2, 8, 8)
    one, two, again = (trace(nn.Sequential(module), x).fingerprint() for module in (a, b, a))
    assert one == again != two


def test_a_fingerprint_sees_every_number() -> None:
    program = trace(small(), X)
    print_ = program.fingerprint()
    for name, tensor in program.tensors.items():
        flat = tensor.data.view(-1)
        before = flat[-1].clone()
        flat[-1] += 1
        assert program.fingerprint() != print_, name
        flat[-1] = before
    assert program.fingerprint() == print_
    literals = [trace(net(lambda m, x, n=n: x + n), X).fingerprint() for n in (1.0, 1.5)]
    assert literals[0] != literals[1]


def test_a_fingerprint_sees_the_code_of_a_wrapped_function(tmp_path: Path) -> None:
    """Its name says nothing, and what it calls may change as well: the whole file counts."""
    prints = []
    for factor in (2, 3):
        file = tmp_path / f"m{factor}.py"
        file.write_text(f"def helper(x):\n    return x * {factor}\n\ndef scaled(x):\n    return helper(x)\n")
        spec = importlib.util.spec_from_file_location("wrapped_module", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        graph = fx.Graph()
        graph.output(graph.call_function(module.scaled, (graph.placeholder("x"),)))
        prints.append(Program(fx.GraphModule(nn.Module(), graph), (X,)).fingerprint())
    assert prints[0] != prints[1]


# ---- Failing


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x
        return -x


def test_control_flow_names_module_and_source_line() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Branch()))
    model[1].eval()
    with pytest.raises(TraceError) as caught:
        trace(model, X)
    message = str(caught.value)
    assert message.startswith("1.1 (Branch): ")
    assert f"{Path(__file__).name}:" in message
    assert "`if x.mean() > 0:`" in message
    assert "torch.fx.wrap" in message
    assert model.training


def test_a_wrong_input_shape_names_the_node() -> None:
    with pytest.raises(TraceError, match=r"^_4 \(4\): .*\(1, 400\).*\(1, 3, 12, 12\).*--input-shape"):
        trace(small(), torch.zeros(1, 3, 12, 12))
    with pytest.raises(TraceError, match=r"^_0 \(0\): "):
        trace(small(), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\x1b[31m", "a\0b"])
@pytest.mark.parametrize("what", ["module", "parameter", "buffer"])
def test_names_that_do_not_fit_between_quotes(name: str, what: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    tensor = torch.ones(2)
    if what == "module":
        net.add_module(name, nn.ReLU())
    elif what == "parameter":
        net[0].register_parameter(name, nn.Parameter(tensor))
    else:
        net[0].register_buffer(name, tensor)
    with pytest.raises(TraceError, match="expected names without double quotes") as caught:
        trace(net, torch.ones(1, 2))
    assert str(caught.value).isprintable()
