"""fold-bn: exact, and what it must leave alone is left alone and named."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from graphcomp.errors import PassError
from graphcomp.ir.program import PASS_KEY, Program
from graphcomp.passes import FoldBN
from graphcomp.pipeline.verify import TOLERANCE, difference, verify_pass
from graphcomp.records import Plan
from tests.nets import Net, scramble
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced

IMAGE, TOKENS = (1, 4, 8, 8), (1, 10, 6)
Built = tuple[nn.Module, tuple[int, ...]]


def _then(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...] = IMAGE) -> Built:
    return nn.Sequential(layer, norm, nn.ReLU()), shape


EXACT: dict[str, Callable[[], Built]] = {
    "conv": lambda: _then(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "conv with bias": lambda: _then(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "conv, reflect padding": lambda: _then(
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)
    ),
    "grouped": lambda: _then(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "depthwise": lambda: _then(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)),
    "transposed": lambda: _then(nn.ConvTranspose2d(4, 6, 2, stride=2), nn.BatchNorm2d(6)),
    "transposed, grouped": lambda: _then(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "transposed, depthwise": lambda: _then(
        nn.ConvTranspose2d(4, 8, 2, groups=4, bias=False), nn.BatchNorm2d(8)
    ),
    "conv1d": lambda: _then(nn.Conv1d(10, 6, 3), nn.BatchNorm1d(6), TOKENS),
    "conv3d": lambda: _then(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), (1, 2, 4, 4, 4)),
    "linear": lambda: _then(nn.Linear(12, 6, bias=False), nn.BatchNorm1d(6), (1, 12)),
    "linear with bias": lambda: _then(nn.Linear(12, 6), nn.BatchNorm1d(6), (1, 12)),
    "no affine": lambda: _then(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "large eps": lambda: _then(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.7)),
    "called by keyword": lambda: (
        Net(lambda m, x: m.norm(input=m.conv(x)), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)),
        IMAGE,
    ),
    "two in a row": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)),
        IMAGE,
    ),
}


def program_of(built: Built) -> Program:
    module, shape = built
    return traced(scramble(module, 3), *shape)


def norms(program: Program) -> list[str]:
    return [k for k, m in program.called_modules().items() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def fold(program: Program, **options: Any) -> tuple[Plan, Program]:
    pass_ = FoldBN(**options)
    plan = pass_.plan(program, context())
    return plan, pass_.rewrite(pass_.simulate(program, plan), plan)


@pytest.mark.parametrize("name", EXACT)
def test_folds_exactly(name: str) -> None:
    program = program_of(EXACT[name]())
    plan, folded = fold(program)
    assert norms(program) and not norms(folded)
    assert plan.kept == []
    assert verify_pass(FoldBN(), program, plan) <= TOLERANCE
    assert difference(program.to(torch.float64), fold(program.to(torch.float64))[1]) <= TOLERANCE
    assert difference(program, folded) < 1e-5


def test_arithmetic_by_hand() -> None:
    """s = 3 / sqrt(8 + 1) = 1 and 6 / sqrt(3 + 1) = 3; W = s W, b = beta + s (b - mean)."""
    conv, norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=1.0)
    assert conv.bias is not None and norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
        conv.bias.copy_(torch.tensor([1.0, 0.0]))
        norm.weight.copy_(torch.tensor([3.0, 6.0]))
        norm.bias.copy_(torch.tensor([0.5, 1.0]))
        norm.running_mean.copy_(torch.tensor([4.0, 2.0]))
        norm.running_var.copy_(torch.tensor([8.0, 3.0]))
    _, folded = fold(traced(nn.Sequential(conv, norm), 1, 1, 2, 2))
    layer = folded.layer("0", nn.Conv2d)
    assert cast(Tensor, layer.weight).flatten().tolist() == [2.0, -3.0]
    assert cast(Tensor, layer.bias).tolist() == [-2.5, -5.0]


def test_printed_before_and_after() -> None:
    program = program_of(EXACT["conv"]())
    assert str(program).splitlines() == [
        "%input_1: 1x4x8x8 = input input",
        "%_0: 1x6x6x6 = conv 4->6 k3 s1 (%input_1)",
        "%_1: 1x6x6x6 = batchnorm2d 6 (%_0)",
        "%_2: 1x6x6x6 = relu (%_1)",
        "%output: 1x6x6x6 = output (%_2)",
    ]
    _, folded = fold(program)
    assert str(folded).splitlines() == [
        "%input_1: 1x4x8x8 = input input",
        "%_0: 1x6x6x6 = conv 4->6 k3 s1 (%input_1)",
        "%_2: 1x6x6x6 = relu (%_0)",
        "%output: 1x6x6x6 = output (%_2)",
    ]
    assert [n.meta[PASS_KEY] for n in folded.graph.nodes] == ["trace", "fold-bn", "trace", "trace"]


def _two(**parts: nn.Module) -> dict[str, Any]:
    return {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4), **parts}


def _tied() -> Built:
    net = Net(
        lambda m, x: m.norm(m.conv(x)) + m.other(x), **_two(other=nn.Conv2d(4, 4, 1)),
    )  # fmt: skip
    cast(nn.Conv2d, net.other).weight = cast(nn.Conv2d, net.conv).weight
    return net, IMAGE


LEFT_ALONE: dict[str, tuple[Callable[[], Built], str]] = {
    "both called twice": (
        lambda: (Net(lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))), **_two()), IMAGE),
        "one of the two is called more than once",
    ),
    "conv called twice": (
        lambda: (Net(lambda m, x: m.norm(m.conv(x)) + m.conv(x), **_two()), IMAGE),
        "one of the two is called more than once",
    ),
    "norm called twice": (
        lambda: (
            Net(lambda m, x: m.norm(m.conv(x)) + m.norm(m.b(x)), **_two(b=nn.Conv2d(4, 4, 1))),
            IMAGE,
        ),
        "one of the two is called more than once",
    ),
    "conv feeds two nodes": (
        lambda: (Net(lambda m, x: (y := m.conv(x)) + m.norm(y), **_two()), IMAGE),
        "conv feeds other nodes too",
    ),
    "nothing in front": (
        lambda: (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), IMAGE),
        "no layer in front of it",
    ),
    "a function in front": (
        lambda: (Net(lambda m, x: m.norm(m.conv(x).relu()), **_two()), IMAGE),
        "no layer in front of it",
    ),
    "another module in front": (
        lambda: (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), IMAGE),
        "ReLU in front of it, not a convolution or linear layer",
    ),
    "no running statistics": (
        lambda: _then(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
        "it has no running statistics",
    ),
    "linear on tokens": (
        lambda: _then(nn.Linear(6, 8), nn.BatchNorm1d(10), TOKENS),
        "its channels are not the linear layer's outputs",
    ),
    "square linear on tokens": (
        lambda: _then(nn.Linear(6, 10), nn.BatchNorm1d(10), TOKENS),
        "its channels are not the linear layer's outputs",
    ),
    "tied weights": (_tied, "the weights of conv are used elsewhere too"),
    "weight read by a node": (
        lambda: (Net(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum(), **_two()), IMAGE),
        "the weights of conv are used elsewhere too",
    ),
    "bias read by a node": (
        lambda: (Net(lambda m, x: m.norm(m.conv(x)) * m.conv.bias.sum(), **_two()), IMAGE),
        "the weights of conv are used elsewhere too",
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_leaves_alone_and_says_why(name: str) -> None:
    build, reason = LEFT_ALONE[name]
    program = program_of(build())
    plan, folded = fold(program)
    assert plan.decisions == {"pairs": {}}
    assert {k.where for k in plan.kept} == set(norms(program))
    assert {k.reason for k in plan.kept} == {reason}
    assert norms(folded) == norms(program)
    assert difference(program, folded) == 0


def test_folds_the_one_and_keeps_the_other() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    plan, folded = fold(program_of((net, IMAGE)))
    assert plan.decisions == {"pairs": {"2": "1"}}
    assert [k.where for k in plan.kept] == ["0"]
    assert plan.summary == "folded 1 of 2 normalisations"
    assert norms(folded) == ["0"]


def test_excluded() -> None:
    plan, folded = fold(tiny_program(), exclude=("bn1",))
    assert [(k.where, k.reason) for k in plan.kept] == [("bn1", "excluded")]
    assert norms(folded) == ["bn1"]


@pytest.mark.parametrize("trainable", [True, False])
def test_frozen_weights_stay_frozen(trainable: bool) -> None:
    module, shape = EXACT["conv with bias"]()
    cast(nn.Sequential, module)[0].requires_grad_(trainable)
    _, folded = fold(program_of((module, shape)))
    flags = {name: p.requires_grad for name, p in folded.module.named_parameters()}
    assert flags == {"0.weight": trainable, "0.bias": trainable}


def test_a_folded_program_trains() -> None:
    _, folded = fold(tiny_program())
    optimiser = torch.optim.SGD(folded.module.parameters(), 0.1, momentum=0.9)
    before = {k: p.detach().clone() for k, p in folded.module.named_parameters()}
    folded(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimiser.step()
    unchanged = [k for k, p in folded.module.named_parameters() if torch.equal(p, before[k])]
    assert unchanged == []


def test_twice_is_harmless() -> None:
    _, once = fold(tiny_program())
    plan, twice = fold(once)
    assert plan.decisions == {"pairs": {}} and plan.kept == []
    assert str(twice) == str(once)
    assert all(torch.equal(t, once.tensors[k]) for k, t in twice.tensors.items())


def test_leaves_its_input_alone() -> None:
    program = tiny_program()
    text, before = str(program), {k: t.clone() for k, t in program.tensors.items()}
    fold(program)
    assert str(program) == text
    assert all(torch.equal(t, before[k]) for k, t in program.tensors.items())


def test_runs_verified_in_the_pipeline() -> None:
    step, plan, result = run_pass(FoldBN(), tiny_program(), context())
    assert step.verify_error <= TOLERANCE
    assert step.drift is None  # changes no value
    assert result.history == (plan.model_dump(mode="json", exclude={"bulk"}),)


@pytest.mark.parametrize(
    "pairs",
    [
        {"absent": "stem"},  # no such node
        {"bn0": "inner"},  # another layer feeds it
        {"fc": "stem"},  # no normalisation
    ],
)
def test_refuses_the_plan_of_another_program(pairs: dict[str, str]) -> None:
    plan = Plan(name="fold-bn", decisions={"pairs": pairs})
    (norm, layer), = pairs.items()  # fmt: skip
    with pytest.raises(
        PassError, match=f"^{norm}: found no normalisation to fold into {layer}, expected a plan"
    ):
        FoldBN().rewrite(tiny_program(), plan)


class Rectified(FrozenBatchNorm2d):
    """Not the normalisation alone, so that it is traced through."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_normalisation_that_is_written_as_arithmetic_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Rectified(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    plan, _ = fold(traced(net, 1, 3, 4, 4))
    assert [(k.where, k.reason) for k in plan.kept] == [
        ("mul", "it is written as arithmetic or a function, not as a layer")
    ]
    assert plan.summary == "folded 1 of 2 normalisations"
