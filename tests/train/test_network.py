"""A network in training: what is watched, where it is computed, and the way back to a program."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.errors import AnalysisError
from graphcomp.ir.program import Program
from graphcomp.pipeline.verify import relative_error
from graphcomp.train.network import Mode, Network, with_watched
from tests.learnable import normalised_net, plain_net, same, weights
from tests.tiny import tiny_program, traced


def x(n: int = 4, shape: tuple[int, ...] = (3, 8, 8)) -> Tensor:
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(5))


def watched(program: Program, *names: str) -> dict[str, Tensor]:
    return Network(program, names, Mode(), training=False)((x(),))[1]


def test_watched_outputs_are_those_of_the_nodes() -> None:
    program = normalised_net()
    found = watched(program, "_0", "_2")
    assert list(found) == ["_0", "_2"]
    first = program.layer("0")(x())
    assert torch.equal(found["_0"], first)
    assert torch.equal(found["_2"], F.relu(program.layer("1")(first)))
    assert torch.equal(Network(program, ["_2"], Mode(), training=False)((x(),))[0], program(x()))


def test_watched_before_they_are_overwritten() -> None:
    """An in-place activation, and an in-place addition through a view, write into what is watched."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.act(y)
            z.flatten(1).add_(1)
            return z.mean((2, 3))

    program = traced(Overwrites(), 1, 3, 8, 8)
    found = watched(program, "conv", "act")
    conv = program.layer("conv")(x())
    assert torch.equal(found["conv"], conv)
    assert torch.equal(found["act"], F.relu(conv))


def test_gradients_flow_through_what_is_watched() -> None:
    network = Network(normalised_net(), ["_2"], Mode())
    network((x(),))[1]["_2"].square().mean().backward()
    gradients = {n: t.grad for n, t in network.module.named_parameters() if t.grad is not None}
    assert set(gradients) == {"0.weight", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("name", "said"), [("nowhere", "no such node"), ("output", "does not yield one tensor")]
)
def test_what_cannot_be_watched(name: str, said: str) -> None:
    program = traced(Pair(), 1, 3, 8, 8)
    with pytest.raises(AnalysisError, match=rf"{name}: found .*{said}.*expected"):
        with_watched(program, [name])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        return {"a": y, "b": y.mean((2, 3))}


def test_the_program_stays_as_it_was() -> None:
    """T2.8 for teachers: no gradient, no new statistics."""
    for training in (True, False):
        program = normalised_net()
        before = weights(program)
        network = Network(program, (), Mode(), training=training)
        assert network.module.training is training
        out, _ = network((x(),))
        assert out.requires_grad is training
        if training:
            out.sum().backward()
        assert all(torch.equal(t, before[n]) and t.grad is None for n, t in program.tensors.items())
        assert not program.module.training


def test_frozen_stays_frozen() -> None:
    program = plain_net()
    program.tensors["0.weight"].requires_grad_(False)
    network = Network(program, (), Mode())
    assert [n for n, t in network.tensors.items() if not t.requires_grad] == ["0.weight"]
    back = network.to_program(network.tensors)
    assert same(back, program) and not back.tensors["0.weight"].requires_grad
    assert back.tensors["0.bias"].requires_grad


@pytest.mark.parametrize("mode", [Mode(layout="channels_last"), Mode("bf16"), Mode("bf16", "channels_last")])
def test_modes_compute_the_same(mode: Mode) -> None:
    program = tiny_program()
    network = Network(program, (), mode, training=False)
    out, _ = network(network.place((x(),)))
    assert out.dtype == torch.float32
    error = relative_error(out, program(x()).detach())
    assert error < 1e-5 if mode.precision == "float32" else 1e-5 < error < 0.05
    assert network.tensors["stem.weight"].is_contiguous(
        memory_format=torch.channels_last if mode.layout == "channels_last" else torch.contiguous_format
    )


def test_prediction_is_in_the_programs_precision() -> None:
    program = tiny_program()
    network = Network(program, (), Mode("bf16"), training=False)
    assert torch.equal(network.predict((x(),)), program(x()))


@pytest.mark.slow
def test_back_to_a_program_with_its_own_layout_and_type() -> None:
    program = plain_net(torch.float64)
    network = Network(program, (), Mode(layout="channels_last"))
    assert network.place((x(),))[0].dtype == torch.float64
    back = network.to_program(network.tensors)
    assert same(back, program)
    assert [t.stride() for t in back.tensors.values()] == [t.stride() for t in program.tensors.values()]
    assert not back.module.training


def test_tied_weights_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())  # type: ignore[no-any-return]

    program = traced(Tied(), 1, 8)
    network = Network(program, (), Mode())
    assert list(network.tensors) == ["a.weight"]
    back = network.to_program({"a.weight": torch.ones(8, 8)})
    assert back.tensors["a.weight"] is back.tensors["b.weight"]
    assert bool((back.tensors["b.weight"] == 1).all())
