"""Functions of parameters that are traced as layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.ir import load, save
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.passes.fold_bn import FoldBN
from graphcomp.pipeline import Context
from graphcomp.runtime.targets import TARGETS
from tests.nets import Net, NormAct, SameConv, scramble
from tests.running import run_pass


def traced(model: nn.Module, *shape: int, fold: bool = True) -> Program:
    scramble(model, 0)
    program = trace(model, torch.zeros(shape), fold=fold)
    x = torch.randn((2, *shape[1:]), generator=torch.Generator().manual_seed(1))
    assert torch.equal(program(x), model.eval()(x))
    return program


def net(forward: Any, **parts: Any) -> nn.Module:
    return Net(forward, **parts)


def layers(program: Program) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in program.called_modules().items()}


def test_subclass_with_children_becomes_its_base_beside_them() -> None:
    program = traced(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)), 1, 3, 6, 6)
    assert layers(program) == {"0": nn.Conv2d, "1.batch_norm": nn.BatchNorm2d, "1.act": nn.ReLU}
    assert "1.batch_norm.num_batches_tracked" in program.tensors


def test_subclass_without_children_becomes_its_base() -> None:
    program = traced(nn.Sequential(SameConv(4, 4, 3, stride=2, dilation=2, groups=4)), 1, 4, 9, 9)
    assert layers(program) == {"0": nn.Conv2d}
    layer = program.layer("0", nn.Conv2d)
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((2, 2), (0, 0), (2, 2), 4)


def test_lifted_norm_follows_the_batch_in_training_as_its_subclass_does() -> None:
    model = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)), 0)
    program, x = trace(model, torch.zeros(1, 3, 6, 6)), torch.randn(5, 3, 6, 6)
    program.module.train()
    torch.testing.assert_close(program.module(x), model.train()(x))
    assert torch.equal(program.tensors["1.batch_norm.running_mean"], model[1].running_mean)  # type: ignore[index]


def test_lifted_norm_is_folded() -> None:
    program = traced(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)), 1, 3, 6, 6)
    _, _, folded = run_pass(FoldBN(), program, Context(TARGETS["cpu-avx2"]))
    assert layers(folded) == {"0": nn.Conv2d, "1.act": nn.ReLU}


def test_saved_and_loaded(tmp_path: Path) -> None:
    program = traced(nn.Sequential(SameConv(3, 4, 3), NormAct(4)), 1, 3, 6, 6)
    save(program, tmp_path / "program")
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(load(tmp_path / "program")(x), program(x))


def test_functions_in_one_module_have_names_of_their_own() -> None:
    weights = {f"w{i}": nn.Parameter(torch.randn(5, 5)) for i in range(2)}
    program = traced(net(lambda m, x: F.linear(F.relu(F.linear(x, m.w0)), m.w1), **weights), 1, 5)
    assert layers(program) == {"linear": nn.Linear, "linear_1": nn.Linear}
    assert program.tensors.keys() == {"linear.weight", "linear_1.weight"}


def test_one_layer_for_calls_that_are_alike() -> None:
    weight = nn.Parameter(torch.randn(5, 5))
    program = traced(net(lambda m, x: F.linear(F.linear(x, m.weight), m.weight), weight=weight), 1, 5)
    assert layers(program) == {"linear": nn.Linear}


def test_weights_are_shared_by_layers_that_differ() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, m.weight, padding=1) + F.conv2d(x, m.weight, padding=2, dilation=2)

    program = traced(net(forward, weight=nn.Parameter(torch.randn(3, 3, 3, 3))), 1, 3, 8, 8)
    assert layers(program) == {"conv2d": nn.Conv2d, "conv2d_1": nn.Conv2d}
    assert program.tensors["conv2d.weight"] is program.tensors["conv2d_1.weight"]


def test_weight_that_is_also_used_as_a_tensor_stays_one_tensor() -> None:
    weight = nn.Parameter(torch.randn(5, 5))
    program = traced(net(lambda m, x: F.linear(x, m.weight) @ m.weight, weight=weight), 1, 5)
    assert program.tensors["weight"] is program.tensors["linear.weight"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.conv1d(x, m.weight, m.bias, 2, "valid", 2),
        lambda m, x: F.conv1d(x, weight=m.weight, bias=m.bias, padding="same"),
        lambda m, x: F.conv_transpose1d(x, m.weight, m.bias, 2, 1, 1, 1, 2),
        lambda m, x: F.conv1d(F.layer_norm(x, (9,)), m.weight),
        lambda m, x: F.conv1d(F.group_norm(x, 2, m.bias, m.bias, 1e-3), m.weight),
    ],
)
def test_arguments_of_every_kind(function: Any) -> None:
    parts = {"weight": nn.Parameter(torch.randn(4, 4, 3)), "bias": nn.Parameter(torch.randn(4))}
    kinds = layers(traced(net(function, **parts), 1, 4, 9))
    assert kinds.keys() & {"conv1d", "conv_transpose1d"}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.weight * 2),
        lambda m, x: F.linear(x, m.weight, x.mean((0, 1)).expand(5)),
        lambda m, x: F.batch_norm(x, m.mean, m.var),
    ],
)
def test_what_is_computed_or_unsaid_stays_a_function(function: Any) -> None:
    parts = {"weight": nn.Parameter(torch.randn(5, 5)), "mean": torch.zeros(5), "var": torch.ones(5)}
    assert layers(traced(net(function, **parts), 1, 5, fold=False)) == {}


def test_frozen_weights_stay_frozen() -> None:
    program = traced(net(lambda m, x: F.linear(x, m.weight), weight=torch.randn(5, 5)), 1, 5)
    assert not program.tensors["linear.weight"].requires_grad


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(SameConv(3, 4, 3), NormAct(4))
    names = list(model.state_dict())
    trace(model, torch.zeros(1, 3, 6, 6))
    assert list(model.state_dict()) == names and type(model[0]) is SameConv
