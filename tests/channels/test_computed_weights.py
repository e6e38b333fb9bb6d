"""Weights that a network computes from its parameters: no label an element, and the same channels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.channels import Channels, analyse, analysis, rules
from graphcomp.ir.program import Program
from graphcomp.pipeline.verify import verify_pass
from tests.nets import TRAPS, Net, _conv, _head, scramble
from tests.removing import ByRows, exact_program, half, plain_program, random_scores

WIDTH = 64


class Standardised(nn.Conv2d):
    """Each filter has mean 0 and variance 1, by way of a normalisation in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ByMoments(nn.Conv2d):
    """The same from views, means and divisions."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / std.expand_as(weight), self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """Times a parameter of the row."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class Chunked(nn.Conv2d):
    """Two halves that change places."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weight.chunk(2, 1)
        return F.conv2d(x, torch.cat([b, a], 1), self.bias, self.stride, self.padding)


KINDS = [Standardised, ByMoments, Scaled, Chunked]


def network(kind: type[nn.Conv2d]) -> Program:
    def forward(m: Any, x: Tensor) -> Any:
        x = F.relu(m.stem(x))
        return m.head(F.relu(m.after(F.relu(m.inner(x)))))

    parts = {"stem": _conv(3, WIDTH), "inner": kind(WIDTH, WIDTH, 3, padding=1)}
    return plain_program(
        Net(forward, **parts, after=_conv(WIDTH, WIDTH), head=_head(WIDTH)), 1, 3, 8, 8, fold=False
    )


def found(channels: Channels) -> list[tuple[Any, ...]]:
    """What can go, without the ids of channels."""
    return [
        (g.name, {k: v.tolist() for k, v in g.producers.items()}, g.readers, g.blocks.tolist(), g.derived)
        for g in channels.removable
    ]


def every_label(program: Program, patch: pytest.MonkeyPatch) -> Channels:
    """The analysis that follows every element of every parameter."""
    with patch.context() as inner:
        inner.setattr(analysis, "unfollowed", lambda program, constant: frozenset())
        return analyse(program.clone())


@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_costs_no_label_an_element(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    program = network(kind)
    channels = analyse(program)
    assert len(channels.channel_of) < 10 * WIDTH < WIDTH * WIDTH
    whole = every_label(program, monkeypatch)
    assert len(whole.channel_of) > WIDTH * WIDTH
    assert found(channels) == found(whole)
    assert [g.name for g in channels.removable] == ["after"]


@pytest.mark.slow
def test_no_trap_is_read_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {name: exact_program(trap()) for name, trap in TRAPS.items()}
    touched = {name: p for name, p in programs.items() if rules.unfollowed(p, rules.constants_in(p))}
    assert touched
    for name, program in touched.items():
        assert found(analyse(program)) == found(every_label(program, monkeypatch)), name


def shared(use: Any) -> Program:
    """A layer whose weight is also read by something that has no rule."""

    def forward(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        return m.head(F.relu(m.conv(x))), use(m, x)

    torch.manual_seed(0)
    net = Net(forward, stem=_conv(3, 8), conv=_conv(8, 8), head=_head(8))
    return plain_program(scramble(net, 0), 1, 3, 8, 8, fold=False)


SHARED = {
    "computed": lambda m, x: F.conv2d(x, m.conv.weight * 2),
    "as it is": lambda m, x: torch.einsum("bchw,oc->bohw", x, m.conv.weight[:, :, 0, 0]),
    "by an operator without a rule": lambda m, x: torch.outer(m.conv.bias, m.conv.bias) * x.mean(),
    "an output": lambda m, x: m.conv.weight,
}


@pytest.mark.parametrize("use", SHARED)
def test_a_layer_whose_weight_is_read_unseen_keeps_its_channels(use: str) -> None:
    program = shared(SHARED[use])
    channels = analyse(program)
    drop, _ = half(channels).feasible(random_scores(channels))
    rows = drop.rows
    verify_pass(ByRows(), program, rows)
    assert not rows.keys() & {"conv.weight"}


def _written_part(m: Any, x: Tensor) -> Tensor:
    bias = m.bias.clone()
    bias[2:5].zero_()
    return F.linear(x, m.weight, bias)


def _written_before(m: Any, x: Tensor) -> Tensor:
    weight = m.weight.clone()
    weight.mul_(0.5)
    return F.linear(x, weight * 3, m.bias)


def _written_after(m: Any, x: Tensor) -> Tensor:
    weight = m.weight.clone()
    y = F.linear(x, weight, m.bias)
    weight.zero_()
    return y


def _written_between(m: Any, x: Tensor) -> Tensor:
    weight = m.weight.clone()
    y = F.linear(x, weight, m.bias)
    weight.view(-1)[::2].add_(1.0)
    return F.linear(y, weight, m.bias)


def _written_copy(m: Any, x: Tensor) -> Tensor:
    weight = m.weight.clone()
    other = weight * 2
    weight.zero_()
    return F.linear(x, other, m.bias)


WRITTEN = {
    "a part": (_written_part, True),
    "before": (_written_before, True),
    "after": (_written_after, True),
    "between": (_written_between, False),
    "a copy": (_written_copy, True),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_weights_that_are_written_in_place_are_what_the_call_reads(name: str) -> None:
    """They were folded as they were before: another network, in silence."""
    function, plain = WRITTEN[name]
    module = scramble(
        Net(function, weight=nn.Parameter(torch.randn(8, 8)), bias=nn.Parameter(torch.randn(8))), 0
    )
    program = plain_program(module.double().eval(), 2, 8)
    x = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(program.to(torch.float64)(x), module(x), rtol=1e-12, atol=1e-12)
    assert (len(program.called_modules()) > 0) is plain or not plain
    if plain:
        assert not [n for n in program.graph.nodes if n.op in ("call_function", "call_method")]


def test_a_weight_that_is_counted_up_is_no_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.scale.mul_(2.0)
        return F.linear(x, m.weight * m.scale)

    module = Net(
        forward,
        weight=nn.Parameter(torch.randn(8, 8)),
        scale=nn.Parameter(torch.ones(1), requires_grad=False),
    )
    module = module.double().eval()
    program = plain_program(module, 2, 8)
    assert float(module.scale) == 1
    x = torch.randn(2, 8, dtype=torch.float64)
    first, second = program(x), program(x)
    torch.testing.assert_close(second, 2 * first)
