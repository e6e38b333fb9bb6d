"""The test networks themselves: they run, trace, and depend on what they should depend on."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.utils._pytree import tree_leaves

from tests.nets import OPS, TRAPS, Built, Spec, build, random_cnn, scramble


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of `model`, which must leave its input alone."""
    before = x.clone()
    outputs: list[Any] = tree_leaves(model(x))
    assert torch.equal(x, before)
    assert all(isinstance(output, Tensor) for output in outputs)
    return [output.detach().clone() for output in outputs]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def ready(built: Built) -> tuple[nn.Module, Tensor]:
    """The module for evaluation in float64, and an input."""
    module, shape = built
    return module.eval().double(), torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def check_alive(outputs: list[Tensor], others: list[Tensor]) -> None:
    """Finite outputs, not constant, that differ for another input by far more than rounding."""
    for output, other in zip(outputs, others, strict=True):
        assert output.dtype == torch.float64
        assert output.isfinite().all()
        assert output.max() > output.min()
        assert (output - other).norm() > 1e-6 * output.norm()


@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str) -> None:
    module, x = ready(TRAPS[name]())
    assert x.shape[0] == 1
    fresh = run(module, x)
    scramble(module, 2)
    scrambled = run(module, x)
    assert not equal(scrambled, fresh)
    assert equal(run(symbolic_trace(module), x), scrambled)
    check_alive(scrambled, run(module, x.flip(-1) + 0.5))


@pytest.mark.parametrize("name", TRAPS)
def test_trap_is_reproducible_and_leaves_the_random_state_alone(name: str) -> None:
    state = torch.get_rng_state()
    (first, _), (second, _) = TRAPS[name](), TRAPS[name]()
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)


def test_scramble_ranges() -> None:
    conv, norm, slopes, layer_norm = (
        nn.Conv2d(3, 400, 1),
        nn.BatchNorm2d(400),
        nn.PReLU(400),
        nn.LayerNorm(400),
    )
    module = nn.Sequential(conv, norm, slopes, layer_norm)
    kernel = conv.weight.clone()
    assert scramble(module, 3) is module
    assert torch.equal(conv.weight, kernel)
    assert norm.running_var is not None and norm.running_mean is not None and conv.bias is not None
    assert 0.5 <= norm.running_var.min() < norm.running_var.max() <= 1.5
    for weight in (norm.weight, slopes.weight, layer_norm.weight):
        assert 0.5 <= weight.abs().min() < weight.abs().max() <= 1.5
        assert weight.min() < 0 < weight.max()
    for tensor in (norm.running_mean, norm.bias, conv.bias, layer_norm.bias):
        assert 0.8 < tensor.std() < 1.2
    assert norm.num_batches_tracked == 0


def test_scramble_depends_on_the_seed_alone() -> None:
    one, same, other = (scramble(TRAPS["se-linear"]()[0], seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["up.bias"], other["up.bias"])


def check_random(spec: Spec) -> None:
    module, x = ready(build(spec))
    fresh = run(module, x)
    check_alive(fresh, run(module, x.flip(-1) + 0.5))
    scramble(module, 2)
    scrambled = run(module, x)
    assert not equal(scrambled, fresh)
    assert equal(run(symbolic_trace(module), x), scrambled)
    check_alive(scrambled, run(module, x.flip(-1) + 0.5))
    assert equal(run(build(spec)[0].eval().double(), x), fresh)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(random_cnn())
def test_random_cnn(spec: Spec) -> None:
    check_random(spec)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_operation_on_every_kind_of_value(op: str, data: st.DataObject) -> None:
    spec = data.draw(random_cnn())
    check_random(spec | {"ops": (*spec["ops"][:2], data.draw(OPS[op]), data.draw(OPS[op]))})
